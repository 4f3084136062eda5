"""The format, size and pixels of an image file, from its bytes."""

from io import BytesIO

import numpy as np
from PIL import Image

from vir.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
"""The formats that shards may hold, by Pillow's names; Pillow tries no other parser on the bytes."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class BadSampleError(DataError):
    """The bytes were read without error but are not a valid image; a loader may use another sample instead."""


def inspect_image(data: bytes) -> tuple[str, int, int]:
    """Extension (jpg, png or webp), width and height in pixels, from the bytes alone, not from the file's name.

    Parses only the header. If the file does not end as its format requires, also decodes the pixels: this finds
    truncated and zero-filled files (except WebP with metadata), and accepts extra bytes after a complete image.

    Raises:
        BadSampleError: empty, another format, broken header, too many pixels (Pillow's limit, 179 million), truncated.
    """
    extension = _kind(data)
    with _open(data) as image:
        width, height = image.size
    if not _ends_well(extension, data):
        decode_image(data.rstrip(b"\x00"))  # libjpeg would decode the zeros of a half-written file as pixels
    return extension, width, height


def decode_image(data: bytes) -> Image.Image:
    """All pixels as RGB.

    As in torchvision and timm, alpha is dropped and EXIF orientation is not applied. Unlike in those, 16-bit grey keeps
    its high byte (Pillow's own conversion clips it to white).

    Raises:
        BadSampleError: the bytes are not a complete JPEG, PNG or WebP image.
    """
    _kind(data)
    with _open(data) as image:
        try:
            image.load()
            return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, ... on broken bytes
            raise BadSampleError(f"the image does not decode: {error}") from error


def _kind(data: bytes) -> str:
    if not data:
        raise BadSampleError("the file is empty")
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(_PNG_MAGIC):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadSampleError(f"neither JPEG, PNG nor WebP: it begins with {data[:12]!r}")


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadSampleError("the image header is broken") from error
    except Exception as error:
        raise BadSampleError(f"the image header is broken: {error}") from error
    if min(image.size) < 1:
        raise BadSampleError(f"the image has {image.width} x {image.height} pixels")
    return image


def _ends_well(extension: str, data: bytes) -> bool:
    if extension == "webp":  # libwebp decodes zeros as pixels; extended files (VP8X) may end in zeros
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
        return whole and (data[12:16] == b"VP8X" or not data.endswith(bytes(16)))
    return data.rstrip(b"\x00").endswith(b"\xff\xd9" if extension == "jpg" else _PNG_END)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's modes "I;16", "I;16B" and, in older versions, "I"
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # avoids a warning of Pillow's; same colours
    return image.convert("RGB")
