"""Ranks as srun starts them, without a launcher that would end the others, and what can be done to them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from support.launchers import HANGS, ROOT, free_port
from vir.reports.metrics import read_metrics
from vir.run_folder import CHECKPOINTS, METRICS

GONE_WITHIN = 75
"""Seconds: what is promised for everything of a run after a fault."""


class Ranks:
    """Two processes of vir.train with the variables of a SLURM step; all of it is gone when the block ends."""

    def __init__(self, arguments: list[str], run: Path, logs: Path, **environment: str):
        self.run, self.began, port = run, time.time(), free_port()
        self.logs = [logs.with_name(f"{logs.name}-rank{rank}.txt") for rank in range(2)]
        slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
                 "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "MASTER_PORT": port}
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("w") as file:
                self.processes.append(subprocess.Popen(
                    [sys.executable, "-m", "vir.train", *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                    start_new_session=True, env={
                        **os.environ, **slurm, "SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{rank}",
                        "OMP_NUM_THREADS": "1", **environment}))
        self._buffers = f"deepspeed_allreduce_buffer_*_{port}_*"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait(timeout=30)
        for buffer in Path("/dev/shm").glob(self._buffers):  # DeepSpeed leaves 69 MB per rank and port behind
            buffer.unlink(missing_ok=True)

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")

    def wait_until(self, holds, what: str):
        until = time.monotonic() + HANGS
        while not holds():
            codes = [process.poll() for process in self.processes]
            assert codes == [None, None] and time.monotonic() < until, (
                f"waiting for {what}, exit codes {codes}\n{self.said(0)[-3000:]}\n{self.said(1)[-3000:]}")
            time.sleep(0.005)

    def steps(self) -> list[int]:
        """Numbers of the steps that this start has done."""
        if not (self.run / METRICS).is_file():
            return []
        return [event["step"] for event in read_metrics(self.run)
                if event["kind"] == "train" and event["time"] > self.began]

    def wait_for_steps(self, count: int = 2):
        self.wait_until(lambda: len(self.steps()) >= count, f"{count} steps")

    def wait_for_a_save(self):
        self.wait_until(lambda: any(path.stat().st_mtime > self.began
                                    for path in (self.run / CHECKPOINTS).glob("*[0-9].part")), "a save")

    def workers(self, rank: int) -> list[psutil.Process]:
        """Loader processes of a rank, in their order."""
        return sorted(psutil.Process(self.processes[rank].pid).children(), key=lambda child: child.pid)

    def everything(self) -> list[int]:
        """All that still runs of the ranks' sessions; zombies, which wait for their parent alone, do not."""
        sessions, running = {process.pid for process in self.processes}, []
        for process in psutil.process_iter(["pid", "status"]):
            try:
                if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process.pid)
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass
        return running

    def seconds_until_gone(self) -> float:
        began = time.monotonic()
        while self.everything():
            for process in self.processes:
                process.poll()
            assert time.monotonic() - began < 2 * GONE_WITHIN, (
                f"{self.everything()} still run\n{self.said(0)[-3000:]}\n{self.said(1)[-3000:]}")
            time.sleep(0.05)
        return time.monotonic() - began

    def codes(self) -> list[int]:
        return [process.wait(timeout=HANGS) for process in self.processes]
