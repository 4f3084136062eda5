"""Two ranks of vir.train, under a launcher or as srun starts them, and what can be done to them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from support.forked import Imported
from support.launchers import DEEPSPEED, HANGS, ROOT, TORCHRUN, free_port, remove_shared_memory
from support.tiny_runs import steps_done
from vir.run_folder import CHECKPOINTS

GONE_WITHIN = 75
"""Seconds: what is promised for everything of a run after a fault."""


def members(session: int) -> list[int]:
    """Processes of a session that still run; zombies, which wait for their parent alone, are none."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # ended meanwhile
            continue
        if int(of_session) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    """The ranks that a launcher has started, in their order: the launcher alone gives them their number."""
    ranks = {}
    for child in launcher.children(recursive=True):
        try:
            number, of_parent = (process.environ().get("LOCAL_RANK") for process in (child, child.parent()))
        except (psutil.NoSuchProcess, AttributeError):  # ended meanwhile
            continue
        if number is not None and of_parent is None:
            ranks[number] = child
    return [ranks[number] for number in sorted(ranks)]


def kill_all(processes, port: str) -> None:
    """SIGKILL to the process groups of these, and what ranks that met at the port have left in shared memory."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(timeout=30)
    remove_shared_memory(port)


class Ranks:
    """Two ranks and all that belongs to them; gone when the block ends.

    Args:
        launcher: torchrun, deepspeed, or srun: then each rank is a process of this one with the variables of a SLURM
            step, and no launcher ends the others when one does.
        program: what python runs there.
        imported: what the ranks of srun are forked from, to spare their imports; without it each imports by itself.
    """

    def __init__(self, arguments: list[str], run: Path, log: Path, launcher: str = "srun", program=("-m", "vir.train"),
                 imported: Imported | None = None, **environment: str):
        self._imported = imported if launcher == "srun" else None
        self.run, self.began, self.launcher, port = run, time.time(), launcher, free_port()
        # Without what a run of one process within pytest has left there: it would make each rank one of its own.
        own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self._environment = {**own, "OMP_NUM_THREADS": "1", **environment}
        self._port = port
        self.logs, self.processes = [], []
        if launcher == "torchrun":
            self._start(log, [*TORCHRUN, "--nproc_per_node", "2", "--master_port", port, "-m", "vir.train", *arguments])
        elif launcher == "deepspeed":
            self._start(log, [*DEEPSPEED, "--num_accelerators", "2", "--master_port", port, "--module", "vir.train",
                              *arguments])
        else:
            for rank in "01":
                self._start(log.with_name(f"{log.name}-rank{rank}"), [sys.executable, *program, *arguments], {
                    "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": "2",
                    "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2",
                    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "MASTER_PORT": port})

    def _start(self, log: Path, command: list, environment: dict[str, str] = {}):
        self.logs.append(log.with_name(f"{log.name}.txt"))
        if self._imported:
            self.processes.append(self._imported.start(command[1:], self.logs[-1], self._environment | environment))
            return
        with self.logs[-1].open("w") as file:
            self.processes.append(subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, env=self._environment | environment))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        kill_all(self.processes, self._port)

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")

    def _tails(self) -> str:
        return "\n".join(self.said(rank)[-3000:] for rank in range(len(self.logs)))

    def ask_to_stop(self, number=signal.SIGTERM):
        """A signal as a batch system sends it: to torchrun, which passes it on; deepspeed does not, so to the ranks."""
        asked = [psutil.Process(process.pid) for process in self.processes]
        if self.launcher == "deepspeed":
            asked = ranks_of(asked[0])
            assert len(asked) == 2
        for process in asked:
            process.send_signal(number)

    def wait_until(self, holds, what: str):
        until = time.monotonic() + HANGS
        while not holds():
            codes = [process.poll() for process in self.processes]
            assert not any(code is not None for code in codes) and time.monotonic() < until, (
                f"waiting for {what}, exit codes {codes}\n{self._tails()}")
            time.sleep(0.02)

    def steps(self) -> list[int]:
        """Numbers of the steps that this start has done."""
        return steps_done(self.run, self.began)

    def wait_for_steps(self, count: int = 2):
        self.wait_until(lambda: len(self.steps()) >= count, f"{count} steps")

    def wait_for_a_save(self):
        self.wait_until(lambda: any(path.stat().st_mtime > self.began
                                    for path in (self.run / CHECKPOINTS).glob("*[0-9].part")), "a save")

    def workers(self, rank: int) -> list[psutil.Process]:
        """Loader processes of a rank, in their order."""
        return sorted(psutil.Process(self.processes[rank].pid).children(), key=lambda child: child.pid)

    def everything(self) -> list[int]:
        """All that still runs of the ranks and their launcher."""
        return [member for process in self.processes for member in members(process.pid)]

    def seconds_until_gone(self) -> float:
        began = time.monotonic()
        while self.everything():
            for process in self.processes:
                process.poll()
            assert time.monotonic() - began < 2 * GONE_WITHIN, (
                f"{self.everything()} still run\n{self._tails()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def codes(self) -> list[int]:
        return [process.wait(timeout=HANGS) for process in self.processes]
