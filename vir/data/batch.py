"""A micro-batch, and how a loader process makes it: of the samples that the order asks for, or their substitutes."""

# Dimension key: B micro-batch, C channels, H height, W width.

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import filterfalse
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from vir.config import AugmentConfig
from vir.data import ring, transforms, worker
from vir.data.decode import BadSampleError, open_image
from vir.data.exclusion import NOTHING, Exclusion
from vir.data.order import SampleOrder
from vir.data.prefetch import Prefetcher
from vir.data.reader import Reader
from vir.data.stages import Laps, Spent
from vir.data.transforms import Transform
from vir.errors import DataError

_SUBSTITUTE_TRIES = 100


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


def train_maker(reader: Reader, order: SampleOrder, transform: Transform, augment: AugmentConfig, seed: int,
                memory: Callable[[int], Tensor], ahead: Prefetcher | None = None
                ) -> Callable[[np.ndarray, np.ndarray], Batch]:
    """From positions and samples to the training batch of them, in a loader process.

    Args:
        memory: gives [size, C, H, W] uint8 to write images into.
    """
    mix_until = augment.mixup_off_epoch * order.num_samples or float("inf")
    return partial(_train_batch, reader, order.exclusion, ahead, transform, augment, seed, mix_until, memory)


def eval_maker(reader: Reader, transform: Transform, memory: Callable[[int], Tensor],
               ahead: Prefetcher | None = None,
               exclusion: Exclusion | None = None) -> Callable[[np.ndarray, np.ndarray], Batch]:
    """The same for validation; a position below 0 is padding.

    Args:
        exclusion: where substitutes are to be taken, which ones never are.
    """
    return partial(_eval_batch, reader, ahead, transform, memory, exclusion)


def _first_good(reader: Reader, sample: int, read: Callable[[], bytes], use: Callable[[bytes], Tensor],
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

        images[place], good, passed_over = _first_good(reader, sample, read, use, exclusion)
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
                exclusion: Exclusion | None, positions: np.ndarray, samples: np.ndarray) -> Batch:
    _advance(ahead, max(int(positions[0]), 0))
    reader.checking()
    laps, size = Laps(), len(positions)
    images, used, bad = memory(size), [], []

    def use(data: bytes) -> Tensor:
        laps.end_of("read")
        return _pixels(data, transform, laps)

    for place, (sample, read) in enumerate(zip(samples.tolist(), worker.here().read(reader, samples.tolist()))):
        try:
            # No substitute in an evaluation: an accuracy that silently counts another image would be false.
            images[place], good, passed_over = ((use(read()), sample, []) if exclusion is None else
                                                _first_good(reader, sample, read, use, exclusion))
        except BadSampleError as error:
            raise DataError(f"validation image {reader.where(sample)} of {reader.name}: {error}; restore it from a "
                            "good copy, or convert the split again") from error
        used.append(good)
        bad += passed_over
        laps.end_of("collate")
    laps.spent.images, laps.spent.check = size, reader.checking()
    return Batch(images=images, labels=torch.from_numpy(reader.labels[used].astype(np.int64)),
                 positions=torch.from_numpy(np.maximum(positions, 0)), valid=torch.from_numpy(positions >= 0),
                 erase=torch.zeros(size, 4, dtype=torch.long), noise=torch.zeros(size, dtype=torch.int32),
                 lam=torch.ones(size), cut=torch.zeros(size, 4, dtype=torch.long),
                 samples=used, bad=bad, spent=laps.done())


def _advance(ahead: Prefetcher | None, position: int) -> None:
    if ahead is not None and worker.here().number == 0:
        ahead.advance(position)
