"""Batches: stateless processes make what the order says, every rank gets equal micro-batches, nothing is padded in
training, and validation counts every image once."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Generator, Iterator, NoReturn, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vir import launcher
from vir.config import AugmentConfig
from vir.data import order as orders
from vir.data import ring, worker
from vir.data.batch import Batch, eval_maker, train_maker
from vir.data.exclusion import Exclusion
from vir.data.order import InOrder, SampleOrder
from vir.data.prefetch import prefetcher_of
from vir.data.reader import Reader
from vir.data.transforms import EvalTransform, TrainTransform
from vir.errors import DataError, VirError
from vir.weights.spec import InputSpec

Request = tuple[np.ndarray, np.ndarray]
"""Positions and samples of a micro-batch."""

_EVAL_PREFETCH = 2


class _Requests(Dataset["Batch | VirError"]):
    """Serves requests (positions, samples) through `make`. Errors travel as values: the trainer raises them."""

    def __init__(self, make: Callable[[np.ndarray, np.ndarray], Batch]) -> None:
        self.make = make

    def __getitem__(self, request: Request) -> Batch | VirError:
        try:
            return self.make(*request)
        except VirError as error:
            # Some picklers (tblib, which comes with dask) take along what led to an error, and get lost in it.
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """What is to happen while no batch comes."""

    seconds: float
    """After which, and again after as many, it is told who is waited for."""
    tell: Callable[[str], None]
    give_up: Callable[[], bool]
    """Asked about once a second; when it says yes, None takes the place of the batch, which is not lost."""


_POLL_S = 1
_GRACE_S = 2
"""For the batch in hand, when a loader process is told to end."""


@atexit.register
def _end_workers() -> None:
    """Runs before multiprocessing's own exit hook, which would wait for ever for workers that ignore its SIGTERM."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _kill_all(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()


class Batches:
    """Runs requests through worker processes; an iterator over their batches, in order and on the device.

    The processes start with the first batch that is asked for. Errors of a worker are raised here.

    Args:
        make: from positions and samples to a batch, in a worker.
        requests: called once, for this rank's requests in order.

    Raises:
        DataError: a worker has died; others as `make`.
    """

    def __init__(self, make: Callable[[np.ndarray, np.ndarray], Batch], requests: Callable[[], Iterator[Request]],
                 workers: int, prefetch: int, device: torch.device, patience: Patience | None) -> None:
        self._make, self._requests = make, requests
        self._count, self._prefetch, self._device, self._patience = workers, prefetch, device, patience
        self._reading = worker.board(workers)
        self._served: Any = None
        self._came = 0
        self._batches = self._ahead() if device.type == "cuda" else self._waiting_for_each()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch | None:
        """The next one; None where the patience came to its end before it was there."""
        batch = next(self._batches)
        if isinstance(batch, VirError):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """End the processes. Nothing comes after it."""
        self._batches.close()
        # DataLoader tells them to end, and waits 5 s for each; one that hangs in a read would have all of it.
        end = threading.Timer(_GRACE_S, _kill_all, [getattr(self._served, "_workers", [])])
        end.start()
        self._served = None
        end.cancel()

    def awaited(self) -> str:
        """Who makes the next batch, and which sample that process is waiting for. From any thread."""
        return self._at(self._came % self._count)

    def _at(self, number: int) -> str:
        at = self._reading[number].value.decode(errors="replace")
        return f"loader process {number}" + (f" at {at}" if at else "")

    def _start(self) -> Any:
        _let_threads_settle()
        loader = DataLoader(
            _Requests(self._make), sampler=_Requested(self._requests), batch_size=None, num_workers=self._count,
            prefetch_factor=self._prefetch, worker_init_fn=partial(worker.start, self._reading, os.getpid()),
            pin_memory=self._device.type == "cuda", generator=torch.Generator(), multiprocessing_context="fork",
            timeout=_POLL_S)
        served = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # DataLoader's handler would raise at any instruction of the trainer; who waits finds a dead worker as well.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return served

    def _waiting_for_each(self) -> Generator[Any, None, None]:
        self._served = self._start()
        asked = told = time.monotonic()
        while True:
            try:
                batch = next(self._served)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the latter from the memory that a dead worker shared
                if not str(error).startswith("DataLoader timed out"):
                    self._raise_death_of_a_worker(error)
                if self._patience is None:
                    continue
                if (now := time.monotonic()) - told >= self._patience.seconds:
                    told = now
                    self._patience.tell(f"no batch for {now - asked:.0f} s, waiting for {self.awaited()}; check the "
                                        "disk or the network")
                if self._patience.give_up():
                    yield None
                continue
            self._came += 1
            on_cpu = isinstance(batch, Batch) and self._device.type != "cuda"  # for a GPU it was pinned: copied
            yield batch.kept() if on_cpu else batch
            asked = told = time.monotonic()

    def _raise_death_of_a_worker(self, error: Exception) -> NoReturn:
        """Raise the reason for what DataLoader has met: the end of a worker, or something else."""
        multiprocessing.connection.wait([process.sentinel for process in self._served._workers], timeout=1)
        for number, process in enumerate(self._served._workers):
            process.join(0)
            if process.exitcode:
                how = (f"was killed by {signal.Signals(-process.exitcode).name}" if process.exitcode < 0
                       else f"ended with code {process.exitcode}")
                raise DataError(f"{self._at(number)} {how}; SIGKILL is mostly the system's answer to a lack of memory: "
                                "lower --data.workers or --data.prefetch; SIGSEGV and SIGBUS are a defect of a "
                                "decoder, or of the machine") from error
        raise error

    def _ahead(self) -> Generator[Any, None, None]:
        """Copy each batch to the GPU on a side stream while the one before is being trained on."""
        side = torch.cuda.Stream(self._device)
        waiting: list[tuple[Any, torch.cuda.Event]] = []
        for batch in self._waiting_for_each():
            if batch is None:
                yield None
                continue
            if isinstance(batch, Batch):
                with torch.cuda.stream(side):
                    batch = batch.to(self._device)
            waiting.append((batch, side.record_event()))
            if len(waiting) == 2:
                yield _arrived(*waiting.pop(0))
        for last in waiting:
            yield _arrived(*last)


def _let_threads_settle() -> None:
    """Before a fork, let threads of torch that have just ended a collective leave the interpreter.

    Up to Python 3.11 a child waits for ever in PyOS_AfterFork_Child if at that moment a thread was about to enter the
    interpreter. Seen 2 times in 3,600 forks right after a collective of gloo; never in 4,800 after a pause of 5 ms.
    """
    orders.settle()
    if sys.version_info < (3, 12):
        time.sleep(0.02)


def _arrived(batch: Any, copied: torch.cuda.Event) -> Any:
    """The batch, safe to use on the current stream."""
    here = torch.cuda.current_stream()
    here.wait_event(copied)
    if isinstance(batch, Batch):
        for value in vars(batch).values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(here)  # its memory is not given to the side stream again before it was read here
    return batch


def processes_for(workers: int | None) -> int:
    """Loader processes of a rank: as given, else one per core of its share but for its own, from 1 to 16."""
    return workers or min(16, max(1, launcher.cores() - 1))


def requests_of(order: SampleOrder, step: int, global_batch_size: int, micro_batch_size: int, rank: int,
                world_size: int) -> Iterator[Request]:
    """A rank's micro-batches of a step, from 0."""
    per_rank = global_batch_size // world_size
    mine = order.global_batch(step * global_batch_size, global_batch_size)[rank * per_rank:(rank + 1) * per_rank]
    for first in range(0, per_rank, micro_batch_size):
        positions = mine[first:first + micro_batch_size]
        yield positions, order.samples(positions)


def requests_between(order: SampleOrder, first_step: int, last_step: int, global_batch_size: int,
                     micro_batch_size: int, rank: int, world_size: int) -> Iterator[Request]:
    """A rank's micro-batches of steps [first_step, last_step)."""
    for step in range(first_step, last_step):
        yield from requests_of(order, step, global_batch_size, micro_batch_size, rank, world_size)
        order.prepare((step + 1) * global_batch_size, last_step * global_batch_size)


def train_batches(reader: Reader, order: SampleOrder, augment: AugmentConfig,
                  model_input: InputSpec, *, seed: int, first_step: int, last_step: int,
                  global_batch_size: int, micro_batch_size: int, rank: int, world_size: int, workers: int | None,
                  prefetch: int, device: torch.device, patience: Patience | None = None,
                  as_in_evaluation: bool = False) -> Batches:
    """This rank's micro-batches of steps [first_step, last_step), `accumulation` of them per step, by processes_for(
    workers) processes.

    Step s consumes positions [s G, (s + 1) G). Its micro-batches are the same for every world size; only who
    computes which differs.

    Args:
        as_in_evaluation: the images are cropped as those of an evaluation, where `augment` draws nothing.
    """
    workers = processes_for(workers)
    requests = partial(requests_between, order, first_step, last_step, global_batch_size, micro_batch_size, rank,
                       world_size)
    ahead = prefetcher_of(reader, order, last_step=last_step, global_batch_size=global_batch_size, rank=rank,
                          world_size=world_size)
    # A step takes all its micro-batches at once, and meanwhile those of the next one are made.
    prefetch = max(prefetch, 1 + -(-global_batch_size // (world_size * micro_batch_size * workers)))
    memory = ring.Ring(workers, prefetch, (micro_batch_size, *model_input.size)).next
    transform = EvalTransform(model_input) if as_in_evaluation else TrainTransform(augment, model_input)
    make = train_maker(reader, order, transform, augment, seed, memory, ahead)
    return Batches(make, requests, workers, prefetch, device, patience)


def eval_batches(reader: Reader, model_input: InputSpec, *, batch_size: int, rank: int,
                 world_size: int, workers: int | None, device: torch.device, patience: Patience | None = None,
                 chosen: np.ndarray | None = None, exclusion: Exclusion | None = None) -> Batches:
    """Every sample once over all ranks, the same number of batches on each; padding is marked not `valid`.

    Args:
        chosen: indices of the samples, at least one, ascending; None for all. Positions are places among them.
        exclusion: given for training images, in whose places substitutes come where they cannot be decoded, as in
            training; without it such an image is an error.
    """
    order = InOrder(np.arange(len(reader)) if chosen is None else chosen)
    total = order.num_samples
    batches = -(-total // (batch_size * world_size))

    def requests() -> Iterator[Request]:
        for index in range(batches):
            begin = (index * world_size + rank) * batch_size
            positions = np.arange(begin, min(begin + batch_size, total))
            if not len(positions):  # ranks beyond the last sample take part with one that is not counted
                positions = np.array([-1])
            yield positions, order.samples(np.maximum(positions, 0))

    ahead = prefetcher_of(reader, order, last_step=batches, global_batch_size=batch_size * world_size,
                          rank=rank, world_size=world_size)
    workers = processes_for(workers)
    memory = ring.Ring(workers, _EVAL_PREFETCH, (batch_size, *model_input.size)).next
    make = eval_maker(reader, EvalTransform(model_input), memory, ahead, exclusion)
    return Batches(make, requests, workers, _EVAL_PREFETCH, device, patience)


class _Requested:
    """DataLoader wants its sampler as an iterable."""

    def __init__(self, requests: Callable[[], Iterator[Request]]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self.requests()
