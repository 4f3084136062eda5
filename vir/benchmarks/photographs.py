"""JPEGs that cost what photographs cost to decode."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

SIZE = (500, 375)
"""Width and height of a photograph: the most frequent of ImageNet."""
_LARGER = 1.14
"""Times the size: the most of a photograph that one picture shows."""
_ROUNDS = 3


def make_jpegs(count: int, image_bytes: int, size: tuple[int, int]) -> list[bytes]:
    """Different pictures, each of the quality that brings it nearest to so many bytes.

    Parts of the two photographs that scikit-learn brings, where it is installed, else synthetic ones. Decoding them
    with Pillow costs the same within a tenth at the same number of bytes.

    Args:
        size: width and height in pixels.
    """
    rng = np.random.default_rng(0)
    photographs = load_photographs()
    pictures = (_part_of(photographs[number % len(photographs)], size, rng) if photographs else synthetic(size, rng)
                for number in range(count))
    return [_of_size(picture, image_bytes) for picture in pictures]


def load_photographs() -> list[Image.Image]:
    """Those of scikit-learn, 640 x 427 pixels; none where it is not installed."""
    try:
        from sklearn.datasets import load_sample_images  # type: ignore[import-untyped]
    except ImportError:
        return []
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def synthetic(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Noise whose amplitude falls with the frequency, as that of natural images does (Field 1987), little of it colour.
    """
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    layers = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, s=(height, width))
              for _ in range(4)]
    light, *colours = (layer / layer.std() for layer in layers)
    pixels = np.stack([120 + 55 * light + 15 * colour for colour in colours], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def decoding_us(jpegs: Sequence[bytes]) -> float:
    """What Pillow takes for one of them, in microseconds: the median of some rounds over all."""
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for jpeg in jpegs:
            Image.open(BytesIO(jpeg)).convert("RGB")
        rounds.append(1e6 * (time.perf_counter() - began) / len(jpegs))
    return statistics.median(rounds)


def _part_of(photograph: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    most = min(_LARGER, photograph.width / size[0], photograph.height / size[1])
    width, height = (round(side * rng.uniform(min(1, most), most)) for side in size)
    left, top = int(rng.integers(photograph.width - width + 1)), int(rng.integers(photograph.height - height + 1))
    part = photograph.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else part


def _of_size(picture: Image.Image, image_bytes: int) -> bytes:
    quality = bisect.bisect_left(range(1, 100), image_bytes, key=lambda quality: len(_encoded(picture, quality))) + 1
    around = [_encoded(picture, near) for near in (max(1, quality - 1), quality)]
    return min(around, key=lambda jpeg: abs(len(jpeg) - image_bytes))


def _encoded(picture: Image.Image, quality: int) -> bytes:
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()
