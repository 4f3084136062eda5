"""Image files of any size, decoded strip by strip from top to bottom, by libvips; the pixels are those of decode_image.

libvips is only asked for kinds of files of which that is so: see `_loader`, and tests/test_strip_decoding.py, which
compares them. All other files are decoded whole.
"""

# Dimension key: h, w rows and columns of pixels.

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from PIL.ImageFile import ImageFile

from vir.data.decode import FOREIGN, FORMATS, MAX_PIXELS, BadSampleError, check_pixels, decoded, kind_of, parsed
from vir.errors import SettingsError
from vir.files import open_regular

MAX_SIDE = 1 << 16
"""Pixels of a side of an image that is decoded in strips: more than a JPEG can have. An image that is decoded whole has
at most MAX_PIXELS in all."""

_STRIP_PIXELS = 1 << 18
"""About so many are in a strip; at least one row."""

_MAGIC_BYTES = 16
_LOADERS = {"JPEG": "jpegload_source", "PNG": "pngload_source", "TIFF": "tiffload_source"}
_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits")
_WIDTHS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANES, _EXTRA = 258, 262, 274, 277, 284, 338
"""Numbers of TIFF's tags."""


class LooksDamagedError(BadSampleError):
    """libvips, halfway, warns of something in the file. Decoded whole, it is told as decode_image does, or is well."""


@dataclass(frozen=True)
class Strips:
    """An image file whose header was read."""

    width: int
    height: int
    """In pixels."""
    is_whole: bool
    """Whether its format, or its kind of it, makes that all pixels are decoded at once."""
    pixels: Iterator[np.ndarray]
    """Strips [h, w, 3] uint8, RGB. To be read once; raises BadSampleError where the file is damaged or cut short,
    LooksDamagedError where it may be and is small enough to be decoded whole."""


@contextmanager
def open_strips(file: bytes | str | Path, whole: bool = False) -> Iterator[Strips]:
    """Reads the header of an image of one of FORMATS or FOREIGN.

    Args:
        file: its bytes, or its path, whose size has no limit.
        whole: decode all at once, whatever it is.

    Raises:
        BadSampleError: it cannot be read, is no image, its header is broken, or it is larger than it may be.
        SettingsError: pyvips is not installed.
    """
    vips()
    with _opened(file) as opened:
        image = parsed(opened, kind_of(_read(opened, _MAGIC_BYTES), FORMATS + FOREIGN))
        width, height = image.size
        if max(width, height) > MAX_SIDE:
            raise BadSampleError(f"the image has {width} x {height} pixels, more than {MAX_SIDE:,} on a side")
        if _is_plain(image) and not whole:
            yield Strips(width, height, False, _rows(opened, image))
            return
        if image.format == "JPEG" and not _is_of_one_scan(opened, image):
            check_pixels(image)
        loader = None if whole else _loader(image)
        found = None if loader is None else _by_vips(loader, file)
        if found is None or (found.width, found.height) != image.size:
            check_pixels(image)
            yield Strips(width, height, True, _cut(image))
        else:
            yield Strips(width, height, False, _fetched(found))


@functools.cache
def vips() -> ModuleType:
    """pyvips, which keeps nothing of what it has decoded. Raises SettingsError where it is not installed."""
    try:
        import pyvips  # type: ignore[import-untyped]
    except (ImportError, OSError) as error:  # OSError: pyvips without libvips
        raise SettingsError("--stream decodes by libvips, which is not installed: pip install 'vir-at-scale[stream]', "
                            "or leave out --stream") from error
    logging.getLogger("pyvips").addHandler(logging.NullHandler())  # what it warns of is raised, or no matter
    logging.getLogger("pyvips").propagate = False
    pyvips.cache_set_max(0)
    return pyvips


@contextmanager
def _opened(file: bytes | str | Path) -> Iterator[IO[bytes]]:
    if isinstance(file, bytes):
        yield BytesIO(file)
        return
    with os.fdopen(_descriptor(file), "rb") as opened:
        yield opened


def _descriptor(file: str | Path) -> int:
    """Raises BadSampleError where it cannot be opened."""
    try:
        return open_regular(file)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _unreadable(error) from error


def _read(file: IO[bytes], size: int) -> bytes:
    """Raises BadSampleError where it cannot be read."""
    try:
        return file.read(size)
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> BadSampleError:
    return BadSampleError(f"it cannot be read: {getattr(error, 'strerror', None) or error}")


def _is_of_one_scan(file: IO[bytes], image: Any) -> bool:
    """Whether the first scan of a JPEG, behind whose header Pillow stands, has all colours in full.

    Of others libjpeg keeps the coefficients of the whole image in memory, 2 bytes or more for each pixel.
    """
    size = 6 + 2 * image.layers
    file.seek(max(0, file.tell() - size - 2))
    start = b"\xff\xda" + size.to_bytes(2, "big") + bytes([image.layers])
    return "progressive" not in image.info and _read(file, len(start)) == start


def _loader(image: ImageFile) -> str | None:
    """The one of libvips that gives Pillow's pixels of such a file; None: there is none.

    JPEGs of ink are inverted by one of them alone, and Adobe's of luminance and ink too. Interlaced PNGs have no rows
    before their end, and animated ones may have two first images. Of TIFF, whose kinds are many, those are left that
    have the pixels of an RGB or grey image, 8 bits each, upright.
    """
    if image.format == "JPEG":
        is_known = image.mode in ("L", "RGB")
    elif image.format == "PNG":
        is_known = not image.info.get("interlace") and not getattr(image, "is_animated", False)
    elif image.format == "TIFF":
        is_known = _is_simple_tiff(image)
    else:
        is_known = False
    return _LOADERS[str(image.format)] if is_known else None


def _is_simple_tiff(image: Any) -> bool:
    tags, channels = image.tag_v2, {"L": 1, "RGB": 3}.get(image.mode, 0)
    return (tags.get(_SAMPLES, 1) == channels and tags.get(_WIDTHS) == (8,) * channels
            and tags.get(_PHOTOMETRIC) == (1 if channels == 1 else 2) and tags.get(_PLANES, 1) == 1
            and tags.get(_ORIENTATION, 1) == 1 and _EXTRA not in tags
            and image.info.get("compression") in _COMPRESSIONS)


def _by_vips(loader: str, file: bytes | str | Path) -> Any | None:
    """The image, of which nothing is decoded yet; None where libvips cannot read it: then Pillow says what it is."""
    pyvips = vips()
    try:
        found = getattr(pyvips.Image, loader)(_source(file), access="sequential", fail_on="warning")
    except pyvips.Error:
        return None
    return found if found.format in ("uchar", "ushort") else None


def _source(file: bytes | str | Path) -> Any:
    if isinstance(file, bytes):
        return vips().Source.new_from_memory(file)
    descriptor = _descriptor(file)  # its own: Pillow's has a position
    try:
        return vips().Source.new_from_descriptor(descriptor)  # which it duplicates
    finally:
        os.close(descriptor)


def _fetched(image: Any) -> Iterator[np.ndarray]:
    pyvips = vips()
    region, rows = pyvips.Region.new(image), max(1, _STRIP_PIXELS // image.width)
    dtype = np.uint8 if image.format == "uchar" else np.uint16
    for top in range(0, image.height, rows):
        height = min(rows, image.height - top)
        try:
            fetched = region.fetch(0, top, image.width, height)
        except pyvips.Error as error:
            told = error.detail.strip().splitlines() or [error.message]  # the last line is of now
            kind = LooksDamagedError if image.width * image.height <= MAX_PIXELS else BadSampleError
            raise kind(f"the image does not decode: {told[-1]}") from error
        strip = np.frombuffer(fetched, dtype).reshape(height, image.width, image.bands)
        yield _as_rgb(strip if dtype is np.uint8 else (strip >> 8).astype(np.uint8))


def _as_rgb(strip: np.ndarray) -> np.ndarray:
    """From grey or RGB, with alpha or without."""
    return strip[:, :, :3] if strip.shape[2] > 2 else np.repeat(strip[:, :, :1], 3, axis=2)


def _is_plain(image: Any) -> bool:
    """Whether it is a PPM whose bytes are its pixels."""
    tiles = image.tile
    return image.format == "PPM" and image.mode in ("L", "RGB") and len(tiles) == 1 and tiles[0][0] == "raw"


def _rows(file: IO[bytes], image: Any) -> Iterator[np.ndarray]:
    (width, height), channels = image.size, len(image.mode) if image.mode == "RGB" else 1
    rows = max(1, _STRIP_PIXELS // width)
    file.seek(image.tile[0][2])
    for top in range(0, height, rows):
        size = min(rows, height - top) * width * channels
        data = _read(file, size)
        if len(data) < size:
            raise BadSampleError(f"the image does not decode: it is cut short in row {top + len(data) // width}")
        yield _as_rgb(np.frombuffer(data, np.uint8).reshape(-1, width, channels))


def _cut(image: ImageFile) -> Iterator[np.ndarray]:
    whole = np.asarray(decoded(image))
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, len(whole), rows):
        yield whole[top:top + rows]


if __name__ == "__main__":
    raise SystemExit("vir.data.strip_decoding is a part of the library; the program is vir-predict")
