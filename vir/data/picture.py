"""One image file's bytes on their way into a shard: checked, and re-encoded only where the settings ask for it."""

import re
import subprocess
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import PIL
from PIL import Image, features

from vir.data.decode import FOREIGN, FORMATS, BadSampleError, Header, decode_image, find_format, read_header
from vir.errors import SettingsError, VirError

ON_ERROR = ("fail", "skip", "fix")
CHECKS = ("header", "decode")
TRANSCODES = ("baseline",)

_FIX_QUALITY = 100
_MENDED = "re-encoded as RGB JPEG"
_JPEG_SIDE = 65_500  # libjpeg's limit, in pixels
_JPEGTRAN_SECONDS = 120  # measured: 0.8 s for 20 megapixels


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    on_error: str = "fail"
    """fix: re-encode what is no RGB JPEG, PNG or WebP. fail, skip: do not; both raise alike, the caller acts on it."""
    check: str = "header"
    """header: parse the header, and decode files that do not end as their format requires. decode: decode all."""
    resize_short: int | None = None
    """Images whose shorter side is larger are scaled down to this many pixels."""
    quality: int = 95
    """Of the JPEGs that are resized, 1 to 100."""
    transcode: str | None = None
    """baseline: rewrite progressive JPEGs, with the same coefficients, so that they decode faster."""

    def __post_init__(self) -> None:
        for flag, value, choices in (("--on-error", self.on_error, ON_ERROR), ("--check", self.check, CHECKS),
                                     ("--transcode", self.transcode, (None, *TRANSCODES))):
            if value not in choices:
                raise SettingsError(f"{flag} must be one of {', '.join(filter(None, choices))}, got {value!r}")
        if self.resize_short is not None and not 1 <= self.resize_short <= _JPEG_SIDE:
            raise SettingsError(f"--resize-short must be from 1 to {_JPEG_SIDE:,} pixels, got {self.resize_short}")
        if not 1 <= self.quality <= 100:
            raise SettingsError(f"--quality must be from 1 to 100, got {self.quality}")


class Picture(NamedTuple):
    data: bytes
    extension: str
    """jpg, png or webp."""
    width: int
    height: int
    """In pixels."""
    change: str | None
    """What was done to the file; one of a few sentences, so that they can be counted. None: it is unchanged."""

    @property
    def is_fixed(self) -> bool:
        """Whether the file was of a kind that is mended, and not only larger or slower to decode than asked."""
        return self.change is not None and _MENDED in self.change


def prepare_picture(data: bytes, filename: str, settings: PictureSettings) -> Picture:
    """The bytes to write for the image file `filename`, whose bytes are `data`.

    The same input gives the same bytes in every process with the same `encoder_versions`. Re-encoded images have the
    colours that `decode_image` gives, and no metadata.

    Raises:
        BadSampleError: not a complete image, or not one that can be re-encoded as asked.
        SettingsError: jpegtran is needed and missing.
    """
    if settings.on_error == "fix" and (foreign := find_format(data, FOREIGN)):
        return _encode(decode_image(data, FOREIGN), f"{foreign.name} {_MENDED}", settings)
    header = read_header(data)
    misfit = _misfit(header, filename) if settings.on_error == "fix" else None
    if misfit or _shrinks(header.width, header.height, settings):
        return _encode(decode_image(data), misfit, settings)
    if settings.check == "decode":
        decode_image(data)
    if settings.transcode == "baseline" and header.progressive and (baseline := _to_baseline(data)):
        return Picture(baseline, *header[:3], change="progressive JPEG transcoded to baseline")
    return Picture(data, header.extension, header.width, header.height, change=None)


def encoder_versions(settings: PictureSettings) -> dict[str, str]:
    """The programs on whose versions the bytes of the changed images depend; empty if no setting changes any.

    Raises:
        SettingsError: one of them is missing.
    """
    versions = {}
    if settings.on_error == "fix" or settings.resize_short is not None:
        # Builds of one Pillow differ in the libraries that decode and encode.
        libraries = ("libjpeg_turbo", "webp", "libtiff")
        versions = {"pillow": PIL.__version__, **{name: str(features.version(name)) for name in libraries}}
    if settings.transcode is not None:
        versions["jpegtran"] = jpegtran_version()
    return versions


def jpegtran_version() -> str:
    """Such as "libjpeg-turbo 2.1.5".

    Raises:
        SettingsError: it is missing, or not that of libjpeg-turbo.
    """
    done = _jpegtran("-version")
    told = (done.stdout + done.stderr).decode(errors="replace").strip()
    if found := re.search(r"libjpeg-turbo version (\S+)", told):
        return f"libjpeg-turbo {found[1]}"
    # mozjpeg's would make the files progressive again.
    raise SettingsError(f"--transcode needs the jpegtran of libjpeg-turbo, the one installed says {told[:60]!r}; put "
                        "that of the package libjpeg-turbo-progs first on the PATH")


def _misfit(header: Header, filename: str) -> str | None:
    """What is done to an image that readers of RGB JPEGs could stumble over; None for all others.

    Grey JPEGs are none: every decoder makes them RGB without loss.
    """
    if header.colours in ("CMYK", "YCCK"):
        return f"{header.colours} JPEG {_MENDED}"
    if header.extension != "jpg" and filename.lower().endswith((".jpg", ".jpeg")):
        name = next(kind.name for kind in FORMATS if kind.extension == header.extension)
        return f"{name} named as a JPEG {_MENDED}"
    return None


def _shrinks(width: int, height: int, settings: PictureSettings) -> bool:
    return settings.resize_short is not None and min(width, height) > settings.resize_short


def _encode(image: Image.Image, change: str | None, settings: PictureSettings) -> Picture:
    """The RGB `image` as a JPEG, scaled down if the settings ask for it.

    A mended image keeps its full colour resolution, so that only rounding is lost. A resized one has that of
    photographs, a half (4:2:0), and so does not grow beyond the file it comes from.
    """
    options = {"quality": _FIX_QUALITY, "subsampling": "4:4:4"}
    if _shrinks(*image.size, settings):
        image = image.resize(_short_side(*image.size, settings.resize_short or 0), Image.Resampling.BICUBIC)
        options = {"quality": settings.quality, "subsampling": "4:2:0"}
        change = f"{change}, resized" if change else f"resized to short side {settings.resize_short}"
    if max(image.size) > _JPEG_SIDE:
        raise BadSampleError(f"{image.width} x {image.height} pixels do not fit into a JPEG, whose sides have at most "
                             f"{_JPEG_SIDE:,}")
    image.info.clear()  # Pillow would write some of it: comments, not profiles
    file = BytesIO()
    image.save(file, "JPEG", optimize=False, progressive=False, **options)
    return Picture(file.getvalue(), "jpg", *image.size, change)


def _short_side(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height with `short` for the shorter, the longer in proportion, halves rounded up."""
    shorter = min(width, height)
    return (2 * width * short + shorter) // (2 * shorter), (2 * height * short + shorter) // (2 * shorter)


def _to_baseline(data: bytes) -> bytes | None:
    """The same coefficients and metadata as a baseline JPEG with optimal Huffman tables; None if pixels would change.

    They would in damaged files, whose damage each decoder passes over in its own way, and in those whose last scans are
    missing: decoders smooth the blocks of a progressive JPEG where it leaves coefficients open.
    """
    try:
        done = _jpegtran("-copy", "all", "-optimize", data=data)
    except subprocess.TimeoutExpired:
        raise BadSampleError(f"jpegtran was not done with it after {_JPEGTRAN_SECONDS} s") from None
    told = done.stderr.decode(errors="replace").strip()
    if done.returncode < 0 or "memory" in told.lower():
        raise VirError(f"jpegtran ended with {done.returncode} {told!r}, perhaps out of memory; try fewer --workers")
    before = decode_image(data)
    written = done.returncode in (0, 2)  # 2: with warnings
    return done.stdout if written and decode_image(done.stdout).tobytes() == before.tobytes() else None


def _jpegtran(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["jpegtran", *arguments], input=data, capture_output=True, timeout=_JPEGTRAN_SECONDS)
    except (FileNotFoundError, PermissionError) as error:
        raise SettingsError("--transcode needs the program jpegtran, which is not installed; install it (apt-get "
                            "install libjpeg-turbo-progs), or leave out --transcode") from error
    except OSError as error:
        raise VirError(f"cannot start jpegtran: {error.strerror}; try fewer --workers") from error
