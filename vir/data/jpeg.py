"""JPEG files by decoders that are quicker than Pillow and give its pixels to the bit.

All of them, Pillow too, are libjpeg-turbo with its accurate DCT and its smooth upsampling. They differ in what they
make of broken files, so here they are only asked where that cannot matter: a file that simplejpeg finds a fault with,
or that is of ink, is left to Pillow; nvImageCodec, which looks at no more of a file than it decodes, gets none but
files whose one scan is seen to be whole. tests/test_jpeg.py compares them on thousands of broken files.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import simplejpeg  # type: ignore[import-untyped]

from vir.errors import SettingsError

VARIABLE = "VIR_DECODER"
"""Of the environment. Chooses one of DECODERS, to measure or to compare; by default it is the quickest one there."""

DECODERS = ("pillow", "simplejpeg", "nvimgcodec")

_NVIMGCODEC = "nvidia.nvimgcodec"
_ITS_CODECS = "NVIMGCODEC_EXTENSIONS_PATH"
_OTHER_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""Of those that do not belong into a scan."""
_importing, _of_thread = threading.Lock(), threading.local()
_SOS, _SEQUENTIAL, _TABLES = 0xDA, (0xC0, 0xC1), 0xC4


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def decodes_fast() -> bool:
    """Whether JPEGs are decoded here by the quickest of DECODERS."""
    return decoder() == DECODERS[-1]


def decoder() -> str:
    """The one of DECODERS that JPEGs are decoded by here.

    Raises:
        SettingsError: the environment asks for another one, or for one that is not installed.
    """
    best = DECODERS[-1] if has_nvimgcodec() else DECODERS[-2]
    asked = os.environ.get(VARIABLE) or best
    if asked not in DECODERS:
        raise SettingsError(f"{VARIABLE} must be one of {', '.join(DECODERS)}, got {asked!r}")
    if asked == DECODERS[-1] != best:
        raise SettingsError(f"{VARIABLE} is {asked}, which is not installed: pip install 'vir-at-scale[fast]', or "
                            f"choose one of {', '.join(DECODERS[:-1])}")
    return asked


def decode(data: bytes, size: tuple[int, int], box: Box) -> np.ndarray | None:
    """RGB pixels [h, w, 3] uint8, those of Pillow; None: Pillow is to be asked.

    Args:
        data: a file whose header Pillow has read, and not of ink.
        size: width and height, as Pillow has read them.
        box: within the image.
    """
    by = decoder()
    if by == "pillow":
        return None
    if by == "nvimgcodec" and is_one_whole_scan(data):
        pixels = _by_nvimgcodec(data, box)
        if pixels is not None:
            return pixels
    try:
        whole = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    if whole.shape[1::-1] != size:
        return None
    return whole[box.top:box.top + box.height, box.left:box.left + box.width]


def is_one_whole_scan(data: bytes) -> bool:
    """Whether it is sequential and Huffman coded, with all components in one scan that nothing but the end follows."""
    at, components = 2, 0
    try:
        while True:
            mark, kind = data[at:at + 2]
            if mark != 0xFF or kind == 0xFF or (0xC0 <= kind <= 0xCF and kind not in (*_SEQUENTIAL, _TABLES)):
                return False
            if kind in _SEQUENTIAL:
                if components:
                    return False
                components = data[at + 9]
            if kind == _SOS and data[at + 4] != components:
                return False
            at += 2 + int.from_bytes(data[at + 2:at + 4], "big")
            if kind == _SOS:
                break
    except (ValueError, IndexError):  # the data end
        return False
    found = _OTHER_MARKER.search(data, at)
    return found is not None and found.start() == len(data) - 2 and data.endswith(b"\xff\xd9")


def _by_nvimgcodec(data: bytes, box: Box) -> np.ndarray | None:
    nvimgcodec, codec, parameters = _nvimgcodec()
    top, left, height, width = box
    try:
        region = nvimgcodec.Region(top, left, top + height, left + width)
        image = codec.decode(nvimgcodec.CodeStream(data).get_sub_code_stream(0, region), params=parameters)
    except RuntimeError:
        return None
    return None if image is None else np.asarray(image)


@functools.cache
def has_nvimgcodec() -> bool:
    """Whether the extra `fast` is installed."""
    try:
        return importlib.util.find_spec(_NVIMGCODEC) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _nvimgcodec() -> tuple[ModuleType, Any, Any]:
    """Module, decoder and parameters; each thread makes its own, and one that a process has inherited is not touched.
    """
    by_process: dict[int, tuple[ModuleType, Any, Any]] = vars(_of_thread).setdefault("by_process", {})
    if os.getpid() not in by_process:
        with _importing:
            module = _import_nvimgcodec()
        backends = [module.Backend(module.BackendKind.CPU_ONLY)]
        codec = module.Decoder(device_id=module.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)
        by_process[os.getpid()] = module, codec, module.DecodeParams(apply_exif_orientation=False)
    return by_process[os.getpid()]


@functools.cache
def _import_nvimgcodec() -> ModuleType:
    """It loads all codecs of its folder, and prints which of them lack CUDA's libraries; shown one, it loads one."""
    spec = importlib.util.find_spec(_NVIMGCODEC)
    assert spec is not None and spec.origin is not None
    folder, before = Path(spec.origin).parent / "extensions", os.environ.get(_ITS_CODECS)
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # libjpeg-turbo itself still warns of damaged pixels
    with tempfile.TemporaryDirectory() as one:
        for library in folder.glob("libjpeg_turbo_ext.so*"):
            Path(one, library.name).symlink_to(library)
        os.environ[_ITS_CODECS] = one
        try:
            return importlib.import_module(_NVIMGCODEC)
        except (ImportError, OSError) as error:
            raise SettingsError(f"{_NVIMGCODEC} is installed and cannot be imported: {error}; install it anew by pip "
                                f"install --force-reinstall 'vir-at-scale[fast]', or set {VARIABLE}={DECODERS[-2]}"
                                ) from error
        finally:
            del os.environ[_ITS_CODECS]
            if before is not None:
                os.environ[_ITS_CODECS] = before


if __name__ == "__main__":
    raise SystemExit("vir.data.jpeg is a part of the library; the program is vir-train")
