"""The format, size and pixels of an image file, from its bytes."""

import logging
import re
import warnings
from io import BytesIO
from typing import IO, NamedTuple

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vir.data import jpeg
from vir.data.jpeg import Box
from vir.errors import DataError


class ImageFormat(NamedTuple):
    name: str
    extension: str
    magic: re.Pattern[bytes]
    """Of the first bytes."""
    parser: type[ImageFile]
    """Pillow's. Called as it is: Image.open would warn of, and refuse, sizes by a limit that any module may change."""


FORMATS = (
    ImageFormat("JPEG", "jpg", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ImageFormat("PNG", "png", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ImageFormat("WebP", "webp", re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImageFile),
)
"""The formats that shards may hold; no other parser is tried on the bytes."""

FOREIGN = (
    ImageFormat("GIF", "gif", re.compile(rb"GIF8[79]a"), GifImageFile),
    ImageFormat("BMP", "bmp", re.compile(rb"BM"), BmpImageFile),
    ImageFormat("TIFF", "tiff", re.compile(rb"II\*\x00|MM\x00\*"), TiffImageFile),
    ImageFormat("PPM", "ppm", re.compile(rb"P[1-6]\s"), PpmImageFile),
)
"""Formats that can be re-encoded: Pillow decodes them alone, by code that it ships, without starting a program."""

MAX_PIXELS = 178_956_970
"""Of a decoded image: half a gigabyte. Pillow, too, speaks of a decompression bomb beyond."""

_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"

# Pillow warns of broken EXIF, which many photographs have and nothing here reads, and logs what it raises. Silenced
# once: a filter set around each image would make every other warning of the process appear again and again.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class BadSampleError(DataError):
    """The bytes were read without error but are not a valid image; a loader may use another sample instead."""


class Header(NamedTuple):
    extension: str
    """jpg, png or webp."""
    width: int
    height: int
    """In pixels."""
    colours: str
    """Pillow's name of the mode; YCCK for a CMYK JPEG that is stored as luminance, two chrominances and black."""
    progressive: bool
    """A JPEG whose coefficients come in several scans."""


def find_format(data: bytes, formats: tuple[ImageFormat, ...]) -> ImageFormat | None:
    """The one of `formats` that the first bytes are of."""
    return next((kind for kind in formats if kind.magic.match(data)), None)


def inspect_image(data: bytes) -> tuple[str, int, int]:
    """Extension, width and height of `read_header`, which see."""
    return read_header(data)[:3]


def read_header(data: bytes) -> Header:
    """What an image is, from the bytes alone, not from the file's name.

    Parses only the header. If the file does not end as its format requires, also decodes the pixels: this finds
    truncated and zero-filled files (except WebP with metadata), and accepts extra bytes after a complete image.

    Raises:
        BadSampleError: empty, another format, broken header, more than MAX_PIXELS, truncated.
    """
    kind = kind_of(data, FORMATS)
    with _open(data, kind) as image:
        ycck = image.mode == "CMYK" and image.info.get("adobe_transform") == 2
        header = Header(kind.extension, *image.size, "YCCK" if ycck else image.mode, "progressive" in image.info)
    if not _ends_well(kind.extension, data):
        decode_image(data.rstrip(b"\x00"))  # libjpeg would decode the zeros of a half-written file as pixels
    return header


class EncodedImage:
    """An image file whose header was read; its pixels are decoded when and where they are asked for.

    Made by open_image, which see.
    """

    def __init__(self, data: bytes, image: ImageFile) -> None:
        self.width, self.height = image.size
        self._data, self._image = data, image

    def pixels(self, box: Box | None = None) -> np.ndarray:
        """Those that decode_image gives, [h, w, 3] uint8, of the box or of the whole image. To be asked for once.

        Raises:
            BadSampleError: as decode_image, also where only pixels outside the box are missing.
        """
        box = box or Box(0, 0, self.height, self.width)
        if self._image.format == "JPEG" and self._image.mode != "CMYK":
            found = jpeg.decode(self._data, self._image.size, box)
            if found is not None:
                return found
        whole = decoded(self._image)
        return np.array(whole.crop((box.left, box.top, box.left + box.width, box.top + box.height)))


def open_image(data: bytes, formats: tuple[ImageFormat, ...] = FORMATS) -> EncodedImage:
    """Reads the header of an image of one of `formats`.

    Raises:
        BadSampleError: the header is broken, or says more than MAX_PIXELS.
    """
    return EncodedImage(data, _open(data, kind_of(data, formats)))


def decode_image(data: bytes, formats: tuple[ImageFormat, ...] = FORMATS) -> Image.Image:
    """All pixels as RGB; of several frames or pages the first.

    As in torchvision and timm, alpha is dropped, EXIF orientation is not applied and colour profiles are not heeded.
    Unlike in those, 16-bit grey keeps its high byte (Pillow's own conversion clips it to white). JPEGs of four
    components hold inverted ink, whether or not they have an Adobe marker: so take them Pillow, torchvision, OpenCV,
    libvips, ImageMagick and browsers.

    Raises:
        BadSampleError: the bytes are not a complete image of one of `formats`, or it has more than MAX_PIXELS.
    """
    return decoded(_open(data, kind_of(data, formats)))


def decoded(opened: ImageFile) -> Image.Image:
    """All pixels of a parsed image as RGB. It is closed. Raises BadSampleError, as decode_image."""
    with opened as image:
        try:
            image.load()
            return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, ... on broken bytes
            raise BadSampleError(f"the image does not decode: {error}") from error


def kind_of(data: bytes, formats: tuple[ImageFormat, ...]) -> ImageFormat:
    """As find_format; BadSampleError where it is none of them."""
    if not data:
        raise BadSampleError("the file is empty")
    if kind := find_format(data, formats):
        return kind
    *names, last = [kind.name for kind in formats]
    seen = f"begins with {data[:12]!r}" if data.strip(b"\x00") else "is filled with zeros"
    raise BadSampleError(f"neither {', '.join(names)} nor {last}: it {seen}")


def _open(data: bytes, kind: ImageFormat) -> ImageFile:
    image = parsed(BytesIO(data), kind)
    check_pixels(image)
    return image


def parsed(file: IO[bytes], kind: ImageFormat) -> ImageFile:
    """An image whose header is read, from the start of the file. Raises BadSampleError where that is broken."""
    file.seek(0)
    try:
        return kind.parser(file)
    except MemoryError:
        raise
    except Exception as error:
        raise BadSampleError(f"the image header is broken: {error}") from error


def check_pixels(image: ImageFile) -> None:
    """Raises BadSampleError where it has more than MAX_PIXELS."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,}; it could be a "
                             "decompression bomb")


def _ends_well(extension: str, data: bytes) -> bool:
    if extension == "webp":  # libwebp decodes zeros as pixels; extended files (VP8X) may end in zeros
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
        return whole and (data[12:16] == b"VP8X" or not data.endswith(bytes(16)))
    return data.rstrip(b"\x00").endswith(b"\xff\xd9" if extension == "jpg" else _PNG_END)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise BadSampleError("its pixels are 32-bit numbers, of which no brightness is known to be white")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's modes "I;16", "I;16B" and, of PPM and in older versions, "I"
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # avoids a warning of Pillow's; same colours
    return image.convert("RGB")
