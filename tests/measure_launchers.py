"""How long a run takes to start, to go on, to save after a signal, and to end when a part of it is lost, by launcher.

    python tests/measure_launchers.py --shards SHARDS

Prints a table of docs/launching.md. SHARDS/train and SHARDS/val are what tools/convert_imagenet.py writes. Each run
has two ranks on CPUs and a tiny model, so these are the times of launchers, imports and bounds, not of training. Needs
what the tests of several nodes need (tests/support/nodes.py, tests/support/slurm.py), and a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import psutil

from support.launchers import ACCELERATE, ROOT, free_port
from support.nodes import Nodes
from support.slurm import Slurm
from support.tiny_runs import command, train_events

WITHIN_S = 300


@dataclass
class Launch:
    """A way to start a run.

    Args:
        begin: starts it, with the options of vir.train.
        lose: takes a part of it away; the rest is to end.
        signal: asks it to stop; by default a SIGTERM to what `begin` has started.
    """

    name: str
    begin: Callable[[list[str]], subprocess.Popen]
    lose: Callable[[], None]
    signal: Callable[[subprocess.Popen], None] = field(
        default=lambda process: process.send_signal(signal.SIGTERM))


def wait_until(holds: Callable[[], bool], what: str) -> float:
    """The seconds until then."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > WITHIN_S:
            raise SystemExit(f"no {what} within {WITHIN_S} s")
        time.sleep(0.02)
    return time.monotonic() - began


def first_step(run: Path, since: float) -> bool:
    return (run / "metrics.jsonl").is_file() and any(event["time"] > since for event in train_events(run))


def measure(launch: Launch, shards: Path, run: Path) -> list[float]:
    """Seconds from the command to the first step, the same of a run that goes on, from a signal to the end of all, and
    from a loss to the end of all that is left."""
    words = command(shards, run, "zero2_fp32", steps=20000, every=20000)
    found = []
    for end in (launch.signal, lambda process: launch.lose()):
        since = time.time()
        process = launch.begin(words)
        try:
            found.append(wait_until(lambda: first_step(run, since), f"first step of {launch.name}"))
            time.sleep(3)
            end(process)
            found.append(wait_until(lambda: process.poll() is not None, f"end of {launch.name}"))
        finally:
            if process.poll() is None:  # after an error; the script ends its ranks
                process.terminate()
                process.wait(WITHIN_S)
    started, signalled, resumed, lost = found
    return [started, resumed, signalled, lost]


def kill_a_rank() -> None:
    """That of number 1 on this machine, which any launcher tells its ranks."""
    for process in psutil.process_iter():
        try:
            told = process.environ()
            if "vir.train" in process.cmdline() and (told.get("RANK") or told.get("SLURM_PROCID")) == "1":
                process.kill()
                return
        except psutil.Error:
            continue
    raise SystemExit("no rank 1 was found")


def launches(folder: Path, nodes: Nodes, slurm: Slurm) -> list[Launch]:
    def here(*start: str | Path) -> Callable[[list[str]], subprocess.Popen]:
        def begin(words: list[str]) -> subprocess.Popen:
            log = (folder / f"{time.monotonic_ns()}.txt").open("w")
            return subprocess.Popen([*map(str, start), *words], cwd=ROOT, stdout=log, stderr=log,
                                    start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return begin

    def on_nodes(words: list[str]) -> subprocess.Popen:
        hostfile = nodes.write_hostfile(["node-a", "node-b"])
        return nodes.launch("node-a", ["bash", ROOT / "launch" / "deepspeed.sh", "--hostfile", hostfile, *words],
                            folder / f"{time.monotonic_ns()}.txt", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

    def signal_on_nodes(_: subprocess.Popen) -> None:
        (script,) = nodes.pythons("node-a", "vir.launch")
        script.send_signal(signal.SIGTERM)

    def srun(words: list[str]) -> subprocess.Popen:
        log = (folder / f"{time.monotonic_ns()}.txt").open("w")
        return subprocess.Popen(
            ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "bash", ROOT / "launch" / "slurm.sbatch",
             "--max-restarts", "0", *words], cwd=ROOT, env=slurm.environment, stdout=log, stderr=log,
            start_new_session=True)

    def signal_srun(process: subprocess.Popen) -> None:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "vir.launch" in child.cmdline():
                child.send_signal(signal.SIGINT)  # after SIGTERM it would try a requeue, which salloc refuses

    accelerate = [*ACCELERATE, "--config_file", ROOT / "launch" / "accelerate.yaml", "--num_processes", "2",
                  "--main_process_port", free_port(), "-m", "vir.train"]
    scripts = ROOT / "launch"
    return [
        Launch("`deepspeed.sh`, one machine", here("bash", scripts / "deepspeed.sh", "--num_gpus", "2"), kill_a_rank),
        Launch("`deepspeed.sh`, two nodes", on_nodes, lambda: nodes.cut("node-b"), signal_on_nodes),
        Launch("`torchrun.sh`", here("bash", scripts / "torchrun.sh", "--nproc_per_node", "2"), kill_a_rank),
        Launch("`slurm.sbatch`, two nodes", srun, kill_a_rank, signal_srun),
        Launch("`accelerate launch`", here(*accelerate), kill_a_rank)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--only", default="", help="a part of the names of launchers, e.g. slurm")
    args = parser.parse_args()
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    print("| | starts | goes on | signal to end | lost to end |\n|---|---|---|---|---|", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nodes, slurm = stack.enter_context(Nodes(folder / "nodes", 2)), stack.enter_context(Slurm())
        for number, launch in enumerate(launches(folder, nodes, slurm)):
            if args.only not in launch.name:
                continue
            seconds = measure(launch, args.shards.absolute(), folder / f"run-{number}")
            print(f"| {launch.name} | " + " | ".join(f"{value:.0f} s" for value in seconds) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
