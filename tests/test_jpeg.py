"""Every decoder gives the same pixels or the same refusal, whatever happened to the file."""

import os
import random
import shutil
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from vir.data import jpeg
from vir.data.decode import MAX_PIXELS, BadSampleError, decode_image, open_image
from vir.data.jpeg import DECODERS, VARIABLE, Box
from vir.errors import SettingsError

INSTALLED = [name for name in DECODERS if name != "nvimgcodec" or jpeg.has_nvimgcodec()]


def photograph(width=193, height=131, seed=0):
    """Smooth shapes, edges and grain, so that all coefficients occur."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    grain = rng.integers(-12, 13, (height, width, 3))
    smooth = np.asarray(image.resize((width, height), Image.BICUBIC)).astype(int) + grain
    smooth[height // 3:height // 2, width // 4:width // 2] = (200, 30, 90)
    return Image.fromarray(smooth.clip(0, 255).astype(np.uint8))


def encode(image, **options):
    file = BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def arithmetic(folder):
    (folder / "in.jpg").write_bytes(GOOD["4:2:0"])
    return subprocess.run(["jpegtran", "-arithmetic", "-copy", "all", str(folder / "in.jpg")], check=True,
                          capture_output=True).stdout


def sampled_1x4(folder):
    """A sampling that simplejpeg has no name for."""
    photograph().save(folder / "in.ppm")
    return subprocess.run(["cjpeg", "-sample", "1x4", str(folder / "in.ppm")], check=True, capture_output=True).stdout


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


GOOD = {
    "4:4:4": encode(photograph(), subsampling=0),
    "4:2:2": encode(photograph(), subsampling=1),
    "4:2:0": encode(photograph(), subsampling=2),
    "progressive": encode(photograph(), progressive=True),
    "restarts": encode(photograph(), restart_marker_rows=1),
    "RGB": encode(photograph(), keep_rgb=True),
    "grey": encode(photograph().convert("L")),
    "CMYK": encode(photograph().convert("CMYK")),
    "quality 100": encode(photograph(), quality=100),
    "quality 5": encode(photograph(), quality=5),
    "turned by EXIF": encode(photograph(), exif=exif(6)),
    "followed by bytes": encode(photograph()) + b"tail",
    "followed by zeros": encode(photograph()) + bytes(9),
    "one pixel": encode(photograph(16, 16).resize((1, 1))),
    "one row": encode(photograph(333, 8).resize((333, 1))),
    "40,000 pixels wide": encode(photograph(400, 16).resize((40_000, 16))),
    "40,000 pixels high": encode(photograph(16, 400).resize((16, 40_000))),
}


def told(data, box=None):
    """The pixels, or the refusal."""
    try:
        image = open_image(data)
        return image.width, image.height, image.pixels(box).tobytes()
    except BadSampleError as error:
        return str(error)


def boxes(width, height):
    rng = random.Random(width)
    yield None
    for _ in range(6):
        h, w = rng.randint(1, height), rng.randint(1, width)
        yield Box(rng.randint(0, height - h), rng.randint(0, width - w), h, w)


@pytest.fixture(params=INSTALLED)
def decoder(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("name", GOOD)
def test_every_part_of_a_good_file_is_pillows_to_the_bit(decoder, name):
    whole = np.asarray(decode_image(GOOD[name]))
    for box in boxes(whole.shape[1], whole.shape[0]):
        top, left, height, width = box or (0, 0, *whole.shape[:2])
        expected = whole[top:top + height, left:left + width]
        found = open_image(GOOD[name]).pixels(box)
        assert found.flags.writeable and np.array_equal(found, expected)


@pytest.mark.parametrize("made, marker", [(arithmetic, b"\xff\xc9"), (sampled_1x4, b"\x01\x14\x00")])
def test_what_pillow_cannot_write_is_decoded_as_by_pillow(decoder, made, marker, tmp_path):
    if not shutil.which("cjpeg"):
        pytest.skip("cjpeg and jpegtran are not installed (libjpeg-turbo-progs)")
    data = made(tmp_path)
    assert data[:2] == b"\xff\xd8" and marker in data
    assert np.array_equal(open_image(data).pixels(), np.asarray(decode_image(data)))


@pytest.mark.parametrize("segment, said", [
    (b"\xff\xe0\x00\x07JFIF\x00", "unpack_from requires a buffer"),
    (b"\xff\xee\x00\x07Adobe", "unpack_from requires a buffer"),
    (b"\xff\xe2\x00\x0eICC_PROFILE\x00", "index out of range"),
    (b"\xff\x01", "no marker found"),
])
def test_a_header_that_pillow_refuses_is_refused(decoder, segment, said):
    """Conversion refuses it, too; libjpeg-turbo would decode what follows."""
    data = GOOD["4:2:0"]
    with pytest.raises(BadSampleError, match=f"the image header is broken: .*{said}"):
        open_image(data[:2] + segment + data[2:])


@pytest.mark.parametrize("name", ["4:2:0", "progressive", "grey", "CMYK"])
def test_a_file_that_is_truncated_at_any_tenth_is_refused_also_where_the_crop_is_there(decoder, name):
    data, box = GOOD[name], Box(0, 0, 8, 8)
    for tenth in range(10):
        part = data[:len(data) * tenth // 10]
        with pytest.raises(BadSampleError):
            open_image(part).pixels(box)
        os.environ[VARIABLE], before = "pillow", os.environ[VARIABLE]
        expected = told(part)
        os.environ[VARIABLE] = before
        assert told(part, box) == expected  # the same refusal, in the same words


def test_a_size_that_is_no_image_is_refused_before_anything_is_decoded(decoder):
    data = bytearray(GOOD["4:2:0"])
    at = data.index(b"\xff\xc0") + 5
    data[at:at + 4] = (40_000).to_bytes(2, "big") * 2
    with pytest.raises(BadSampleError, match=f"40000 x 40000 pixels, more than {MAX_PIXELS:,}.*bomb"):
        open_image(bytes(data))


def damage(data, rng):
    data, kind = bytearray(data), rng.choice(["bit", "bytes", "cut", "early end", "zeros", "whole"])
    if kind == "bit":
        data[rng.randrange(2, len(data))] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        for _ in range(5):
            data[rng.randrange(len(data) // 3, len(data))] = rng.randrange(256)
    elif kind == "cut":
        data = data[:rng.randrange(4, len(data))]
    elif kind == "early end":
        data = data[:rng.randrange(4, len(data))] + b"\xff\xd9"
    elif kind == "zeros":
        at = rng.randrange(len(data) // 3, len(data) - 40)
        data[at:at + 40] = bytes(40)
    return bytes(data)


def a_box_of(data, rng):
    """Any, where the header is broken; None: the image would take long."""
    try:
        image = open_image(data)
    except BadSampleError:
        return Box(0, 0, 1, 1)
    return None if image.width * image.height > 10**6 else rng.choice(list(boxes(image.width, image.height))[1:])


def test_damaged_files_give_the_same_pixels_or_the_same_refusal(monkeypatch):
    """The decoders differ there by themselves: strict ones refuse, regions do not see what lies beyond them."""
    rng, seen, names = random.Random(0), set(), [name for name in GOOD if not name.startswith("40")]
    for _ in range(1_500):
        data = damage(GOOD[rng.choice(names)], rng)
        box = a_box_of(data, rng)
        found = set()
        for name in INSTALLED if box else ():
            monkeypatch.setenv(VARIABLE, name)
            found.add(told(data, box))
        assert len(found) < 2
        seen |= {type(answer) for answer in found}
    assert seen == {str, tuple}


def test_a_region_is_asked_for_where_the_scan_is_seen_to_be_whole():
    whole = {name for name, data in GOOD.items() if jpeg.is_one_whole_scan(data)}
    assert set(GOOD) - whole == {"progressive", "followed by bytes", "followed by zeros"}
    assert not any(jpeg.is_one_whole_scan(GOOD["4:2:0"][:end]) for end in range(2, len(GOOD["4:2:0"]), 97))
    of_light = GOOD["4:2:0"].replace(b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11", b"\xff\xda\x00\x08\x01\x01\x00")
    assert of_light != GOOD["4:2:0"] and not jpeg.is_one_whole_scan(of_light)  # one of three components


def test_the_quickest_decoder_that_is_there_is_chosen(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert jpeg.decoder() == INSTALLED[-1]
    monkeypatch.setattr(jpeg, "has_nvimgcodec", lambda: False)
    assert jpeg.decoder() == "simplejpeg"
    monkeypatch.setenv(VARIABLE, "nvimgcodec")
    with pytest.raises(SettingsError, match=r"VIR_DECODER is nvimgcodec, which is not installed: .*\[fast\].*pillow"):
        jpeg.decoder()
    monkeypatch.setenv(VARIABLE, "libjpeg")
    with pytest.raises(SettingsError, match="must be one of pillow, simplejpeg, nvimgcodec, got 'libjpeg'"):
        jpeg.decoder()


@pytest.mark.skipif("nvimgcodec" not in INSTALLED, reason="nvidia-nvimgcodec is not installed (extra: fast)")
def test_nvimgcodec_decodes_the_region_and_does_not_speak_of_itself(tmp_path):
    """By default of CUDA's libraries when it is loaded, and of each file that it refuses."""
    (tmp_path / "a.jpg").write_bytes(GOOD["4:2:0"])
    (tmp_path / "b.jpg").write_bytes(GOOD["4:2:0"][:-300] + bytes(298) + b"\xff\xd9")
    run = subprocess.run([sys.executable, "-c", f"""
from vir.data import jpeg
read = lambda name: open({str(tmp_path)!r} + "/" + name, "rb").read()
assert jpeg._by_nvimgcodec(read("a.jpg"), jpeg.Box(3, 5, 7, 11)).shape == (7, 11, 3)
jpeg._by_nvimgcodec(read("b.jpg"), jpeg.Box(3, 5, 7, 11))
assert jpeg._by_nvimgcodec(read("a.jpg")[:500], jpeg.Box(3, 5, 7, 11)) is None
"""], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.skipif("nvimgcodec" not in INSTALLED, reason="nvidia-nvimgcodec is not installed (extra: fast)")
def test_threads_that_begin_together_decode_by_nvimgcodec(tmp_path):
    """In a process that has not imported it: each of them would."""
    (tmp_path / "a.jpg").write_bytes(GOOD["4:2:0"])
    code = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from vir.data import jpeg

data, together, before = open(sys.argv[1], "rb").read(), Barrier(8), dict(os.environ)

def decode(number):
    together.wait()
    return jpeg._by_nvimgcodec(data, jpeg.Box(number, 5, 70, 110)).tobytes()

with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(decode, range(8)))
assert found == [jpeg._by_nvimgcodec(data, jpeg.Box(number, 5, 70, 110)).tobytes() for number in range(8)]
assert {**os.environ, "PYNVIMGCODEC_VERBOSITY": ""} == {**before, "PYNVIMGCODEC_VERBOSITY": ""}
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.jpg"], check=True, timeout=100)


def test_an_nvimgcodec_that_does_not_import_is_named(tmp_path):
    package = tmp_path / "nvidia" / "nvimgcodec"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    (tmp_path / "a.jpg").write_bytes(GOOD["4:2:0"])
    run = subprocess.run([sys.executable, "-c", """
import sys
sys.path.insert(0, sys.argv[1])
from vir.data import jpeg
from vir.errors import SettingsError
try:
    jpeg.decode(open(sys.argv[1] + "/a.jpg", "rb").read(), (193, 131), jpeg.Box(0, 0, 8, 8))
except SettingsError as error:
    print(error)
""", str(tmp_path)], capture_output=True, text=True, timeout=120, env={**os.environ, VARIABLE: "nvimgcodec"})
    assert (run.stdout, run.stderr) == (
        "nvidia.nvimgcodec is installed and cannot be imported: libfoo.so.1: cannot open shared object file; install "
        "it anew by pip install --force-reinstall 'vir-at-scale[fast]', or set VIR_DECODER=simplejpeg\n", "")
