"""Checks machines before a run on them, in at most a minute: what differs, what is slow, what cannot be reached.

    vir-check --hostfile hosts
    vir-check --hostfile hosts --interface eth0 --write-good good_hosts --config run.yaml --output /shared/runs/a
    srun --ntasks-per-node 1 vir-check --config run.yaml
    torchrun --nnodes 2 ... -m vir.check

All other options are those of vir-train: with them settings and data are compared, too; --output alone names the folder
of checkpoints. With a hostfile each machine is asked by ssh, from the same folder by the same Python; without one the
ranks of a launcher are asked, the first of each machine; without either it is this machine alone.

The exit code is 0 if all is good, 2 if a machine has a finding or an option is wrong, 130 after Ctrl-C, 143 after
SIGTERM; a launcher may make another one of it (torchrun 1).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from vir import cli, launcher
from vir.cluster import links, preflight
from vir.cluster.hosts import forwarded, port, read_hostfile, write_hostfile
from vir.cluster.machines import Asked, AskedBySsh, AskedByStore, BySsh, ByStore, Machines, join, wait_until
from vir.cluster.preflight import DEEPSPEED, NO_INDEX, Finding
from vir.cluster.probe import PART_S, Facts, Question, look, nearest
from vir.config import folder_of, to_dict
from vir.errors import SettingsError, VirError
from vir.files import try_to_write
from vir.flags import parse
from vir.launcher import Place

PROGRAM = "vir-check"
_FACTS_S = 33.0
"""Until all machines have told their facts: to connect, to start Python and to import torch from a cold disk, too."""
_LINKS_S = links.SECONDS + 6


@dataclass
class Result:
    """All that was found out."""

    hosts: list[str]
    facts: dict[str, Facts]
    pairs: list[links.Pair]
    findings: list[Finding]

    def to_json(self) -> str:
        return json.dumps({"nodes": self.facts, "findings": [asdict(finding) for finding in self.findings],
                           "pairs": [{**asdict(pair), "first": self.hosts[pair.first],
                                      "second": self.hosts[pair.second]} for pair in self.pairs]}, indent=1)


def main(argv: list[str] | None = None) -> int:
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank=")]
    args, options = _parser().parse_known_args(words)
    if options and args.output:
        options += ["--output", args.output]
    try:
        if args.node is not None:
            _be_asked(Question(**json.loads(args.node)), AskedBySsh())
            cli.end_now(0)  # a part that hangs is not waited for
        with cli.interruptible():
            return _check(args, options)
    except VirError as error:
        return cli.tell(error, PROGRAM)
    except cli.Interrupted as stop:
        print("stopped", file=sys.stderr)
        return stop.exit_code


def _check(args: argparse.Namespace, options: list[str]) -> int:
    hosts = read_hostfile(args.hostfile) if args.hostfile else {}
    if args.write_good and not hosts:
        raise SettingsError(f"--write-good {args.write_good} writes a hostfile without the bad machines of another; "
                            "give --hostfile")
    if args.ssh_port is not None and not hosts:
        raise SettingsError(f"--ssh_port {args.ssh_port} is that of the machines of a hostfile; give --hostfile, or "
                            "leave it out")
    place = launcher.adopt()
    if args.master_port and not hosts and place.size > 1:
        raise SettingsError(f"--master_port {args.master_port} cannot be tried under a launcher, whose ranks have met "
                            f"at port {place.port} by now; give that port to the launcher, and leave it out here")
    for path in filter(None, (args.json, args.write_good)) if place.rank == 0 else ():
        _try_to_write(path)
    if not hosts and place.size > 1:
        try:
            return _under_launcher(place, args, options)
        except RuntimeError as error:  # of the store
            raise SettingsError(f"rank {place.rank} cannot reach rank 0 at {place.address}:{place.port}, or it has "
                                f"ended ({str(error).splitlines()[0]}); see what it says, and that all ranks run "
                                "vir-check") from error
    with _shared(options, args.output) as (folder, token):
        question = Question(options=tuple(options), folder=str(folder), token=token, port=args.master_port)
        if not hosts:
            name = socket.gethostname()
            facts = {name: _with_offset(look(question, _more(question)), time.time())}
            result = Result([name], facts, [], preflight.judge(facts, args.interface, args.master_port))
        else:
            with BySsh(list(hosts), _line(question), args.ssh_port) as machines:
                result = ask(machines, args.interface, args.master_port)
    return _tell(result, args, hosts)


def _tell(result: Result, args: argparse.Namespace, slots: Mapping[str, int]) -> int:
    print(preflight.table(result.facts, result.hosts, links.summaries(result.hosts, result.pairs), result.findings),
          *preflight.notes(result.facts), sep="\n", flush=True)
    bad = {finding.host for finding in result.findings}
    good = {host: number for host, number in slots.items() if host not in bad}
    try:
        if args.json:
            args.json.write_text(result.to_json())
        if args.write_good and good:
            write_hostfile(args.write_good, good)
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be written: {error.strerror}") from error
    if args.write_good:
        print(f"{args.write_good}: {len(good)} of {len(slots)} machines" if good else
              f"{args.write_good} is not written: no machine is good")
    return SettingsError.exit_code if bad else 0


def _try_to_write(path: Path) -> None:
    try:
        try_to_write(path)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}; give another path") from error


@contextmanager
def _shared(options: list[str], output: str) -> Iterator[tuple[Path, str]]:
    """The folder of checkpoints with a token in it that all machines must see; it is gone after the block, however that
    ends.

    Args:
        output: the folder where there are no options to tell it.

    Raises:
        SettingsError: this machine cannot write there, or a wrong option.
    """
    folder = nearest(folder_of(parse(options)) if options else Path(output or "runs"))
    token = f".shared-{os.urandom(8).hex()}"
    try:
        _write(folder / token, token)
        yield folder, token
    finally:
        (folder / token).unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise SettingsError(f"--output {path.parent} cannot be written to: {error.strerror}; give another folder"
                            ) from error


def ask(machines: Machines, interface: str, port: int, facts_s: float = _FACTS_S) -> Result:
    """The facts of all, for which it waits so many seconds, then what their links carry, and the findings on both."""
    answers = machines.answers(machines.names, facts_s)
    facts = {name: _with_offset(answer.said, answer.at) for name, answer in answers.items() if not answer.problem}
    findings = [Finding(name, "reach", f"{answer.problem}; mend that, or leave it out")
                for name, answer in answers.items() if answer.problem]
    findings += preflight.judge(facts, interface, port)
    joins = [name for name, said in facts.items() if not interface or interface in said.get("interfaces", {})]
    pairs, unreached = _measure(machines, joins, facts, interface)
    findings += links.judge(joins, pairs, unreached)
    findings.sort(key=lambda finding: machines.names.index(finding.host))
    number = {at: machines.names.index(name) for at, name in enumerate(joins)}
    return Result(machines.names, facts, [links.Pair(**{
        **asdict(pair), "first": number[pair.first], "second": number[pair.second]}) for pair in pairs], findings)


def _with_offset(facts: Facts, at: float) -> Facts:
    return {**facts, "offset": round(facts["clock"] - at, 1)}


def _measure(machines: Machines, joins: Sequence[str], facts: Mapping[str, Facts],
             interface: str) -> tuple[list[links.Pair], dict[str, str]]:
    """What the pairs of those that join have measured, and why some do not reach the first."""
    joins_alone = len(joins) < 2
    for name in facts:
        machines.tell(name, None if joins_alone or name not in joins else asdict(links.Plan(
            me=joins.index(name), count=len(joins), addresses=_addresses(facts[joins[0]], interface),
            port=facts[joins[0]]["listens"], interface=interface)))
    if joins_alone:
        return [], {}
    answers = machines.answers(joins, _LINKS_S)
    said = {name: answer.said or {"pairs": [], "unreached": answer.problem} for name, answer in answers.items()}
    return ([links.Pair(**pair) for told in said.values() for pair in told["pairs"]],
            {name: told["unreached"] for name, told in said.items() if told["unreached"]})


def _addresses(first: Facts, interface: str) -> tuple[str, ...]:
    """Those at which the first machine may be reached: where ssh has met it before those that it knows itself."""
    there: dict[str, str] = first.get("interfaces", {})
    if interface:
        return (there[interface],)
    found = [first.get("reached_at", ""), *there.values()]
    return tuple(dict.fromkeys(address for address in found if address and not address.startswith("127.")))


# ---- a machine that is asked


def _more(question: Question) -> dict[str, Callable[[], Facts]]:
    if not question.options:
        return {}
    return {"config": lambda: {"config": _settings(question.options)},
            "data": lambda: {"data": _fingerprints(question.options)}}


def _settings(options: Sequence[str]) -> dict[str, Any]:
    """Those of the run and, where it names one, of the DeepSpeed JSON as this machine reads it. Raises SettingsError.
    """
    from vir.engine import ds_config

    config = parse(list(options))
    return {**to_dict(config), DEEPSPEED: ds_config.read(config.deepspeed_config) if config.deepspeed_config else {}}


def _fingerprints(options: Sequence[str]) -> dict[str, str]:
    """Of the images that this machine finds, without making an index. Raises VirError."""
    from vir.data.opening import NoIndexError, open_reader, places

    data, until = parse(list(options)).data, time.monotonic() + PART_S + 1  # when nobody waits for it any more
    kept = replace(places(data, lambda: time.monotonic() > until), makes_indexes=False)
    found = {}
    for flag, spec in (("--data.train", data.train), ("--data.val", data.val)):
        if spec:
            try:
                found[flag] = open_reader(spec, kept, first=True).fingerprint
            except NoIndexError:
                found[flag] = NO_INDEX
    return found


def _be_asked(question: Question, by: Asked) -> None:
    with links.listen() as listener:
        by.say({**look(question, _more(question)), "listens": listener.getsockname()[1], "clock": time.time()})
        if plan := by.hear():
            by.say(links.measure(links.Plan(**{**plan, "addresses": tuple(plan["addresses"])}), listener))


def _line(question: Question) -> str:
    """What the shell of a machine is told first: to ask this program there."""
    exports = [f"export {name}={shlex.quote(value)} && " for name, value in forwarded(os.environ).items()
               if "\n" not in value]
    words = [sys.executable, "-m", "vir.check", "--node", json.dumps(asdict(question))]
    return f"cd {shlex.quote(os.getcwd())} && {''.join(exports)}exec {shlex.join(words)}"


# ---- machines that a launcher has started


def _under_launcher(place: Place, args: argparse.Namespace, options: list[str]) -> int:
    """Rank 0 asks, the first rank of each machine answers, by the store of the launcher; these return alike."""
    from vir.distributed import connect

    name = socket.gethostname() if place.local_rank == 0 else ""
    store = connect(place, timedelta(seconds=_FACTS_S + _LINKS_S))
    join(store, place.rank, name)
    if place.rank == 0:
        with _shared(options, args.output) as (folder, token):
            store.set("question", json.dumps({"folder": str(folder), "token": token}))
            threading.Thread(target=_be_asked_by_store, args=[place, options], daemon=True).start()
            until = time.monotonic() + _FACTS_S
            machines = ByStore(store, place.size, _FACTS_S / 2)
            result = ask(machines, args.interface, 0, until - time.monotonic())
        code = _tell(result, args, {})
        store.set("code", str(code))
        wait_until(lambda: all(store.check([f"left-{rank}"]) for rank in range(1, place.size)), 5)
        return code
    if name:
        _be_asked_by_store(place, options)
    code = int(store.get("code")) if name else 0
    store.set(f"left-{place.rank}", "")
    return code


def _be_asked_by_store(place: Place, options: Sequence[str]) -> None:
    """Each rank has its own options."""
    from vir.distributed import connect

    store = connect(place, timedelta(seconds=_FACTS_S + _LINKS_S))
    _be_asked(Question(options=tuple(options), **json.loads(store.get("question"))), AskedByStore(store, place.rank))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hostfile", type=Path, help="a line `host slots=GPUS` for each machine")
    add("--interface", default="", help="network interface that all machines shall use; not given: that which leads to "
                                        "the first of them")
    add("--ssh_port", type=port, help="of the machines' ssh servers")
    add("--master_port", type=port, default=0,
        help="port of the first machine that the run will use; it must be free; not under a launcher, which has it")
    add("--json", type=Path, metavar="FILE", help="where to write all facts, links and findings")
    add("--write-good", type=Path, metavar="FILE", help="where to write the hostfile without machines with a finding")
    add("--output", default="", metavar="FOLDER", help="of the run; without other options of vir-train it is looked at "
                                                       "alone, and no settings and data")
    add("--node", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
