"""Slurm: the ranks of a job, by srun or by one torchrun on each node; a stopped job goes back into the queue.

Slurm signals the ranks of a job that it preempts, and the script alone before a time limit. It does not put a job back
that heeds the signal and ends in time; this does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, Sequence

from vir import launcher
from vir.cluster.supervisor import Start, say
from vir.errors import EXIT_STOPPED_BY_SIGNAL, SettingsError
from vir.status import Status

_TASK = "%a"
"""In a word of an array's command: the number of the task, as in sbatch's own --output."""
_OF_SLURM = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm stops a run by; a person does it by Ctrl-C or a file STOP."""
_STARTS_WITHIN_S = 60.0
"""A step that has to do nothing."""
_ANSWERS_WITHIN_S = 30.0
"""The controller; Slurm's own commands give it 10 s by default."""
_ASKS_FOR_S, _ASKS_EVERY_S = 60.0, 2.0
"""How long it is asked for a requeue; it may just be starting again."""
_SILENT = re.compile(r"failed on node (\S+?): (.*)")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--torchrun", action="store_true",
                        help="start one torchrun on each node, which starts the ranks, and not each rank by srun")


def words_of_task(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The words of one task of an array: its number in the place of %a.

    Raises:
        SettingsError: the words would be the same for all tasks.
    """
    task = environment.get("SLURM_ARRAY_TASK_ID")
    if task is not None and not any(_TASK in word for word in words):
        raise SettingsError(f"task {task} of this array would train in the folder of all others; give each its own, "
                            f"e.g. --output runs/seed-{_TASK} --train.seed {_TASK}, where {_TASK} becomes its number")
    return [word.replace(_TASK, task) for word in words] if task is not None else list(words)


class SlurmLaunch:
    """A launch within a job.

    Args:
        args: what `add_options` has read.
        words: options of vir.train.
    """

    def __init__(self, args: Namespace, words: list[str]) -> None:
        self._args, self._words = args, words
        if not args.print and "SLURM_JOB_ID" not in os.environ:
            raise SettingsError("this is no job of Slurm (SLURM_JOB_ID is not set); hand it in by "
                                "sbatch launch/slurm.sbatch, or see the command by --print")
        self.max_restarts, self.passes_codes_on = args.max_restarts, not args.torchrun
        self._has_started = False

    def unreachable(self) -> dict[str, str]:
        """Nodes that start no task, after a start; Slurm itself has just seen to those of a new job."""
        if not self._has_started:
            return {}
        try:
            done = _run(["srun", "--overlap", *_of_nodes(os.environ), "true"], _STARTS_WITHIN_S)
        except subprocess.TimeoutExpired:
            return {"a node of the job": f"no answer within {_STARTS_WITHIN_S:.0f} s"}
        if done.returncode == 0:
            return {}
        return dict(_SILENT.findall(done.stderr)) or {"a node of the job": done.stderr.strip()}

    def ended(self, found: Status) -> None:
        """Put the job back into the queue where Slurm has stopped its run. Never raises: the run has saved."""
        if was_stopped_by_slurm(found):
            _requeue(name_of_job(os.environ))

    @contextmanager
    def start(self, name: str, file: Path) -> Iterator[Start]:
        """How to start the ranks of the job."""
        count = os.environ.get("SLURM_RESTART_COUNT", "0")
        if count != "0" and not self._has_started:
            say(f"job {name_of_job(os.environ)} was put back into the queue {count} times")
        self._has_started = True
        command = _by_torchrun(os.environ, name) if self._args.torchrun else _by_srun(os.environ)
        # Each task of srun names its run by its step; under torchrun nobody does.
        environment = {launcher.RUN_ID: name} if self._args.torchrun else {}
        yield Start([*command, "-m", "vir.train", *self._words], environment, Path.cwd())


def _by_srun(environment: Mapping[str, str]) -> list[str]:
    return [*_srun(environment), sys.executable, "-u"]


def _by_torchrun(environment: Mapping[str, str], run_id: str) -> list[str]:
    nodes, ranks = _shape(environment)
    host = launcher.first_host(environment.get("SLURM_JOB_NODELIST", "localhost"))
    port = launcher.port_of(f"{environment.get('SLURM_JOB_ID')}.{run_id}")
    return [*_srun(environment, ranks), *_of_nodes(environment), sys.executable, "-u", "-m", "torch.distributed.run",
            f"--nnodes={nodes}", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", f"--rdzv_endpoint={host}:{port}",
            f"--rdzv_id={run_id}"]


def _srun(environment: Mapping[str, str], tasks_in_one: int = 1) -> list[str]:
    """srun inherits the shape of the job, but no --cpus-per-task, and no environment after `sbatch --export=NONE`."""
    cpus = environment.get("SLURM_CPUS_PER_TASK")
    return ["srun", "--kill-on-bad-exit=1", "--export=ALL",
            *([f"--cpus-per-task={int(cpus) * tasks_in_one}"] if cpus else [])]


def _of_nodes(environment: Mapping[str, str]) -> list[str]:
    """One task on each node, whatever the job says."""
    nodes, _ = _shape(environment)
    return [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]


def _shape(environment: Mapping[str, str]) -> tuple[int, int]:
    """Nodes of the job, and tasks on each."""
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    tasks = environment.get("SLURM_TASKS_PER_NODE", "1")
    if (found := re.fullmatch(r"(\d+)(?:\(x\d+\))?", tasks)) is None:
        raise SettingsError(f"the job has {tasks} tasks on its nodes; --torchrun needs as many on each, e.g. "
                            "--ntasks-per-node 8")
    return nodes, int(found[1])


def was_stopped_by_slurm(found: Status) -> bool:
    return found.code == EXIT_STOPPED_BY_SIGNAL and found.cause in _OF_SLURM


def name_of_job(environment: Mapping[str, str]) -> str:
    """Of a task of an array 7_3: its own number may be that of the array, which names all tasks."""
    if task := environment.get("SLURM_ARRAY_TASK_ID"):
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{task}"
    return environment["SLURM_JOB_ID"]


def _requeue(job: str) -> None:
    """Put this job back into the queue, unless Slurm itself is ending it."""
    until = time.monotonic() + _ASKS_FOR_S
    while True:
        asked = _answer(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
        state = asked.stdout.strip()
        if asked.returncode == 0 and state != "RUNNING":  # cancelled or put back, or over its time limit
            say(f"job {job} is {state or 'gone'}: it is left to Slurm")
            return
        done = _answer(["scontrol", "requeue", job])
        if done.returncode == 0:
            say(f"job {job} goes back into the queue, to go on from what was saved")
            return
        reason = " ".join(done.stderr.split())
        if time.monotonic() > until:
            say(f"job {job} cannot go back into the queue ({reason}); hand the same command in again")
            return
        say(f"job {job} is not back in the queue yet ({reason}); trying again")
        time.sleep(_ASKS_EVERY_S)


def _answer(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Of the controller; a failure as well where there is none, with its reason in stderr."""
    try:
        return _run(command, _ANSWERS_WITHIN_S)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_ANSWERS_WITHIN_S:.0f} s"
    except OSError as error:
        reason = f"{command[0]}: {error.strerror}"
    return subprocess.CompletedProcess(command, 1, "", reason)


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    # In a session of its own: a signal to the job's script is not for it.
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout,
                          start_new_session=True)
