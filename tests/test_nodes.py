"""Runs on several machines through launch/deepspeed.sh: pdsh, sshd and deepspeed as on a cluster, each machine a set of
namespaces. One run meets a fault of machines or a signal in each of its starts; at the end it must be the same as one
that met nothing, bit for bit."""

import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from support import nodes as machines
from support.faults import GONE_WITHIN
from support.launchers import HANGS, ROOT
from support.nodes import Nodes
from support.tiny_runs import command, saved_step, steps_done, train_events, weights
from vir.run_folder import CHECKPOINTS

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS),
              pytest.mark.skipif(bool(machines.lacking()), reason=machines.lacking())]

STEPS, EVERY, COMPARED = 120, 8, 8
RANKS_ON = ["node-a", "node-b"]
SILENCE = 8
"""Seconds after which a rank counts as lost here."""
HOURS = 5
"""By which the clock of a node is wrong."""


def arguments(shards: Path, run: Path, config: str | Path = "zero2_fp32", *more: str) -> list[str]:
    """Without what depends on the number of ranks: DESIGN, section 4."""
    return [*command(shards, run, config, "--model.drop_path_rate", "0", steps=STEPS, every=EVERY),
            "--train.rank_timeout", f"{SILENCE}", "--checkpoint.keep", "3", *more]


class Script:
    """launch/deepspeed.sh, started on a node.

    Args:
        hosts: where its ranks are.
        words: its options and those of vir.train.
    """

    def __init__(self, nodes: Nodes, node: str, hosts: list[str], log: Path, run: Path, words: list):
        self.nodes, self.on, self.log, self.run = nodes, {node, *hosts}, log, run
        self.process = nodes.launch(node, ["bash", ROOT / "launch" / "deepspeed.sh", *words], log,
                                    OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, holds, what: str, within: float = HANGS) -> float:
        """Returns the seconds that it took."""
        began = time.monotonic()
        while not holds():
            assert self.process.poll() is None and time.monotonic() - began < within, (
                f"waiting for {what}, exit code {self.process.poll()}\n{self.said()[-6000:]}")
            time.sleep(0.02)
        return time.monotonic() - began

    def wait_for_words(self, words: str, count: int = 1):
        self.wait_until(lambda: self.said().count(words) >= count, f"{words!r}, {count} times")

    def wait_for_steps(self, count: int = 2):
        """New ones, from now on."""
        since = time.time()
        self.wait_until(lambda: len(steps_done(self.run, since)) >= count, f"{count} steps")

    def wait_for_a_checkpoint(self):
        """A newer one: the script gives up after three starts without."""
        before = saved_step(self.run)
        self.wait_until(lambda: saved_step(self.run) > before, "a new checkpoint")

    def wait_for_a_save(self):
        since = time.time()
        self.wait_until(lambda: any(modified(path) > since for path in (self.run / CHECKPOINTS).glob("*[0-9].part")),
                        "a save")

    def send(self, number: int, node: str, module: str):
        """To the process that runs a module on a node."""
        (found,) = self.nodes.pythons(node, module)
        found.send_signal(number)

    def end(self) -> "Met":
        """Its end is bounded; what the run and the nodes are like then."""
        code = self.process.wait(timeout=HANGS)
        until = time.monotonic() + GONE_WITHIN
        while (left := self.nodes.everything(self.on)) and time.monotonic() < until:
            time.sleep(0.1)
        return Met(code, self.said(), saved_step(self.run), max(steps_done(self.run), default=0), left,
                   sorted(path.name for path in self.run.glob(".status*")))


@dataclass
class Met:
    """What a start of the script came to."""

    code: int
    said: str
    saved: int
    """Step of the newest checkpoint after it."""
    done: int
    """The last step."""
    left: dict[str, list[str]]
    """Processes on the nodes."""
    status: list[str]
    """What the script has left of its own in the run folder."""


def modified(path: Path) -> float:
    """0 where it has just been renamed."""
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


# ---- the machines, and the runs on them


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with Nodes(tmp_path_factory.mktemp("nodes"), 5) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def start(nodes, tmp_path_factory):
    """Starts the script on a node, for a run with the ranks of a hostfile."""
    tmp, count = tmp_path_factory.mktemp("starts"), iter(range(1000))

    def start(node: str, run: Path, words: list, hosts: list[str] = RANKS_ON, options=()) -> Script:
        number = next(count)
        hostfile = nodes.write_hostfile(hosts, tmp / f"hostfile-{number}")
        return Script(nodes, node, hosts, tmp / f"{number}.txt", run, ["--hostfile", hostfile, *options, *words])

    return start


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory) -> list[float]:
    """Losses of the first steps in one process."""
    run = tmp_path_factory.mktemp("alone") / "a run"
    with subprocess.Popen([sys.executable, "-m", "vir.train", *arguments(shards, run)], cwd=ROOT,
                          stdout=subprocess.DEVNULL, start_new_session=True) as process:
        stop_after(COMPARED, run, process)
        assert process.wait(timeout=HANGS) == 75
    return losses(run)


def stop_after(count: int, run: Path, process: subprocess.Popen):
    """By the switch file."""
    until = time.monotonic() + HANGS
    while len(steps_done(run)) < count and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    (run / "STOP").touch()


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in train_events(run)][:COMPARED]


@pytest.fixture(scope="module")
def beside(start, shards, tmp_path_factory) -> Script:
    """The run that meets nothing, on nodes of its own: it trains while the other one waits for lost nodes."""
    run = tmp_path_factory.mktemp("undisturbed") / "a run"
    return start("node-d", run, arguments(shards, run), ["node-d", "node-e"])


@pytest.fixture(scope="module")
def undisturbed(beside, faulty) -> tuple[Path, "Met"]:
    return beside.run, beside.end()


# ---- what is done to the run: in the first start, whose script starts again by itself; then one in each start


@dataclass
class Fault:
    """One that ended all ranks."""

    seconds: float
    """From the fault to the end of all ranks, wherever they were."""
    said: str
    """By the script, of this start."""


def lose(script: Script, fault, back, lost: str) -> Fault:
    """Lets a node be lost, and be back when the script waits for it."""
    before, waits = len(script.said()), script.said().count(f"waiting for {lost}")
    fault(lost)
    seconds = script.wait_until(lambda: not any(script.nodes.pythons(node, "vir.train") for node in RANKS_ON),
                                "the end of all ranks", 2 * GONE_WITHIN)
    script.wait_for_words(f"waiting for {lost}", waits + 1)
    back(lost)
    return Fault(seconds, script.said()[before:])


def lose_nodes(script: Script) -> dict[str, Fault]:
    """One by its cable, and that of rank 0 by its power, while rank 0 saves."""
    nodes, met = script.nodes, {}
    script.wait_for_a_checkpoint()
    met["cut"] = lose(script, nodes.cut, nodes.join, "node-b")
    script.wait_for_a_checkpoint()
    script.wait_for_a_save()
    met["powered off in a save"] = lose(script, nodes.power_off, nodes.power_on, "node-a")
    script.wait_for_steps()
    return met


# What gets which signal, on which node; the script itself is on node-a.
SIGNALS = {
    "SIGUSR1 to the script, a clock is wrong": (signal.SIGUSR1, "node-a", "vir.launch"),
    "SIGTERM to the runner": (signal.SIGTERM, "node-a", "deepspeed.launcher.runner"),
    "SIGUSR1 to the runner": (signal.SIGUSR1, "node-a", "deepspeed.launcher.runner"),
    "SIGTERM to the launcher of node-b": (signal.SIGTERM, "node-b", "deepspeed.launcher.launch"),
    "SIGUSR1 to the launcher of node-a": (signal.SIGUSR1, "node-a", "deepspeed.launcher.launch"),
}


@pytest.fixture(scope="module")
def faulty(nodes, start, beside, shards, tmp_path_factory) -> tuple[Path, dict[str, Fault], dict[str, Met]]:
    run = tmp_path_factory.mktemp("faulty") / "a run"
    words, met = arguments(shards, run), {}
    script = start("node-c", run, words, options=["--max-restarts", "3"])
    lost = lose_nodes(script)
    script.send(signal.SIGTERM, "node-c", "vir.launch")
    met["SIGTERM to the script"] = script.end()
    for name, (number, node, module) in SIGNALS.items():
        wrong = "clock" in name
        if wrong:
            nodes.clock("node-b", HOURS)
        script = start("node-a", run, words)
        script.wait_for_steps()
        script.send(number, node, module)
        met[name] = script.end()
        if wrong:
            nodes.clock("node-b", 0)
    met["the rest"] = start("node-a", run, words).end()
    return run, lost, met


# ---- what must be so


def test_two_nodes_train_as_one_process_does(undisturbed, alone):
    run, met = undisturbed
    assert met.code == 0, met.said[-6000:]
    assert met.left == {} and met.status == []
    assert re.search(r"ranks: 1 on node-d \(.*\), 1 on node-e \(", met.said), met.said
    assert losses(run) == pytest.approx(alone, rel=1e-5) and len(alone) == COMPARED


def test_three_nodes_train_with_zero_3_as_one_process_does_name_a_slow_link_and_heed_a_switch_file(
        nodes, start, shards, alone, tmp_path):
    nodes.slow("node-c", 10)
    run, three, config = tmp_path / "run", ["node-a", "node-b", "node-c"], tmp_path / "zero3_fp32.json"
    config.write_text('{"zero_optimization": {"stage": 3}}')
    script = start("node-b", run, arguments(shards, run, config, "--train.micro_batch_size", "8"), three)
    far = "straggler: rank 2 (node-c) is far away: a word to rank 0 and back takes "
    script.wait_for_words(far)  # on a busy machine its beats are seldom among the words of a step
    stop_after(COMPARED, run, script.process)
    met = script.end()
    assert met.code == 75, met.said[-6000:]
    assert met.left == {} and met.status == [] and met.saved == met.done >= COMPARED
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    assert not (run / "STOP").exists()
    assert re.search(re.escape(far) + r"\d+ ms, ", met.said)
    assert not re.search(r"rank [01] \(\S+\) is far away", met.said)


def test_a_lost_node_ends_all_ranks_soon_and_is_named_and_the_script_goes_on_when_it_is_back(faulty):
    for name, fault in faulty[1].items():
        assert fault.seconds < GONE_WITHIN * SILENCE / 60 + 15, (name, fault)
        lost = {"cut": "node-b", "powered off in a save": "node-a"}[name]
        assert re.search(rf"vir-launch: exit code 5, told by rank \d \(node-\w\): rank \d \({lost}\) .* is lost: ",
                         fault.said), fault.said
        assert re.search(rf"vir-launch: waiting for {lost} \(.+\)", fault.said)
    said = faulty[2]["SIGTERM to the script"].said
    assert re.findall(r"starting again from step (\d+), restart (\d) of 3", said)[-1][1] == "2", said


@pytest.mark.parametrize("name", ["SIGTERM to the script", *SIGNALS])
def test_a_signal_anywhere_lets_all_ranks_save_their_last_step(name, faulty):
    met = faulty[2][name]
    assert met.code == 75, met.said[-6000:]
    assert met.saved == met.done > 0
    assert met.left == {} and met.status == []


def test_after_all_of_it_the_run_is_the_undisturbed_one_bit_for_bit(faulty, undisturbed, tmp_path):
    assert faulty[2]["the rest"].code == 0, faulty[2]["the rest"].said[-6000:]
    kept = ("step", "samples_seen", "loss", "lr", "grad_norm", "updates")
    expected, found = ([{key: event[key] for key in kept} for event in train_events(run)]
                       for run in (undisturbed[0], faulty[0]))
    assert [event["step"] for event in expected] == list(range(1, STEPS + 1)) and found == expected
    for ema in (False, True):
        expected, found = (weights(run, STEPS, tmp_path, ema=ema) for run in (undisturbed[0], faulty[0]))
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_host_that_does_not_answer_is_refused_by_name(start, shards, tmp_path):
    began = time.monotonic()
    met = start("node-a", tmp_path / "run", arguments(shards, tmp_path / "run"), ["node-a", "10.77.0.99"]).end()
    assert met.code == 2 and time.monotonic() - began < 60
    assert re.search(r"^vir-launch: 10\.77\.0\.99 does not answer ssh \(.+\); mend it, or leave it out of ", met.said)
    assert "node-a does not" not in met.said and "Traceback" not in met.said
    assert met.left == {} and not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named(nodes, start, shards, tmp_path):
    hold = "import socket, time; held = socket.create_server(('', 28500)); print('taken', flush=True); time.sleep(1000)"
    holder = nodes.launch("node-a", [sys.executable, "-c", hold], tmp_path / "holder")
    until = time.monotonic() + 60
    while "taken" not in (tmp_path / "holder").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    (of_holder,) = nodes.processes("node-a")
    script = start("node-b", tmp_path / "run", arguments(shards, tmp_path / "run"),
                   options=["--master_port", "28500"])
    code = script.process.wait(timeout=HANGS)
    with suppress(psutil.Error):
        of_holder.kill()
    holder.wait(timeout=60)
    met = script.end()
    assert code == 2, met.said[-6000:]
    assert "cannot serve on port 28500, which another process has" in met.said
    assert met.left == {}


def test_a_node_with_other_code_is_refused_by_name(nodes, start, shards, tmp_path):
    code, other = ROOT / "vir" / "recipes" / "quickstart.yaml", tmp_path / "other.yaml"
    other.write_text(code.read_text() + "# another version\n")
    assert nodes.says("node-b", f"mount --bind '{other}' '{code}' && echo done") == "done"
    met = start("node-a", tmp_path / "run", arguments(shards, tmp_path / "run")).end()
    assert met.code == 2, met.said[-6000:]
    assert re.search(r"the code of vir is not the same on all hosts: its digest is \w+ on node-b, but \w+ on node-a; "
                     "check out the same version", met.said)
    assert met.left == {} and not (tmp_path / "run").exists()
