"""Show that a training run loses nothing when it is killed.

    python tests/kill_and_resume.py --shards SHARDS --kills 10

One run under the deepspeed launcher, on two ranks, goes through undisturbed. The same command, into another folder, is
killed again and again with SIGKILL (at random steps, while a checkpoint is copied, written or published, during
start-up) and started again. A kill is of all its processes, of one rank or of one loader process, after which the
others must be gone within 75 s; or a rank is stopped for a moment, must go on, and then all is killed. At the end every
weight, its average and every step's line of metrics must be the same in both, bit for bit. Checkpoints are written
beside training, as is the default; with --synchronous the killed run waits for them.
Exit codes: 0 all is equal, 1 something differs or did not end, 2 wrong arguments.

SHARDS/train and SHARDS/val are what tools/convert_imagenet.py writes. With --killed-shards URL the killed run streams
the same shards from a server, e.g. s3://bucket/shards, with --cache through a cache of --cache-bytes. Works on Linux:
it reads /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Callable

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.faults import GONE_WITHIN, members, ranks_of
from support.launchers import DEEPSPEED, ROOT, TINY, free_port, remove_shared_memory
from vir.checkpoints.consolidate import consolidate
from vir.checkpoints.info import DESCRIPTION, read_info
from vir.checkpoints.names import newest
from vir.checkpoints.store import REMOVED, select
from vir.data.shards import read_index
from vir.errors import VirError
from vir.reports.metrics import read_metrics
from vir.run_folder import CHECKPOINTS, METRICS

RANKS, BATCH, MICRO = 2, 16, 4  # two micro-batches per rank and step
CHECKPOINT_EVERY = 6
STEPS_PER_KILL = 30
RESERVE = 14  # steps kept for each kill to come: CHECKPOINT_EVERY, and what passes before the signal arrives
SAVE_SECONDS = 0.08  # a kill within a save comes at most so long after its phase is seen; saves took 0.0 to 0.3 s
WAIT_SECONDS = 180  # for anything that took 12 to 41 s until the first step, on idle and on busy cores
COMPARED = ("step", "samples_seen", "loss", "lr", "grad_norm", "updates")
RANK_TIMEOUT = 10  # seconds; a rank that is stopped is continued after half of it at the most
ALL, RANK, WORKER, PAUSE = "all", "one rank", "one loader process", "all, after a pause of one rank"
COPY, WRITE, PUBLISH = "while a save is copied", "while it is written", "while it is published"
IN_SAVE = (COPY, WRITE, PUBLISH)  # hashed it is while it is written
START_UP, BETWEEN_SAVES = "during start-up", "between saves"


class Trouble(Exception):
    """The experiment could not be carried out, or a start did not do what it must."""


def training_command(shards: str, samples: int, deepspeed_config: Path, steps: int, output: Path, port: str
                     ) -> list[str]:
    """The launcher and a run of so many short steps with every kind of randomness on."""
    per_step = BATCH / samples
    return [*DEEPSPEED, "--num_accelerators", str(RANKS), "--master_port",
            port, "--module", "vir.train", *TINY, "--data.train", f"{shards}/train", "--data.val", f"{shards}/val",
            "--data.window", "65", "--output", str(output), "--deepspeed_config", str(deepspeed_config),
            "--model.drop_path_rate", "0.1", "--train.epochs", str(steps * per_step),
            "--train.global_batch_size", str(BATCH), "--train.micro_batch_size", str(MICRO), "--train.log_every", "1",
            "--schedule.warmup_epochs", "1", "--optim.lr", "1e-3", "--augment.scale", "[0.5, 1.0]",
            "--augment.auto_augment", "rand-m9-mstd0.5-inc1", "--augment.mixup", "0.8", "--augment.cutmix", "1.0",
            "--augment.mixup_prob", "0.5", "--augment.reprob", "0.25", "--ema.decay", "0.99",
            "--eval.every_epochs", "1000", "--checkpoint.every_steps", str(CHECKPOINT_EVERY),
            "--checkpoint.keep", "2", "--train.rank_timeout", str(RANK_TIMEOUT)]


class Start:
    """One start of a run: the launcher and all its processes, which are gone when the block ends."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        self.began = time.time()
        with log.open("w") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
                                             stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole process group; returns when no process of it is left.

        Raises:
            Trouble: some process has outlived it for 30 s.
        """
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(timeout=30)
        until = time.monotonic() + 30
        while left := members(self._process.pid):
            if time.monotonic() > until:
                raise Trouble(f"processes {left} have outlived SIGKILL to their group")
            time.sleep(0.01)

    def victim(self, kind: str, draw: random.Random) -> psutil.Process | None:
        """A rank or a loader process, to be killed later: it takes a while to find one. None: nothing has started yet.
        """
        ranks = ranks_of(psutil.Process(self._process.pid))
        workers = [child for rank in ranks for child in rank.children()] if kind == WORKER else []
        return draw.choice(workers or ranks) if ranks else None

    def kill_one(self, victim: psutil.Process) -> None:
        """SIGKILL to this process alone; returns when all others are gone, too.

        Raises:
            Trouble: some process has outlived it for longer than is promised.
        """
        victim.kill()
        until = time.monotonic() + GONE_WITHIN
        while left := members(self._process.pid):
            self._process.poll()
            if time.monotonic() > until:
                raise Trouble(f"processes {left} have outlived {victim.pid} for {GONE_WITHIN} s:\n{self._tail()}")
            time.sleep(0.05)
        if self._process.wait(timeout=30) == 0:
            raise Trouble(f"the launcher ended with exit code 0 after {victim.pid} was killed:\n{self._tail()}")

    def pause(self, draw: random.Random) -> None:
        """Stop one rank for a moment, less than that after which the others give it up."""
        if ranks := ranks_of(psutil.Process(self._process.pid)):
            paused = draw.choice(ranks)
            paused.suspend()
            time.sleep(draw.uniform(0.2, RANK_TIMEOUT / 2))
            paused.resume()

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Poll until `holds`.

        Raises:
            Trouble: it took over WAIT_SECONDS, or the run ended before.
        """
        until = time.monotonic() + WAIT_SECONDS
        while not holds():
            code = self._process.poll()
            if code is not None or time.monotonic() > until:
                how = f"took over {WAIT_SECONDS} s" if code is None else f"the run ended before, with exit code {code}"
                raise Trouble(f"waiting for {what}: {how}. The end of its output:\n{self._tail()}")
            time.sleep(0.003)

    def sleep(self, seconds: float, unless: Callable[[], bool] = lambda: False) -> None:
        until = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() >= until or unless(), f"{seconds:.1f} s to pass")

    def finish(self) -> None:
        """Let the run go to its end.

        Raises:
            Trouble: it took over 2 x WAIT_SECONDS, failed, or left a process behind.
        """
        try:
            code = self._process.wait(timeout=2 * WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Trouble(f"the run did not end in {2 * WAIT_SECONDS} s:\n{self._tail()}") from None
        if code:
            raise Trouble(f"the run ended with exit code {code}:\n{self._tail()}")
        if left := members(self._process.pid):
            raise Trouble(f"the run ended and left processes {left} behind")

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def events_since(run: Path, moment: float) -> list[dict[str, Any]]:
    """The steps' lines of metrics that were written after a moment in seconds since 1970."""
    if not (run / METRICS).is_file():
        return []
    return [event for event in read_metrics(run) if event["kind"] == "train" and event["time"] > moment]


def parts_since(run: Path, moment: float) -> list[Path]:
    """Checkpoints being written, without those that an earlier kill left."""
    found = []
    for path in (run / CHECKPOINTS).glob("step-????????.part"):
        try:
            if path.stat().st_mtime > moment:
                found.append(path)
        except FileNotFoundError:  # it got its name meanwhile
            pass
    return found


def files_of(part: Path) -> set[str]:
    """Names of the files that were begun of a checkpoint; none where it got its name meanwhile."""
    try:
        return {path.name for path in part.iterdir()}
    except FileNotFoundError:
        return set()


def is_in(phase: str, run: Path, moment: float) -> bool:
    """Whether a checkpoint of this start is seen in a phase, or in a later one, which may be too short to be seen."""
    parts = [files_of(part) for part in parts_since(run, moment)]
    if phase == COPY:
        return bool(parts)
    if phase == WRITE:
        return any(parts)
    described = any(DESCRIPTION in files for files in parts)
    return described or (folder := newest(run)) is not None and (folder / DESCRIPTION).stat().st_mtime > moment


def saved_step(run: Path) -> int:
    """Step of the checkpoint that the next start must continue from, after checking that it is whole; 0: none.

    That is what `latest` names, or, where a kill came before it was first written, the one that it was to name.
    """
    selected = select(run)
    return 0 if selected is None else selected[1].step


def phase_of(run: Path, began: float) -> tuple[str, str]:
    """In which phase a start was killed, from what it has left, and the details of it."""
    if parts := parts_since(run, began):
        files = files_of(parts[0])
        begun = f"in the save of {parts[0].stem}, {len(files)} file{'' if len(files) == 1 else 's'} begun"
        return (PUBLISH if DESCRIPTION in files else WRITE if files else COPY), begun
    named = max((path.name for path in (run / CHECKPOINTS).glob("step-????????")), default="")
    if named > (folder.name if (folder := newest(run)) else ""):
        return PUBLISH, f"in the save of {named}, whole but not yet named by latest"
    if any(path.stat().st_mtime > began for path in (run / CHECKPOINTS).glob("*" + REMOVED)):
        return PUBLISH, f"after the save of {named}, an old one half removed"
    return (BETWEEN_SAVES, BETWEEN_SAVES) if events_since(run, began) else (START_UP, START_UP)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What one kill met."""

    number: int
    step: int
    """The last step in metrics.jsonl."""
    phase: str
    details: str
    kind: str
    """What was killed."""
    saved: int
    """Step of the newest complete checkpoint that it left."""

    def line(self, kills: int, continued: int | None) -> str:
        """For print. `continued`: the step after which the next start went on; None: killed before it could."""
        then = (f"next start continued after step {continued}" if continued is not None else
                f"next start was killed before its first step, which was to follow step {self.saved}")
        return f"kill {self.number} of {kills}: at step {self.step}, {self.details}, of {self.kind}; {then}"


def draw_moments(kills: int, draw: random.Random) -> list[tuple[str, str]]:
    """Phase and kind of each kill: half are within a save (at least one), in each phase in turn, one in ten during
    start-up, the rest anywhere. Those within a save are of ranks: after others a run saves on."""
    in_save, start_up = max(1, round(kills / 2)), round(kills / 10)
    phases = [*islice(cycle(draw.sample(IN_SAVE, len(IN_SAVE))), in_save)] + [START_UP] * start_up
    phases += [BETWEEN_SAVES] * (kills - len(phases))
    of_ranks, others = cycle(draw.sample((ALL, RANK), 2)), cycle((WORKER, PAUSE, ALL, RANK))
    moments = [(phase, next(of_ranks if phase in IN_SAVE else others)) for phase in phases]
    draw.shuffle(moments)
    return moments


def draw_steps(remaining: int, kills: int, draw: random.Random) -> int:
    """Further steps until the next of so many kills: they spread over the run, and it does not end before them."""
    return draw.randint(1, max(1, min(2 * remaining // (kills + 1), remaining - kills * RESERVE)))


def kill_once(start: Start, run: Path, phase: str, kind: str, steps: int, start_up_seconds: float,
              draw: random.Random) -> None:
    """Wait for a moment of that phase, `steps` after the step that this start continues from, and kill.

    A start-up that is over sooner than those before it, as where they compiled, is killed at its first step.
    """
    if phase == START_UP:
        start.sleep(draw.uniform(0, start_up_seconds), unless=lambda: bool(events_since(run, start.began)))
        victim = start.victim(kind, draw)
    else:
        until = saved_step(run) + steps
        start.wait_until(lambda: any(event["step"] >= until for event in events_since(run, start.began)),
                         f"step {until}")
        victim = start.victim(kind, draw)
        if phase in IN_SAVE:
            since = time.time()
            start.wait_until(lambda: is_in(phase, run, since), f"a kill {phase}")
        start.sleep(0 if phase in (COPY, PUBLISH) else draw.uniform(0, SAVE_SECONDS))
    if kind in (RANK, WORKER) and victim is not None:
        start.kill_one(victim)
        return
    if kind == PAUSE:
        start.pause(draw)
        if made := events_since(run, start.began):
            start.wait_until(lambda: events_since(run, start.began)[-1]["step"] > made[-1]["step"], "a further step")
    start.kill()


def interrupted_run(command: list[str], run: Path, total: int, kills: int, start_up_seconds: float,
                    draw: random.Random) -> Counter[str]:
    """Start, kill, start the same again … and let the last start finish; how many kills met each phase and kind.

    Raises:
        Trouble: a start did not continue from the newest complete checkpoint, or the run ended or hung too early.
        VirError: a kill has left a run folder that cannot be continued.
    """
    met: list[Kill] = []
    moments = draw_moments(kills, draw)
    for number in range(1, kills + 2):
        saved = saved_step(run)
        with Start(command, run.with_name(f"{run.name}-start-{number:02d}.txt")) as start:
            if number <= kills:
                steps = draw_steps(total - saved, kills + 1 - number, draw)
                kill_once(start, run, *moments[number - 1], steps, start_up_seconds, draw)
            else:
                start.finish()
        made = events_since(run, start.began)
        continued = made[0]["step"] - 1 if made else None
        if made:
            start_up_seconds = min(start_up_seconds, made[0]["time"] - start.began)
        if met:
            print(met[-1].line(kills, continued), flush=True)
        if continued is not None and continued != saved:
            raise Trouble(f"start {number} continued after step {continued}, the newest checkpoint was of {saved}")
        if number <= kills:
            events = read_metrics(run) if (run / METRICS).is_file() else []
            phase, details = phase_of(run, start.began)
            met.append(Kill(number=number, step=events[-1]["step"] if events else 0, phase=phase, details=details,
                            kind=moments[number - 1][1], saved=saved_step(run)))
    return Counter(phase for kill in met for phase in (kill.phase, f"of {kill.kind}"))


def train_events(run: Path) -> list[dict[str, Any]]:
    return [{key: event[key] for key in COMPARED} for event in read_metrics(run) if event["kind"] == "train"]


def weights(run: Path, ema: bool) -> dict[str, Tensor]:
    """Consolidated weights of a run's newest checkpoint, or their average, by name."""
    with tempfile.TemporaryDirectory(dir=run.parent) as folder:
        consolidate(run, Path(folder) / "weights.safetensors", ema=ema)
        return {name: tensor.clone() for name, tensor in load_file(Path(folder) / "weights.safetensors").items()}


def event_differences(expected: list[dict[str, Any]], found: list[dict[str, Any]], last_step: int) -> list[str]:
    """What differs between the train events of two runs; each step up to the last must stand once, in order."""
    said = [f"{which} run: the steps in {METRICS} are not each of 1 to {last_step} once"
            for which, events in (("uninterrupted", expected), ("killed", found))
            if [event["step"] for event in events] != list(range(1, last_step + 1))]
    for one, other in zip(expected, found):
        said += [f"{METRICS}, step {one['step']}: {key} {one[key]!r} in the uninterrupted run, {other[key]!r} in the "
                 "killed one" for key in COMPARED if one[key] != other[key]]
    return said


def tensor_differences(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> list[str]:
    """Tensors that are not the same in both, bit for bit."""
    said = [f"{what}: {name} is in one run alone" for name in sorted(expected.keys() ^ found.keys())]
    for name in sorted(expected.keys() & found.keys()):
        one, other = expected[name], found[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            said.append(f"{what}: {name} is {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}")
        elif not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            distance = (one.double() - other.double()).abs()
            said.append(f"{what}: {int((distance != 0).sum())} of {one.numel()} numbers of {name} differ, by up to "
                        f"{distance.max().item():.3g}")
    return said


def differences(uninterrupted: Path, killed: Path) -> list[str]:
    """Everything in which two run folders differ that a kill must not change; empty: they are the same run."""
    one, other = (read_info(newest(run)) for run in (uninterrupted, killed))
    said = [f"last checkpoint: {key} {getattr(one, key)} in the uninterrupted run, {getattr(other, key)} in the killed "
            "one" for key in ("step", "samples_seen", "updates") if getattr(one, key) != getattr(other, key)]
    said += event_differences(train_events(uninterrupted), train_events(killed), one.step)
    for ema, what in ((False, "weights"), (True, "EMA")):
        said += tensor_differences(weights(uninterrupted, ema), weights(killed, ema), what)
    return said


def experiment(shards: Path, elsewhere: list[str], deepspeed_config: Path, kills: int, seed: int, folder: Path,
               asynchronous: bool = True) -> bool:
    """Both runs and their comparison, in an empty folder; whether all is equal. Raises as interrupted_run does.

    Args:
        elsewhere: where the killed run finds the shards, and the settings that it needs for that; empty: there, too.
        asynchronous: whether the killed run writes its checkpoints beside training.
    """
    total = STEPS_PER_KILL * kills
    one, other = folder / "uninterrupted", folder / "killed"
    port = free_port()  # one for all: each start also meets what the one before has left in shared memory
    place, *settings = [*elsewhere, "--data.index_dir", str(folder / "indexes")] if elsewhere else [str(shards)]
    settings += ["--checkpoint.asynchronous", str(asynchronous).lower()]
    samples = len(read_index(shards / "train"))
    commands = [training_command(str(shards), samples, deepspeed_config, total, one, port),
                training_command(place, samples, deepspeed_config, total, other, port) + settings]
    try:
        with Start(commands[0], folder / "uninterrupted.txt") as start:
            start.finish()
        first = read_metrics(one)[0]["time"] - start.began
        print(f"uninterrupted: {total} steps in {time.time() - start.began:.0f} s, the first after {first:.0f} s",
              flush=True)
        phases = interrupted_run(commands[1], other, total, kills, first, random.Random(seed))
    finally:
        remove_shared_memory(port)
    told = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
    said = differences(one, other)
    for line in said[:40]:
        print(line)
    if said:
        print(f"NOT EQUAL: {len(said)} differences after {kills} kills ({told}), seed {seed}")
        return False
    print(f"EQUAL: {total} steps and {len(weights(one, ema=False))} tensors, raw and EMA, are the same bit for bit "
          f"after {kills} kills ({told}), seed {seed}")
    return True


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="folder that holds train and val shards")
    parser.add_argument("--kills", type=int, default=10, help="how often the run is killed (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    parser.add_argument("--deepspeed_config", type=Path, default=ROOT / "ds_configs" / "zero2_fp32.json",
                        help="DeepSpeed JSON of both runs (default: ds_configs/zero2_fp32.json)")
    parser.add_argument("--output", type=Path, help="new folder that keeps both runs; a temporary one when not given")
    parser.add_argument("--synchronous", action="store_true",
                        help="the killed run waits for its checkpoints (--checkpoint.asynchronous false)")
    parser.add_argument("--killed-shards", metavar="URL", help="where the killed run finds the shards (default: there)")
    parser.add_argument("--cache", type=Path, help="folder in which the killed run keeps shards of the server")
    parser.add_argument("--cache-bytes", default="200GB", help="the most that it keeps (default: 200GB)")
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error(f"--kills is {args.kills}; it must be at least 1")
    for split in ("train", "val"):
        if not (args.shards / split).is_dir():
            parser.error(f"--shards {args.shards} has no folder {split}; make it with tools/convert_imagenet.py")
    if not args.deepspeed_config.is_file():
        parser.error(f"--deepspeed_config {args.deepspeed_config} is no file; take one of ds_configs/")
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists; give a new folder")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    elsewhere = [args.killed_shards] if args.killed_shards else []
    if elsewhere and args.cache:
        elsewhere += ["--data.cache", str(args.cache), "--data.cache_bytes", args.cache_bytes]
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            equal = experiment(args.shards.resolve(), elsewhere, args.deepspeed_config.resolve(), args.kills,
                               args.seed, folder.resolve(), asynchronous=not args.synchronous)
        except (Trouble, VirError) as error:
            print(error)
            print(f"FAILED before both runs could be compared, seed {args.seed}")
            return 1
    return 0 if equal else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the run in hand is killed as well
    sys.exit(main())
