"""Batches: stateless workers read what the order says, every rank gets equal micro-batches, nothing is padded in
training, and validation counts every image once."""

# Dimension key: B micro-batch, C channels, H height, W width.

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import filterfalse
from typing import Any, Callable, Generator, Iterator, NoReturn, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vir import launcher
from vir.config import AugmentConfig
from vir.data import order as orders
from vir.data import ring, transforms, worker
from vir.data.decode import BadSampleError, open_image
from vir.data.exclusion import NOTHING, Exclusion
from vir.data.order import InOrder, SampleOrder
from vir.data.prefetch import Prefetcher, prefetcher_of
from vir.data.reader import Reader
from vir.data.stages import Laps, Spent
from vir.data.transforms import EvalTransform, TrainTransform, Transform
from vir.errors import DataError, VirError
from vir.weights.spec import InputSpec

Request = tuple[np.ndarray, np.ndarray]
"""Positions and samples of a micro-batch."""

_SUBSTITUTE_TRIES = 100
_EVAL_PREFETCH = 2


@dataclass
class Batch:
    """A micro-batch. `bad` says, for each sample that could not be decoded, which one and why."""

    images: Tensor  # [B, C, H, W] uint8
    labels: Tensor  # [B] int64
    positions: Tensor  # [B] int64, place in the endless training sequence (validation: among the samples of it)
    valid: Tensor  # [B] bool, False for the padding of a last validation batch
    erase: Tensor  # [B, 4] int64 box to erase
    noise: Tensor  # [B] int32 seed of what is filled in there
    lam: Tensor  # [B] float32 share that a sample keeps of itself
    cut: Tensor  # [B, 4] int64 box taken from the partner
    samples: list[int]  # [B] that the images are of: of substitutes, where others could not be decoded
    bad: list[str]
    spent: Spent = field(default_factory=Spent)
    """What making it took."""

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def __getstate__(self) -> dict[str, Any]:
        # torch would send each tensor as a file, over a connection of its own (0.5 ms on each side).
        return {name: ring.place_of(value) or value.numpy() if isinstance(value, Tensor) else value
                for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, ring.Place):
                value = value.tensor()
            elif isinstance(value, np.ndarray):
                value = torch.from_numpy(value)
            setattr(self, name, value)

    def kept(self) -> Batch:
        """This batch, in memory that is its own."""
        # By numpy: torch would copy in several threads, and they would turn idle rounds for longer than they copied.
        return replace(self, images=torch.from_numpy(self.images.numpy().copy()))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        # The positions stay: Python reads them, and it is not to wait for the device.
        return self._map(lambda tensor: tensor if tensor is self.positions else tensor.to(device, non_blocking=True))


def first_good(reader: Reader, sample: int, read: Callable[[], bytes], use: Callable[[bytes], Tensor],
               exclusion: Exclusion = NOTHING) -> tuple[Tensor, int, list[str]]:
    """What `use` makes of `sample`, or of its first good substitute; which one; what was wrong with those passed over.

    Args:
        read: gives the bytes of `sample`, or raises what reading them did.
        use: raises BadSampleError where they are no good.
    """
    bad: list[str] = []
    substitutes = filterfalse(exclusion.holds, reader.substitutes(sample))
    for _ in range(_SUBSTITUTE_TRIES):
        try:
            return use(read()), sample, bad
        except BadSampleError as error:
            bad.append(f"{reader.where(sample)}: {error}")
        sample = next(substitutes, -1)
        if sample < 0:
            break
        read = partial(reader.read, sample)
    raise DataError(f"no readable image in {len(bad)} tries, the first was {bad[0]} of {reader.name}; restore the "
                    "images from a good copy, or convert the split again")


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


def _pixels(data: bytes, transform: Transform, laps: Laps) -> Tensor:
    """The sample [C, H, W] uint8 that an image file becomes. Raises BadSampleError."""
    laps.spent.bytes += len(data)
    image = open_image(data)
    laps.end_of("decode")
    crop = transform.crop(image.width, image.height)
    laps.end_of("augment")
    pixels = image.pixels(crop.box)
    laps.end_of("decode")
    sample = transform.apply(pixels, crop)
    laps.end_of("augment")
    return sample


def _train_batch(reader: Reader, exclusion: Exclusion, ahead: Prefetcher | None, transform: Transform,
                 augment: AugmentConfig, seed: int, mix_until: float, memory: Callable[[int], Tensor],
                 positions: np.ndarray, samples: np.ndarray) -> Batch:
    _advance(ahead, int(positions[0]))
    reader.checking()  # that of before is another's
    laps = Laps()
    images, used, bad = memory(len(positions)), [], []
    reads = worker.here().read(reader, samples.tolist())
    for place, (position, sample, read) in enumerate(zip(positions.tolist(), samples.tolist(), reads)):

        def use(data: bytes, position: int = position) -> Tensor:
            laps.end_of("read")
            transforms.seed_draws(seed, position)
            laps.end_of("augment")
            return _pixels(data, transform, laps)

        images[place], good, passed_over = first_good(reader, sample, read, use, exclusion)
        used.append(good)
        bad += passed_over
        laps.end_of("collate")
    height, width = images.shape[2:]
    boxes = [transforms.erase_box(seed, position, augment, height, width) for position in positions.tolist()]
    noise = [transforms.noise_seed(seed, position) if box[2] else 0
             for position, box in zip(positions.tolist(), boxes)]
    mixes = [(1.0, (0, 0, 0, 0))] * len(positions)
    for i in range(0, len(positions) - 1, 2):
        if positions[i:i + 2].max() < mix_until:
            mixes[i] = mixes[i + 1] = transforms.mix_parameters(seed, int(positions[i]), augment, height, width)
    lam, cut = zip(*mixes)
    laps.end_of("collate")
    laps.spent.images, laps.spent.check = len(positions), reader.checking()
    return Batch(images=images, labels=torch.from_numpy(reader.labels[used].astype(np.int64)),
                 positions=torch.from_numpy(positions), valid=torch.ones(len(positions), dtype=torch.bool),
                 erase=torch.tensor(boxes), noise=torch.tensor(noise, dtype=torch.int32), lam=torch.tensor(lam),
                 cut=torch.tensor(cut), samples=used, bad=bad, spent=laps.done())


def _eval_batch(reader: Reader, ahead: Prefetcher | None, transform: Transform, memory: Callable[[int], Tensor],
                positions: np.ndarray, samples: np.ndarray) -> Batch:
    _advance(ahead, max(int(positions[0]), 0))
    reader.checking()
    laps, size = Laps(), len(positions)
    images, labels = memory(size), []
    for place, (sample, read) in enumerate(zip(samples.tolist(), worker.here().read(reader, samples.tolist()))):
        # No substitute here: an accuracy that silently counts another image would be false.
        try:
            data = read()
            laps.end_of("read")
            images[place] = _pixels(data, transform, laps)
        except BadSampleError as error:
            raise DataError(f"validation image {reader.where(sample)} of {reader.name}: {error}; restore it from a "
                            "good copy, or convert the split again") from error
        labels.append(int(reader.labels[sample]))
        laps.end_of("collate")
    laps.spent.images, laps.spent.check = size, reader.checking()
    return Batch(images=images, labels=torch.tensor(labels),
                 positions=torch.from_numpy(np.maximum(positions, 0)), valid=torch.from_numpy(positions >= 0),
                 erase=torch.zeros(size, 4, dtype=torch.long), noise=torch.zeros(size, dtype=torch.int32),
                 lam=torch.ones(size), cut=torch.zeros(size, 4, dtype=torch.long),
                 samples=samples.tolist(), bad=[], spent=laps.done())


def _advance(ahead: Prefetcher | None, position: int) -> None:
    if ahead is not None and worker.here().number == 0:
        ahead.advance(position)


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


def train_maker(reader: Reader, order: SampleOrder, transform: Transform, augment: AugmentConfig, seed: int,
                memory: Callable[[int], Tensor], ahead: Prefetcher | None = None
                ) -> Callable[[np.ndarray, np.ndarray], Batch]:
    """From positions and samples to the training batch of them, in a loader process.

    Args:
        memory: gives [size, C, H, W] uint8 to write images into.
    """
    mix_until = augment.mixup_off_epoch * order.num_samples or float("inf")
    return partial(_train_batch, reader, order.exclusion, ahead, transform, augment, seed, mix_until, memory)


def train_batches(reader: Reader, order: SampleOrder, augment: AugmentConfig,
                  model_input: InputSpec, *, seed: int, first_step: int, last_step: int,
                  global_batch_size: int, micro_batch_size: int, rank: int, world_size: int, workers: int | None,
                  prefetch: int, device: torch.device, patience: Patience | None = None) -> Batches:
    """This rank's micro-batches of steps [first_step, last_step), `accumulation` of them per step, by processes_for(
    workers) processes.

    Step s consumes positions [s G, (s + 1) G). Its micro-batches are the same for every world size; only who
    computes which differs.
    """
    workers = processes_for(workers)

    def requests() -> Iterator[Request]:
        for step in range(first_step, last_step):
            yield from requests_of(order, step, global_batch_size, micro_batch_size, rank, world_size)
            order.prepare((step + 1) * global_batch_size, last_step * global_batch_size)

    ahead = prefetcher_of(reader, order, last_step=last_step, global_batch_size=global_batch_size, rank=rank,
                          world_size=world_size)
    # A step takes all its micro-batches at once, and meanwhile those of the next one are made.
    prefetch = max(prefetch, 1 + -(-global_batch_size // (world_size * micro_batch_size * workers)))
    memory = ring.Ring(workers, prefetch, (micro_batch_size, *model_input.size)).next
    make = train_maker(reader, order, TrainTransform(augment, model_input), augment, seed, memory, ahead)
    return Batches(make, requests, workers, prefetch, device, patience)


def eval_batches(reader: Reader, model_input: InputSpec, *, batch_size: int, rank: int,
                 world_size: int, workers: int | None, device: torch.device, patience: Patience | None = None,
                 chosen: np.ndarray | None = None) -> Batches:
    """Every sample once over all ranks, the same number of batches on each; padding is marked not `valid`.

    Args:
        chosen: indices of the samples, at least one, ascending; None for all. Positions are places among them.
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
    make = partial(_eval_batch, reader, ahead, EvalTransform(model_input), memory)
    return Batches(make, requests, workers, _EVAL_PREFETCH, device, patience)


class _Requested:
    """DataLoader wants its sampler as an iterable."""

    def __init__(self, requests: Callable[[], Iterator[Request]]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self.requests()
