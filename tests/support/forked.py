"""Python programs that start in no time: forked from a process that has imported what they need, and is nothing else.

They are real processes, each in a session of its own; it alone has imports to wait for, and they take none apart at
their end. What its interpreter drew at its start, such as the order of sets, all programs of one Imported share.

usage of this module: python -m support.forked MODULE ...   (what to import; see Imported)
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Sequence, TextIO

from support.launchers import HANGS, ROOT, free_port, remove_shared_memory

TRAINING = ("vir.flags", "vir.training.prepare", "vir.training.run", "deepspeed", "matplotlib.figure", "tensorboard")
"""What a process of vir.train imports, but for that module itself."""


class Imported:
    """A process that has imported these modules, and the programs forked from it; it ends with the block.

    Args:
        environment: in which they are imported. A program's own comes later: only what is read then can differ.
    """

    def __init__(self, modules: Sequence[str] = TRAINING, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.forked", *modules], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True, env={
                **os.environ, "OMP_NUM_THREADS": "1", **environment,
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))})

    def __enter__(self) -> "Imported":
        return self

    def __exit__(self, *error) -> None:
        self._process.communicate(timeout=30)  # it ends when there is nothing more to read

    def ask(self, **request) -> int | None:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, program: Sequence[str], log: Path, environment: dict[str, str]) -> "Forked":
        """Args:
            program: the words after `python`, which begin with -m MODULE, -c CODE or a file.
        """
        return Forked(self, self.ask(program=list(map(str, program)), log=str(log), environment=environment))


class Forked:
    """Such a program, with what is needed of subprocess.Popen."""

    def __init__(self, imported: Imported, pid: int):
        self._imported, self.pid, self.returncode = imported, pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._imported.ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def of_this_session() -> Imported:
    """One for all tests; it ends with pytest."""
    imported = Imported()
    atexit.register(imported.__exit__)
    return imported


def forked(*program, ranks: int = 2, nodes: int = 1) -> subprocess.CompletedProcess:
    """As `torchrun --nnodes NODES --nproc_per_node RANKS/NODES PROGRAM`: the first rank that fails ends all."""
    port = free_port()
    everyone = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks // nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = [of_this_session().start(program, log, {
            **everyone, "RANK": str(rank), "LOCAL_RANK": str(rank % (ranks // nodes))})
                     for rank, log in enumerate(logs)]
        until = time.monotonic() + HANGS
        try:
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                assert time.monotonic() < until, f"{program} took over {HANGS} s"
                time.sleep(0.02)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            said = "".join(log.read_text(errors="replace") for log in logs)
            remove_shared_memory(port)
    return subprocess.CompletedProcess(program, next(filter(None, codes), 0), stdout=said)


def serve(answers: TextIO) -> list[str]:
    """Answers requests until there are no more, and then ends; only in a forked process it returns: its program."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            here, there = os.pipe()
            if not (answer := os.fork()):
                answers.close()
                become(Path(request["log"]), request["environment"])
                os.close(here)
                os.close(there)
                return request["program"]
            os.close(there)
            os.read(here, 1)  # until it is closed there: who started it finds its session and its log
            os.close(here)
        print(json.dumps(answer), file=answers, flush=True)
    sys.exit()


def become(log: Path, environment: dict[str, str]) -> None:
    """Leave behind what is the server's: its session, its streams, its variables."""
    os.setsid()
    for descriptor, path in ((0, Path(os.devnull)), (1, log)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)


def run(program: list[str]) -> None:
    """As `python PROGRAM` does."""
    if program[0] == "-c":
        sys.argv = ["-c", *program[2:]]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(program[1], vars(sys.modules["__main__"]))
    elif program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


def end(code: int) -> None:
    """As an interpreter does, but without taking apart all that was imported, which takes over a second. What crashes
    there is seen by the tests that start launchers."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        sys.exit(code)  # which waits for them
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some modules print when they are imported
    for module in sys.argv[1:]:
        import_module(module)
    gc.freeze()  # or a collection in a fork copies the pages of all that was imported
    try:
        run(serve(answers))
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        end(ended.code or 0)
    end(0)
