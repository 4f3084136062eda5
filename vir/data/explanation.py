"""What became of each sample of a step: its batches are made again as the loader made them, and every draw is noted."""

# Dimension key: B micro-batch, C channels, H height, W width.

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, filterfalse, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vir.config import AugmentConfig, TrainConfig
from vir.data import worker
from vir.data.batch import Batch, train_maker
from vir.data.device import Preparation
from vir.data.jpeg import Box
from vir.data.loader import requests_of
from vir.data.order import SampleOrder
from vir.data.reader import Reader
from vir.data.transforms import Crop, TrainTransform
from vir.weights.spec import InputSpec


class Op(NamedTuple):
    """One of timm's operations that a policy has drawn, with the arguments that its magnitude came to."""

    name: str
    args: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What a model saw at one position, and how it came to that."""

    position: int
    """In the endless training sequence."""
    rank: int
    micro: int
    """Number of the micro-batch on that rank, from 0."""
    place: int
    """In the micro-batch, from 0."""
    key: str
    class_name: str
    file: str
    """The shard, or the image file."""
    offset: int
    """Of the image in it, in bytes."""
    instead_of: tuple[str, ...]
    """Keys of samples that are excluded or could not be decoded, whose place it takes."""
    width: int
    height: int
    crop: Crop
    policy: tuple[Op, ...]
    erase: Box | None
    """In the sample, as the next three."""
    partner: int | None
    """The position of the sample that it is mixed with."""
    lam: float
    """The share that it keeps of itself."""
    cut: Box | None
    """Taken from the partner (CutMix); None with a partner: mixup."""


@dataclass(frozen=True)
class _Made:
    """Of one sample, in its loader process."""

    width: int
    height: int
    crop: Crop
    policy: tuple[Op, ...]


@dataclass
class Recording:
    """A transform that does what another one does, and keeps what it has drawn."""

    inner: TrainTransform
    made: list[_Made] = field(default_factory=list)
    """In the order in which samples were made; an image that could not be decoded is none."""
    _size: tuple[int, int] = (0, 0)
    _ops: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        for transform in getattr(self.inner.policy, "transforms", ()):
            for op in _ops_in(list(vars(transform).values())):
                op.aug_fn = self._noting(op.name, op.aug_fn)
            if hasattr(transform, "get_params"):  # torchvision's, where there is no policy of timm's
                transform.get_params = self._noting_params(type(transform).__name__, transform.get_params)

    def crop(self, width: int, height: int) -> Crop:
        self._size = width, height
        return self.inner.crop(width, height)

    def apply(self, pixels: np.ndarray, crop: Crop) -> Tensor:
        self._ops.clear()
        sample = self.inner.apply(pixels, crop)
        self.made.append(_Made(*self._size, crop, tuple(self._ops)))
        return sample

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(image: Any, *args: float, **kwargs: Any) -> Any:
            self._ops.append(Op(name, tuple(map(float, args))))
            return function(image, *args, **kwargs)

        return noted

    def _noting_params(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*ranges: Any) -> Any:
            order, *factors = drawn = function(*ranges)
            named = zip(("brightness", "contrast", "saturation", "hue"), factors)
            by_number = [Op(f"{name}.{kind}", (float(factor),)) if factor is not None else None
                         for kind, factor in named]
            self._ops += [op for number in order.tolist() if (op := by_number[number]) is not None]
            return drawn

        return noted


def _ops_in(values: Sequence[Any]) -> Iterator[Any]:
    """timm's AugmentOps in the fields of a policy, lists of lists among them; each once."""
    found = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple)):
            waiting += value
        elif hasattr(value, "aug_fn"):
            found[id(value)] = value
    yield from found.values()


def explain_step(reader: Reader, order: SampleOrder, augment: AugmentConfig, model_input: InputSpec,
                 train: TrainConfig, step: int, ranks: Sequence[int], world_size: int, micro: int | None = None
                 ) -> Iterator[tuple[Batch, list[Explained]]]:
    """Each micro-batch of these ranks in a step, from 0, as the loader gives it, and its samples one by one.

    Args:
        micro: number of the only micro-batch that is wanted of each rank.

    This process draws as a loader process does: its generators are seeded anew for each sample.

    Raises:
        DataError: as the loader.
    """
    worker.begin_in_this_process()
    recording = Recording(TrainTransform(augment, model_input))
    make = train_maker(reader, order, recording, augment, train.seed,
                       lambda size: torch.empty(size, *model_input.size, dtype=torch.uint8))
    for rank in ranks:
        requests = requests_of(order, step, train.global_batch_size, train.micro_batch_size, rank, world_size)
        for number, (positions, samples) in enumerate(requests):
            if micro not in (None, number):
                continue
            recording.made.clear()
            batch = make(positions, samples)
            meant = order.before_exclusion(positions)
            yield batch, [_explained(reader, order, batch, place, rank, number, int(meant[place]), int(sample), made)
                          for place, (sample, made) in enumerate(zip(samples.tolist(), recording.made))]


def _explained(reader: Reader, order: SampleOrder, batch: Batch, place: int, rank: int, micro: int, meant: int,
               sample: int, made: _Made) -> Explained:
    passed_over = [meant] * (meant != sample)
    tried = chain([sample], filterfalse(order.exclusion.holds, reader.substitutes(sample)))
    sample = batch.samples[place]
    passed_over += takewhile(lambda other: other != sample, tried)
    erase, cut = (_box(boxes[place].tolist()) for boxes in (batch.erase, batch.cut))
    lam = float(batch.lam[place])
    file, offset = reader.file_of(sample)
    return Explained(
        position=int(batch.positions[place]), rank=rank, micro=micro, place=place, key=reader.key(sample),
        class_name=reader.classes[int(reader.labels[sample])], file=file, offset=offset,
        instead_of=tuple(map(reader.key, passed_over)), width=made.width, height=made.height, crop=made.crop,
        policy=made.policy, erase=erase, partner=None if lam == 1 else int(batch.positions[place ^ 1]), lam=lam,
        cut=cut)


def _box(sides: Sequence[int]) -> Box | None:
    return Box(*sides) if sides[2] and sides[3] else None


def pixels_seen(batch: Batch, augment: AugmentConfig, model_input: InputSpec) -> np.ndarray:
    """[B, H, W, C] uint8: what the model was given, erased and mixed, back from normalised numbers."""
    prepare = Preparation(model_input=model_input, augment=augment, smoothing=0.0,
                          num_classes=int(batch.labels.max()) + 1, device=torch.device("cpu"))
    images = prepare(batch)[0].permute(0, 2, 3, 1).double().numpy()
    pixels = (images * model_input.std + model_input.mean) * 255
    return np.round(pixels).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    raise SystemExit("vir.data.explanation is a part of the library; the program is vir-explain")
