"""The training images of a plan: those that are there, or ImageNet as it usually is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pages of results are made without torch
    from vir.data.reader import Reader

IMAGENET_1K = "imagenet-1k"
IMAGENET_21K = "imagenet-21k"
"""Names of images that are assumed."""
IMAGENET = 1_281_167
"""Training images of ImageNet-1k."""
IMAGENET_WHOLE = 14_197_122
"""Images of ImageNet-21k as it was released in 2011, of 21,841 classes (image-net.org)."""
IMAGE_BYTES = 110_000
"""Of one of them, on average."""
SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a plan needs to know of them."""

    name: str
    """Where they lie, or what is assumed."""
    shard_sizes: Sequence[int]
    """Images in each shard."""
    shard_bytes: Sequence[int]
    """Of each; empty where the images are files of their own."""
    classes: Sequence[str]
    is_assumed: bool = False

    @classmethod
    def of(cls, reader: Reader) -> Images:
        return cls(name=reader.name, shard_sizes=reader.shard_sizes, shard_bytes=reader.shard_bytes,
                   classes=reader.classes)

    @property
    def count(self) -> int:
        return sum(self.shard_sizes)

    @property
    def image_bytes(self) -> float:
        """Of one on average; assumed where it is not known."""
        return sum(self.shard_bytes) / self.count if self.shard_bytes else IMAGE_BYTES


def imagenet(samples_per_shard: int = SAMPLES_PER_SHARD, name: str = IMAGENET_1K) -> Images:
    """The one of that name in shards of so many images; the last one has the rest."""
    count, classes = {IMAGENET_1K: (IMAGENET, 1000), IMAGENET_21K: (IMAGENET_WHOLE, 21_841)}[name]
    sizes = [samples_per_shard] * (count // samples_per_shard)
    sizes += [count - sum(sizes)] if sum(sizes) < count else []
    return Images(name=name, shard_sizes=sizes, shard_bytes=[size * IMAGE_BYTES for size in sizes],
                  classes=[""] * classes, is_assumed=True)
