"""Where the tasks of a conversion run: in processes of this machine, on a dask cluster or in Slurm jobs.

Whatever runs them, a task is one call of a function that its processes can import, with an argument that can be
pickled. Tasks must bear to be run twice, and twice at a time: dask runs those of a lost worker again, and neither dask
nor Slurm ends at once what was cancelled.
"""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import threading
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import forkserver
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Generator, Iterator, NamedTuple, Sequence, TypeVar
from urllib.parse import urlsplit

from vir.errors import SettingsError, VirError

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 10.0
"""Seconds that a dask scheduler may take to accept a connection, and again to greet."""
_SLURM_MINUTES = 240
"""The time limit of a Slurm job where SBATCH_TIMELIMIT gives none: submitit's own, 5 minutes, is that of a trial."""
_SLURM_POLL = 1.0
"""Seconds between two looks for the results of Slurm jobs, which are files."""

_MOST_TASKS_PER_JOB = 64
"""Of a Slurm job: all its tasks are in memory while it is handed over."""

_stop: Event | None = None
"""In a worker process of this machine: set when the work is to end."""
_of_thread = threading.local()
"""In a thread of run_threads: `stop`, as that."""


class Stopped(Exception):
    """The work was asked to stop before its end."""


def stopping() -> bool:
    """In a task: whether it should end now, by raising Stopped. Only processes and threads of this machine are told."""
    stop = getattr(_of_thread, "stop", _stop)
    return stop is not None and stop.is_set()


def check_executor(spec: str) -> None:
    """Refuses, in little time, an executor that cannot be used.

    Raises:
        SettingsError: `spec` is neither "local", "dask://HOST:PORT" nor "slurm"; a package or Slurm's commands are not
            installed; no dask scheduler answers there.
    """
    if spec.startswith("dask://"):
        host, port = _parse_address(spec)
        _import_extra("distributed", "dask", spec)
        _greet(host, port, spec)
    elif spec == "slurm":
        _import_extra("submitit", "slurm", spec)
        if missing := [name for name in ("sbatch", "srun", "sacct", "scancel") if not shutil.which(name)]:
            raise SettingsError(f"--executor slurm needs Slurm's {', '.join(missing)}, not found in PATH; run this "
                                "where jobs are submitted, or use --executor local")
    elif spec != "local":
        raise SettingsError(f"--executor must be local, dask://HOST:PORT or slurm, got {spec!r}")


def run_tasks(spec: str, function: Callable[[T], R], tasks: Sequence[T], workers: int,
              stop_asked: Callable[[], bool], job_folder: Path) -> Generator[tuple[int, R], None, None]:
    """Calls `function` with each task; gives (number of the task, result) in the order in which they end.

    At most 2 * workers tasks are handed over at a time; a Slurm job takes the `workers`th part of all tasks, or 64,
    because jobs of seconds only wait in its queue. The caller closes the iterator where it does not read it to its end.

    Args:
        spec: "local", "dask://HOST:PORT" or "slurm".
        stop_asked: asked several times a second.
        job_folder: for Slurm, a folder of its own that all nodes see; made here, and removed when all went well. After
            a failure it keeps the logs that the error names.

    Raises:
        SettingsError: as `check_executor`.
        VirError: what runs the tasks was lost.
        Stopped: `stop_asked` returned True.
        The first exception of a task. Of Slurm jobs only a VirError comes back as such; others are told by a VirError.
    """
    check_executor(spec)
    if spec == "local":
        opened, size = _open_processes(workers, function.__module__), 1
    elif spec == "slurm":
        opened, size = _open_slurm(job_folder), min(-(-len(tasks) // workers), _MOST_TASKS_PER_JOB)
    else:
        opened, size = _open_dask(spec), 1
    return _run(opened, function, tasks, max(1, size), 2 * workers, stop_asked)


def run_threads(function: Callable[[T], R], tasks: Sequence[T], workers: int, stop_asked: Callable[[], bool]
                ) -> Generator[tuple[int, R], None, None]:
    """As run_tasks, by threads of this process: for tasks that mostly wait, and need not be pickled."""
    return _run(_open_threads(workers), function, tasks, 1, 2 * workers, stop_asked)


def _run(opened: AbstractContextManager[Executor], function: Callable[[T], R], tasks: Sequence[T], size: int,
         most: int, stop_asked: Callable[[], bool]) -> Generator[tuple[int, R], None, None]:
    """Hands over `size` tasks at a time, at most `most` times before the first of them has ended."""
    starts = iter(range(0, len(tasks), size))
    running: dict[Future[list[R]], int] = {}
    with opened as executor:
        try:
            while True:
                while len(running) < most and (start := next(starts, None)) is not None:
                    running[executor.submit(_call, function, tasks[start:start + size])] = start
                if not running:
                    return
                if stop_asked():
                    raise Stopped
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    yield from enumerate(future.result(), running.pop(future))
        except BrokenExecutor:
            if stop_asked():  # a signal to the whole process group has ended the workers too
                raise Stopped from None
            raise


def _call(function: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
    return [function(task) for task in tasks]


# ---- processes of this machine


@contextmanager
def _open_processes(workers: int, module: str) -> Iterator[Executor]:
    # forkserver: workers start from a process without threads, which has imported the task's module once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module])
    with _deferred(signal.SIGINT, signal.SIGHUP):  # they would end the server while it imports, and then this process
        stop = context.Event()
        forkserver.ensure_running()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker,
                               initargs=(stop, dict(os.environ)))
    try:
        yield pool
    except BrokenExecutor as error:
        raise VirError("a worker process died, perhaps out of memory; try fewer --workers") from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deferred(*numbers: signal.Signals) -> Iterator[None]:
    """Signals that come in the block come at its end. Processes that it starts do not get them at all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(stop: Event, environment: dict[str, str]) -> None:
    global _stop
    _stop = stop
    # That of the server, from which this process was forked, may be older: credentials can have come since.
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when the main process ends, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


# ---- threads of this process


@contextmanager
def _open_threads(workers: int) -> Iterator[Executor]:
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, "vir-task", _start_thread, (stop,))
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _start_thread(stop: threading.Event) -> None:
    _of_thread.stop = stop


# ---- a dask cluster


@contextmanager
def _open_dask(spec: str) -> Iterator[Executor]:
    distributed = _import_extra("distributed", "dask", spec)
    address = urlsplit(spec).netloc
    try:
        client = distributed.Client(f"tcp://{address}", timeout=_PATIENCE, set_as_default=False)
    except (OSError, distributed.TimeoutError) as error:
        raise SettingsError(f"--executor {spec}: cannot use the dask scheduler there: {error}") from error
    if not client.nthreads():
        logging.getLogger("vir").warning("the dask scheduler at %s has no workers yet; waiting for some", address)
    executor = _DaskExecutor(client.get_executor(pure=False))  # not pure: two equal calls are two
    try:
        yield executor
    except CancelledError as error:
        # Closing breaks off the client's attempts to connect again, which it would log with tracebacks.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        raise VirError(f"lost the dask scheduler at {address}; start it again, then repeat the command") from error
    except distributed.KilledWorker as error:
        raise VirError(f"the dask workers at {address} died, perhaps out of memory: {error}") from error
    except ModuleNotFoundError as error:
        raise VirError(f"a dask worker at {address} cannot import what it is to run ({error}); install vir-at-scale "
                       "of the same version where the workers run") from error
    finally:
        executor.shutdown(wait=False)
        client.close()


class _DaskExecutor(Executor):
    """dask's own executor, whose calls it unpickles only where and when they run.

    Otherwise its scheduler has to import the function too, and a worker that cannot ends without a word.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, function: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        return self._executor.submit(pickle.loads, pickle.dumps(_Call(functools.partial(function, *args, **kwargs))))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancels what was submitted, if not told to wait for it."""
        self._executor.shutdown(wait=wait)


class _Call(NamedTuple):
    """A call that is made by unpickling it: what comes out is its result."""

    make: Callable[[], Any]

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return self.make, ()


def _parse_address(spec: str) -> tuple[str, int]:
    try:
        parts = urlsplit(spec)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or spec != f"dask://{parts.netloc}" or "@" in parts.netloc:
        raise SettingsError(f"--executor must be dask://HOST:PORT, such as dask://node1:8786, got {spec!r}")
    return host, port


def _greet(host: str, port: int, spec: str) -> None:
    """dask's client waits without a bound for the greeting of what listens but is no scheduler."""
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE) as connection:
            greeting = connection.recv(1)
        reason = "it hangs up"
    except (OSError, UnicodeError) as error:  # UnicodeError: a host such as a..b
        greeting, reason = b"", getattr(error, "strerror", None) or str(error)
    if not greeting:
        raise SettingsError(f"--executor {spec}: no dask scheduler answers on host {host}, port {port} ({reason}); "
                            "start one with `dask scheduler`, which prints its address")


# ---- Slurm jobs


@contextmanager
def _open_slurm(folder: Path, cluster: str = "slurm") -> Iterator[Executor]:
    """`cluster` is submitit's word: "local" runs the jobs as processes of this machine."""
    submitit = _import_extra("submitit", "slurm", cluster)
    jobs = submitit.AutoExecutor(folder, cluster=cluster)
    # As an additional parameter: submitit takes a job that ends before the time it knows of as preempted, and would
    # queue it again for ever where SBATCH_TIMELIMIT is shorter.
    jobs.update_parameters(name="vir-convert", slurm_additional_parameters={"time": _SLURM_MINUTES})
    executor = _JobExecutor(jobs)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
    shutil.rmtree(folder, ignore_errors=True)


class _JobExecutor(Executor):
    """submitit's jobs behind the standard interface; one thread looks for their results."""

    def __init__(self, jobs: Any) -> None:
        self._jobs = jobs
        self._running: dict[Future[Any], Any] = {}
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, function: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        try:
            job = self._jobs.submit(_attempt, function, *args, **kwargs)
        except (RuntimeError, OSError) as error:  # submitit's errors are RuntimeErrors
            raise VirError(f"Slurm takes no job of this conversion: {error}") from error
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()
        self._running[future] = job
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancels the jobs that still run; does not wait for their end."""
        self._closing.set()
        self._watcher.join()
        for job in self._running.values():
            job.cancel(check=False)

    def _watch(self) -> None:
        while not self._closing.wait(_SLURM_POLL):
            for future, job in list(self._running.items()):
                if not self._closing.is_set() and self._settle(future, job):
                    del self._running[future]

    def _settle(self, future: Future[Any], job: Any) -> bool:
        """Hands the job's outcome to its future, if the job has ended."""
        try:
            if not job.done():
                return False
            result, error = job.result()
        except Exception as problem:
            result, error = None, VirError(f"Slurm job {job.job_id} failed: {problem}")
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        return True


def _attempt(function: Callable[..., R], *args: Any, **kwargs: Any) -> tuple[R | None, VirError | None]:
    """In a job: submitit brings back exceptions as text alone, but a VirError has its kind, and its exit code."""
    try:
        return function(*args, **kwargs), None
    except VirError as error:
        return None, error


def _import_extra(package: str, extra: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SettingsError(f"--executor {spec} needs the package {package} ({error}); "
                            f"pip install 'vir-at-scale[{extra}]'") from error
