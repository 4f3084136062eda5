"""Batches: stateless workers read what the order says, every rank gets equal micro-batches, nothing is padded in
training, and validation counts every image once."""

# Dimension key: B micro-batch, C channels, H height, W width.

from __future__ import annotations

import atexit
import multiprocessing
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Generator, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vir.config import AugmentConfig
from vir.data import transforms
from vir.data.decode import BadSampleError, decode_image
from vir.data.order import SampleOrder
from vir.data.reader import ShardReader
from vir.errors import DataError, VirError
from vir.models.spec import InputSpec
from vir.streams import SAMPLE, generator

Transform = Callable[[Image.Image], np.ndarray]
Request = tuple[np.ndarray, np.ndarray]
"""Positions and samples of a micro-batch."""

_SUBSTITUTE_TRIES = 100


@dataclass
class Batch:
    """A micro-batch. `bad` says, for each sample that could not be decoded, which one and why."""

    images: Tensor  # [B, C, H, W] uint8
    labels: Tensor  # [B] int64
    positions: Tensor  # [B] int64, place in the endless training sequence (validation: the sample's index)
    valid: Tensor  # [B] bool, False for the padding of a last validation batch
    erase: Tensor  # [B, 4] int64 box to erase
    lam: Tensor  # [B] float32 share that a sample keeps of itself
    cut: Tensor  # [B, 4] int64 box taken from the partner
    bad: list[str]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def __getstate__(self) -> dict[str, Any]:
        # A tensor leaves a loader process as shared memory, with a socket connection of its own (0.5 ms on each side);
        # what is small is quicker by value.
        return {name: value.numpy() if isinstance(value, Tensor) and name != "images" else value
                for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update((name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)
                          for name, value in state.items())

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        there = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(there, positions=self.positions, erase=self.erase)  # Python reads these: no wait for the device


def seed_worker_globals(seed: int, position: int) -> None:
    """Set `random`, `numpy` and torch for one sample; only ever called in a loader process."""
    numbers = generator(seed, position, SAMPLE).integers(2**63, size=2)
    random.seed(int(numbers[0]))
    np.random.seed(int(numbers[1]) & 0xFFFFFFFF)
    torch.default_generator.manual_seed(int(numbers[1]))


def read_image(reader: ShardReader, sample: int) -> tuple[Image.Image, int, list[str]]:
    """The image at `sample`, or of its first good substitute; its label; what was wrong with those passed over."""
    bad: list[str] = []
    substitutes = reader.substitutes(sample)
    for _ in range(_SUBSTITUTE_TRIES):
        try:
            return decode_image(reader.read(sample)), int(reader.labels[sample]), bad
        except BadSampleError as error:
            bad.append(f"{reader.where(sample)}: {error}")
        sample = next(substitutes, -1)
        if sample < 0:
            break
    raise DataError(f"no readable image in {len(bad)} tries, the first was {bad[0]}; run the conversion again for "
                    f"this split, or restore its shards from a good copy")


class _Requests(Dataset["Batch | VirError"]):
    """Serves requests (positions, samples) through `make`. Errors travel as values: the trainer raises them."""

    def __init__(self, make: Callable[[np.ndarray, np.ndarray], Batch]) -> None:
        self.make = make

    def __getitem__(self, request: Request) -> Batch | VirError:
        try:
            return self.make(*request)
        except VirError as error:
            return error


def _train_batch(reader: ShardReader, transform: Transform, augment: AugmentConfig, seed: int, mix_until: float,
                 positions: np.ndarray, samples: np.ndarray) -> Batch:
    pixels, labels, bad = [], [], []
    for position, sample in zip(positions.tolist(), samples.tolist()):
        image, label, passed_over = read_image(reader, sample)
        seed_worker_globals(seed, position)
        pixels.append(torch.as_tensor(transform(image)))
        labels.append(label)
        bad += passed_over
    images = torch.stack(pixels)
    height, width = images.shape[2:]
    boxes = [transforms.erase_box(seed, position, augment, height, width) for position in positions.tolist()]
    mixes = [(1.0, (0, 0, 0, 0))] * len(positions)
    for i in range(0, len(positions) - 1, 2):
        if positions[i:i + 2].max() < mix_until:
            mixes[i] = mixes[i + 1] = transforms.mix_parameters(seed, int(positions[i]), augment, height, width)
    lam, cut = zip(*mixes)
    return Batch(images=images, labels=torch.tensor(labels), positions=torch.from_numpy(positions),
                 valid=torch.ones(len(positions), dtype=torch.bool), erase=torch.tensor(boxes),
                 lam=torch.tensor(lam), cut=torch.tensor(cut), bad=bad)


def _eval_batch(reader: ShardReader, transform: Transform, positions: np.ndarray, samples: np.ndarray) -> Batch:
    pixels, labels = [], []
    for sample in samples.tolist():
        # No substitute here: an accuracy that silently counts another image would be false.
        try:
            image = decode_image(reader.read(sample))
        except BadSampleError as error:
            raise DataError(f"validation image {reader.where(sample)}: {error}; convert the validation split again, "
                            "or restore its shards from a good copy") from error
        pixels.append(torch.as_tensor(transform(image)))
        labels.append(int(reader.labels[sample]))
    size = len(positions)
    return Batch(images=torch.stack(pixels), labels=torch.tensor(labels), positions=torch.from_numpy(samples),
                 valid=torch.from_numpy(positions >= 0), erase=torch.zeros(size, 4, dtype=torch.long),
                 lam=torch.ones(size), cut=torch.zeros(size, 4, dtype=torch.long), bad=[])


def _start_worker(_: int) -> None:
    # The trainer decides what a signal means: a worker that died of it would take the last checkpoint along.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Runs before multiprocessing's own exit hook, which would wait for ever for workers that ignore its SIGTERM."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report them as killed
    for worker in workers:
        worker.kill()


def _serve(make: Callable[[np.ndarray, np.ndarray], Batch], requests: Callable[[], Iterator[Request]], workers: int,
           prefetch: int, device: torch.device) -> Generator[Batch, None, None]:
    """Run the requests through worker processes, in order, and put each Batch on the device."""
    served = DataLoader(_Requests(make), sampler=_Requested(requests), batch_size=None, num_workers=workers,
                        prefetch_factor=prefetch, worker_init_fn=_start_worker, pin_memory=device.type == "cuda",
                        generator=torch.Generator(), multiprocessing_context="fork")
    _let_threads_settle()
    for batch in _ahead(served, device) if device.type == "cuda" else served:
        if isinstance(batch, VirError):
            raise batch
        yield batch


def _let_threads_settle() -> None:
    """Before a fork, let threads of torch that have just ended a collective leave the interpreter.

    Up to Python 3.11 a child waits for ever in PyOS_AfterFork_Child if at that moment a thread was about to enter the
    interpreter. Seen 2 times in 3,600 forks right after a collective of gloo; never in 4,800 after a pause of 5 ms.
    """
    if sys.version_info < (3, 12):
        time.sleep(0.02)


def _ahead(batches: Any, device: torch.device) -> Iterator[Any]:
    """Copy each batch to the GPU on a side stream while the one before is being trained on."""
    side = torch.cuda.Stream(device)
    waiting: list[tuple[Any, torch.cuda.Event]] = []
    for batch in batches:
        if isinstance(batch, Batch):
            with torch.cuda.stream(side):
                batch = batch.to(device)
        waiting.append((batch, side.record_event()))
        if len(waiting) == 2:
            yield _arrived(*waiting.pop(0))
    for last in waiting:
        yield _arrived(*last)


def _arrived(batch: Any, copied: torch.cuda.Event) -> Any:
    """The batch, safe to use on the current stream."""
    here = torch.cuda.current_stream()
    here.wait_event(copied)
    if isinstance(batch, Batch):
        for tensor in (batch.images, batch.labels, batch.valid, batch.lam, batch.cut):
            tensor.record_stream(here)  # its memory is not given to the side stream again before it was read here
    return batch


def train_batches(reader: ShardReader, order: SampleOrder, augment: AugmentConfig,
                  model_input: InputSpec, *, seed: int, first_step: int, last_step: int,
                  global_batch_size: int, micro_batch_size: int, rank: int, world_size: int, workers: int,
                  prefetch: int, device: torch.device) -> Generator[Batch, None, None]:
    """This rank's micro-batches of steps [first_step, last_step), `accumulation` of them per step.

    Step s consumes positions [s G, (s + 1) G). Its micro-batches are the same for every world size; only who
    computes which differs.
    """
    mix_until = augment.mixup_off_epoch * order.num_samples or float("inf")
    per_rank = global_batch_size // world_size

    def requests() -> Iterator[Request]:
        for step in range(first_step, last_step):
            batch = order.global_batch(step * global_batch_size, global_batch_size)
            mine = batch[rank * per_rank:(rank + 1) * per_rank]
            for first in range(0, per_rank, micro_batch_size):
                positions = mine[first:first + micro_batch_size]
                yield positions, order.samples(positions)

    make = partial(_train_batch, reader, transforms.train_transform(augment, model_input), augment, seed, mix_until)
    return _serve(make, requests, workers, prefetch, device)


def eval_batches(reader: ShardReader, model_input: InputSpec, *, batch_size: int, rank: int,
                 world_size: int, workers: int, device: torch.device) -> Generator[Batch, None, None]:
    """Every sample once over all ranks, the same number of batches on each; padding is marked not `valid`."""
    total = len(reader)
    batches = -(-total // (batch_size * world_size))

    def requests() -> Iterator[Request]:
        for index in range(batches):
            first = (index * world_size + rank) * batch_size
            samples = np.arange(first, min(first + batch_size, total))
            padding = len(samples) == 0  # ranks beyond the last sample take part with one that is not counted
            yield (np.array([-1]), np.array([0])) if padding else (samples, samples)

    return _serve(partial(_eval_batch, reader, transforms.eval_transform(model_input)), requests, workers, 2, device)


class _Requested:
    """DataLoader wants its sampler as an iterable."""

    def __init__(self, requests: Callable[[], Iterator[Request]]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self.requests()
