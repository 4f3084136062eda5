"""One image file on its way into a shard: every kind of bad file, mended colours, resizing, lossless transcoding."""

import os
import shutil
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin, features

from vir.data.decode import MAX_PIXELS, BadSampleError, decode_image
from vir.data.picture import PictureSettings, encoder_versions, jpegtran_version, prepare_picture
from vir.errors import SettingsError, VirError

needs_jpegtran = pytest.mark.skipif(not shutil.which("jpegtran"), reason="needs the package libjpeg-turbo-progs")

DEFAULT = PictureSettings()
FIX = PictureSettings(on_error="fix")
BASELINE = PictureSettings(transcode="baseline")


def encode(image, kind="JPEG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width=120, height=90, seed=0):
    """Smooth colours and some noise, as of a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noise = np.random.default_rng(seed + 1).integers(-6, 7, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def pixels(data):
    return np.asarray(decode_image(data)).astype(int)


def marker(data, name):
    """Offset of the segment whose content begins with `name`, and its length with the marker."""
    start = data.index(name) - 4
    return start, 2 + int.from_bytes(data[start + 2:start + 4], "big")


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


PNG = encode(photo(), "PNG")
JPEG = encode(photo(), quality=92)
PROGRESSIVE = encode(photo(), quality=92, progressive=True)
GOOD = {
    "a.JPEG": JPEG, "grey.jpg": encode(photo().convert("L")), "progressive.jpg": PROGRESSIVE, "a.png": PNG,
    "alpha.PNG": encode(photo().convert("RGBA"), "PNG"), "a.webp": encode(photo(), "WEBP"), "png in.webp": PNG,
    "jpeg in.png": JPEG,
}


@pytest.mark.parametrize("on_error", ["fail", "skip", "fix"])
@pytest.mark.parametrize("check", ["header", "decode"])
@pytest.mark.parametrize("name", GOOD)
def test_good_files_stay_as_they_are(name, check, on_error):
    extension = {b"\xff": "jpg", b"\x89": "png", b"R": "webp"}[GOOD[name][:1]]
    settings = PictureSettings(on_error=on_error, check=check, resize_short=90)
    assert prepare_picture(GOOD[name], name, settings) == (GOOD[name], extension, 120, 90, None)


def png_with_bomb(place):
    text = png_chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(100 << 20), 9))
    return PNG[:place] + text + PNG[place:]


def bad_files():
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    huge_webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\x00" * 2
    start = JPEG.index(b"\xff\xc0")
    return {
        "empty": (b"", "the file is empty"),
        "zeros": (bytes(5000), "neither JPEG, PNG nor WebP: it is filled with zeros"),
        "a web page": (b"<!DOCTYPE html><h1>404", r"neither JPEG, PNG nor WebP: it begins with b'<!DOCTYPE ht'"),
        "AVIF": (b"\x00\x00\x00\x20ftypavif" + bytes(99), "neither JPEG, PNG nor WebP"),
        "half a JPEG": (JPEG[:len(JPEG) // 2], "does not decode: .*truncated"),
        "half a JPEG, then zeros": (JPEG[:len(JPEG) // 2] + bytes(len(JPEG) // 2), "does not decode: .*truncated"),
        "half a PNG": (PNG[:len(PNG) // 2], "does not decode"),
        "a JPEG's start": (JPEG[:len(JPEG) // 100], "header is broken"),
        "a JPEG of 12 bits": (JPEG[:start + 4] + b"\x0c" + JPEG[start + 5:], "header is broken: .*12-bit"),
        "no pixels": (JPEG[:start + 5] + bytes(4) + JPEG[start + 9:], "header is broken"),
        "absurd JPEG": (JPEG[:start + 5] + b"\xff\xf0" * 2 + JPEG[start + 9:], "65520 x 65520 pixels, more than 178"),
        "absurd PNG": (PNG[:8] + header + PNG[33:], "60000 x 60000 pixels, more than 178,956,970"),
        "absurd WebP": (huge_webp, "header is broken|16384 x 16384 pixels, more than"),
        "a zlib bomb": (png_with_bomb(33), "(?i)header is broken: decompressed data too large"),
    }


BAD = bad_files()


@pytest.mark.parametrize("on_error", ["fail", "skip", "fix"])
@pytest.mark.parametrize("name", BAD)
def test_every_kind_of_bad_file_has_its_reason(name, on_error):
    data, reason = BAD[name]
    with pytest.raises(BadSampleError, match=reason):
        prepare_picture(data, "a.jpg", PictureSettings(on_error=on_error))


def test_damage_within_is_found_by_decoding():
    middle = len(PNG) // 2
    damaged = PNG[:middle] + bytes([PNG[middle] ^ 255]) + PNG[middle + 1:]
    for data, reason in ((damaged, "does not decode"), (png_with_bomb(-12), "(?i)decompressed data too")):
        assert prepare_picture(data, "a.png", DEFAULT).data == data
        with pytest.raises(BadSampleError, match=reason):
            prepare_picture(data, "a.png", PictureSettings(check="decode"))


def damaged_versions(data, count):
    rng = np.random.default_rng(len(data))
    for number in range(count):
        broken = bytearray(data[:int(rng.integers(8, len(data)))] if number % 3 == 0 else data)
        for place in rng.integers(0, min(len(broken), 400 if number % 2 else 1 << 30), 4):
            broken[place] = rng.integers(256)
        yield bytes(broken)


@pytest.mark.filterwarnings("ignore")  # of Pillow's; pytest drops the filter that silences them, see the test below
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_whatever_is_broken_is_told_in_one_sentence(kind):
    settings = PictureSettings(on_error="fix", check="decode", resize_short=30)
    for broken in damaged_versions(encode(photo(60, 40), kind), 120):
        try:
            picture = prepare_picture(broken, "a.jpg", settings)
        except BadSampleError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
        else:
            assert pixels(picture.data).shape[:2] == (picture.height, picture.width)


def test_nothing_is_said_on_the_way():
    """In a process that makes errors of warnings: broken EXIF, a size of which Pillow's Image.open would warn, and a
    broken TIFF, of which Pillow logs an error."""
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00" + b"\x1a\x01\x05\x00\x09\x00\x00\x00\xff\xff\x00\x00" * 2
    broken_exif = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + JPEG[2:]
    with pytest.warns(UserWarning):
        warned = Image.open(BytesIO(broken_exif))
        warned._getexif()
    tiff = encode(photo(8, 8), "TIFF")
    samples = tiff.index(struct.pack("<HHI", 277, 3, 1)) + 8
    tiff = tiff[:samples] + struct.pack("<H", 2048) + tiff[samples + 2:]
    program = """
import sys
from vir.data.decode import BadSampleError
from vir.data.picture import PictureSettings, prepare_picture
jpeg = bytes.fromhex(sys.stdin.readline())
print(prepare_picture(jpeg, "a.jpg", PictureSettings(on_error="fix", check="decode"))[1:])
print(prepare_picture(bytes.fromhex(sys.stdin.readline()), "b.png", PictureSettings())[1:])
try:
    prepare_picture(bytes.fromhex(sys.stdin.readline()), "c.jpg", PictureSettings(on_error="fix"))
except BadSampleError as error:
    print(error)
print("torch" in sys.modules)
"""
    large = encode(Image.new("1", (10000, 10000)), "PNG")
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], text=True, capture_output=True,
                          input=f"{broken_exif.hex()}\n{large.hex()}\n{tiff.hex()}\n")
    assert done.stderr == ""
    *good, bad, torch_is_loaded = done.stdout.splitlines()
    assert good == ["('jpg', 120, 90, None)", "('png', 10000, 10000, None)"] and torch_is_loaded == "False"
    assert bad.startswith("the image header is broken: ")
    assert 10000 * 10000 < MAX_PIXELS


# ---- fix


COLOURS = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (200, 60, 30, 40),
           (20, 90, 160, 100), (120, 5, 77, 200)]
"""Ink: cyan, magenta, yellow, black."""


def cmyk_jpeg(stored):
    """A JPEG with Adobe's marker, one square of 16 pixels for each stored value; Pillow stores the inverse of CMYK."""
    squares = [np.full((16, 16, 4), 255 - np.array(value), np.uint8) for value in stored]
    return encode(Image.fromarray(np.concatenate(squares, 1), "CMYK"), quality=100, subsampling=0)


def as_cmyk():
    return cmyk_jpeg([255 - np.array(ink) for ink in COLOURS])


def as_cmyk_without_marker():
    start, length = marker(as_cmyk(), b"Adobe")
    return as_cmyk()[:start] + as_cmyk()[start + length:]


def as_ycck():
    """The inverse of the ink is stored as if it were RGB's complement: Y, Cb, Cr of the ink's complement's complement.

    libjpeg defines YCCK so: C = 255 - R(Y, Cb, Cr), of what is stored; and what is stored is the inverse of the ink.
    """
    stored = []
    for c, m, y, k in COLOURS:  # R, G, B of YCC are 255 - (255 - ink)
        luminance = 0.299 * c + 0.587 * m + 0.114 * y
        stored.append(np.rint([luminance, 128 + (y - luminance) / 1.772, 128 + (c - luminance) / 1.402, 255 - k])
                      .clip(0, 255).astype(int))
    data = bytearray(cmyk_jpeg(stored))
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    data[place] = 2
    return bytes(data)


@pytest.mark.parametrize("make, change", [
    (as_cmyk, "CMYK JPEG re-encoded as RGB JPEG"),
    (as_cmyk_without_marker, "CMYK JPEG re-encoded as RGB JPEG"),
    (as_ycck, "YCCK JPEG re-encoded as RGB JPEG"),
])
def test_jpegs_of_four_components_get_the_right_colours(make, change):
    data = make()
    expected = np.array([[(255 - ink) * (255 - k) / 255 for ink in (c, m, y)] for c, m, y, k in COLOURS])
    picture = prepare_picture(data, "n01739381_1309.JPEG", FIX)
    assert (picture.extension, picture.width, picture.height, picture.change) == ("jpg", 128, 16, change)
    image = Image.open(BytesIO(picture.data))
    assert image.mode == "RGB" and image.format == "JPEG"
    for seen in (pixels(picture.data), pixels(data)):
        assert np.abs(seen[8, 8::16] - expected).max() <= 3  # rounding to YCC and back, to ink and back
    assert prepare_picture(data, "a.jpg", DEFAULT).data is data


def test_ink_in_a_tiff_is_not_inverted():
    data = encode(Image.fromarray(np.repeat(np.array([COLOURS], np.uint8), 16, 0), "CMYK").resize((128, 16), 0), "TIFF")
    picture = prepare_picture(data, "a.jpg", FIX)
    assert picture.change == "TIFF re-encoded as RGB JPEG"
    assert np.abs(pixels(picture.data) - pixels(prepare_picture(as_cmyk(), "a.jpg", FIX).data)).max() <= 3


@needs_jpegtran
def test_libjpegs_own_program_sees_the_same_colours():
    for data in (as_cmyk(), as_cmyk_without_marker(), as_ycck()):
        done = subprocess.run(["djpeg", "-ppm"], input=data, capture_output=True, check=True)
        seen = np.asarray(Image.open(BytesIO(done.stdout))).astype(int)
        assert seen.shape == (16, 128, 3) and np.abs(seen - pixels(data)).max() <= 1


@pytest.mark.parametrize("kind, name, sort", [("PNG", "n02105855_2933.JPEG", "PNG"), ("WEBP", "a.jpg", "WebP")])
def test_what_is_named_as_a_jpeg_becomes_one(kind, name, sort):
    data = encode(photo(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    picture = prepare_picture(data, name, FIX)
    assert picture.extension == "jpg" and picture.change == f"{sort} named as a JPEG re-encoded as RGB JPEG"
    assert np.abs(pixels(picture.data) - np.asarray(photo())).max() <= 4
    kept = prepare_picture(data, name, DEFAULT)
    assert kept.data == data and kept.extension == kind.lower() and kept.change is None


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_become_jpegs(kind):
    data = encode(photo(), kind)
    source = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    picture = prepare_picture(data, "a.jpg", FIX)
    assert picture[1:] == ("jpg", 120, 90, f"{kind} re-encoded as RGB JPEG")
    assert np.abs(pixels(picture.data) - source).max() <= 4
    for settings in (DEFAULT, PictureSettings(on_error="skip")):
        with pytest.raises(BadSampleError, match="neither JPEG, PNG nor WebP"):
            prepare_picture(data, "a.jpg", settings)
    with pytest.raises(BadSampleError, match="does not decode|broken"):
        prepare_picture(data[:len(data) // 2], "a.jpg", FIX)


def test_pixels_that_are_no_brightness_are_refused():
    grey = encode(Image.fromarray(np.full((8, 8), 0x6480, np.uint16)), "TIFF")
    assert np.abs(pixels(prepare_picture(grey, "a.jpg", FIX).data) - 0x64).max() <= 1
    for mode in ("F", "I"):
        with pytest.raises(BadSampleError, match="its pixels are 32-bit numbers"):
            prepare_picture(encode(Image.new(mode, (8, 8), 1), "TIFF"), "a.jpg", FIX)


def test_a_mended_image_keeps_its_colour_resolution_and_no_metadata():
    """Stripes of one pixel in red and cyan, of almost the same brightness: half the resolution would make them grey."""
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2], stripes[:, 1::2] = (200, 60, 60), (0, 130, 130)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "private")
    data = encode(Image.fromarray(stripes), "GIF", comment=b"private")
    picture = prepare_picture(data, "a.jpg", FIX)
    assert np.abs(pixels(picture.data) - stripes).max() <= 4
    assert b"private" in data and b"private" not in picture.data


# ---- resize


def resized(image, size):
    """By torch's own antialiased bicubic, from the definition's kernel with a = -0.5."""
    planes = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    scaled = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].permute(1, 2, 0).clip(0, 255).numpy()


@pytest.mark.parametrize("width, height, short, size", [
    (120, 90, 30, (40, 30)), (90, 121, 30, (30, 40)), (91, 91, 90, (90, 90)), (101, 91, 90, (100, 90)),
    (300, 40, 39, (293, 39)), (75, 50, 1, (2, 1)),
])
def test_larger_images_are_scaled_down(width, height, short, size):
    settings = PictureSettings(resize_short=short, quality=100)
    for kind in ("JPEG", "PNG"):
        data = encode(photo(width, height), kind)
        picture = prepare_picture(data, "a.png", settings)
        assert picture[1:] == ("jpg", *size, f"resized to short side {short}")
        assert decode_image(picture.data).size == size
        difference = pixels(picture.data) - resized(decode_image(data), size[::-1])
        # The colours are stored at half the resolution, the brightness at the whole.
        assert np.abs(difference @ [0.299, 0.587, 0.114]).max() < 3
        assert np.abs(difference.mean((0, 1))).max() < 6


def test_quality_is_that_of_resized_images_alone():
    coarse, fine = (prepare_picture(JPEG, "a.jpg", PictureSettings(resize_short=60, quality=quality)).data
                    for quality in (30, 95))
    assert len(coarse) < len(fine) / 2
    mended = prepare_picture(as_cmyk(), "a.jpg", PictureSettings(on_error="fix", resize_short=16, quality=1))
    assert mended == prepare_picture(as_cmyk(), "a.jpg", FIX)


def test_resizing_heeds_no_orientation_and_drops_metadata_and_alpha():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture = prepare_picture(encode(photo(), exif=exif, comment=b"private"), "a.jpg", PictureSettings(resize_short=45))
    assert (picture.width, picture.height) == (60, 45)
    assert not Image.open(BytesIO(picture.data)).getexif() and b"private" not in picture.data
    clear = photo()
    clear.putalpha(0)
    shown = prepare_picture(encode(clear, "PNG"), "a.png", PictureSettings(resize_short=45)).data
    assert shown == prepare_picture(PNG, "a.png", PictureSettings(resize_short=45)).data


def test_mending_and_resizing_are_one_step_with_one_sentence():
    picture = prepare_picture(as_ycck(), "a.jpg", PictureSettings(on_error="fix", resize_short=8))
    assert picture[2:] == (64, 8, "YCCK JPEG re-encoded as RGB JPEG, resized")
    plain = prepare_picture(as_ycck(), "a.jpg", PictureSettings(resize_short=8))
    assert plain.data == picture.data and plain.change == "resized to short side 8"


def test_what_does_not_fit_into_a_jpeg_is_refused():
    long = encode(Image.new("RGB", (66000, 2)), "PNG")
    assert prepare_picture(long, "a.png", FIX).data == long
    assert prepare_picture(long, "a.png", PictureSettings(resize_short=1)).width == 33000
    with pytest.raises(BadSampleError, match="66000 x 2 pixels do not fit into a JPEG, .* at most 65,500"):
        prepare_picture(long, "a.jpg", FIX)


# ---- transcode


def jpegtran(data, *arguments):
    return subprocess.run(["jpegtran", *arguments], input=data, capture_output=True, check=True).stdout


@needs_jpegtran
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(120, 90), (33, 17), (1, 1)])
def test_progressive_jpegs_become_baseline_without_loss(mode, size):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(photo(*size).convert(mode), progressive=True, comment=b"kept", icc_profile=profile)
    picture = prepare_picture(data, "a.jpg", BASELINE)
    assert picture[1:] == ("jpg", *size, "progressive JPEG transcoded to baseline")
    before, after = Image.open(BytesIO(data)), Image.open(BytesIO(picture.data))
    assert "progressive" in before.info and "progressive" not in after.info and b"\xff\xc0" in picture.data
    assert after.info["comment"] == b"kept" and after.info["icc_profile"] == profile
    assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    # The same scans of the same coefficients.
    assert jpegtran(data, "-progressive", "-copy", "all") == jpegtran(picture.data, "-progressive", "-copy", "all")


@needs_jpegtran
def test_only_progressive_jpegs_are_transcoded():
    for data in (JPEG, PNG, GOOD["a.webp"]):
        assert prepare_picture(data, "a.jpg", BASELINE).data is data
    again = prepare_picture(PROGRESSIVE, "a.jpg", BASELINE).data
    assert prepare_picture(again, "a.jpg", BASELINE).change is None
    with pytest.raises(BadSampleError, match="truncated"):
        prepare_picture(PROGRESSIVE[:len(PROGRESSIVE) // 2], "a.jpg", BASELINE)


@needs_jpegtran
def test_warnings_are_passed_over_where_the_pixels_stay():
    second_scan = PROGRESSIVE.index(b"\xff\xc4", PROGRESSIVE.index(b"\xff\xda"))
    stray = PROGRESSIVE[:second_scan] + b"\x01\x02\x03" + PROGRESSIVE[second_scan:]
    assert subprocess.run(["jpegtran"], input=stray, capture_output=True).returncode == 2
    picture = prepare_picture(stray, "a.jpg", BASELINE)
    assert picture.change == "progressive JPEG transcoded to baseline"
    assert np.array_equal(pixels(picture.data), pixels(stray))


@needs_jpegtran
def test_a_file_without_its_last_scans_stays_as_it_is():
    """Decoders smooth it while it is progressive; as a baseline JPEG its blocks would show."""
    scans = [place for place in range(len(PROGRESSIVE)) if PROGRESSIVE.startswith(b"\xff\xda", place)]
    tables = PROGRESSIVE.rindex(b"\xff\xc4", 0, scans[1])
    first_scan = PROGRESSIVE[:tables] + b"\xff\xd9"
    assert not np.array_equal(pixels(jpegtran(first_scan)), pixels(first_scan))
    assert prepare_picture(first_scan, "a.jpg", BASELINE) == (first_scan, "jpg", 120, 90, None)


@needs_jpegtran
def test_damage_never_changes_pixels():
    transcoded = 0
    for broken in damaged_versions(PROGRESSIVE, 60):
        try:
            before = pixels(broken)
        except BadSampleError:
            with pytest.raises(BadSampleError):
                prepare_picture(broken, "a.jpg", BASELINE)
            continue
        picture = prepare_picture(broken, "a.jpg", BASELINE)
        transcoded += picture.change is not None
        assert np.array_equal(pixels(picture.data), before)
    assert transcoded > 3


def test_a_missing_jpegtran_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for act in (jpegtran_version, lambda: encoder_versions(BASELINE),
                lambda: prepare_picture(PROGRESSIVE, "a.jpg", BASELINE)):
        with pytest.raises(SettingsError, match=r"jpegtran, which is not installed; .*apt-get install libjpeg-turbo-p"):
            act()


@pytest.fixture()
def another_jpegtran(monkeypatch, tmp_path):
    """Gives a function that puts a shell script in jpegtran's place."""
    def put(script):
        program = tmp_path / "jpegtran"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return put


def test_a_jpegtran_that_would_not_give_baseline_is_refused(another_jpegtran):
    another_jpegtran("echo 'mozjpeg version 4.1.1 (build 20230217)' >&2")
    with pytest.raises(SettingsError, match="needs the jpegtran of libjpeg-turbo, .*'mozjpeg version 4.1.1"):
        jpegtran_version()


def test_what_jpegtran_alone_refuses_stays_as_it_is(another_jpegtran):
    another_jpegtran("echo 'Unsupported marker type 0x49' >&2; exit 1")
    assert prepare_picture(PROGRESSIVE, "a.jpg", BASELINE).data is PROGRESSIVE


@pytest.mark.parametrize("script", ["kill -9 $$", "echo 'Insufficient memory (case 4)' >&2; exit 1"])
def test_a_lack_of_memory_is_not_the_images_fault(another_jpegtran, script):
    another_jpegtran(script)
    with pytest.raises(VirError, match="jpegtran ended with .*, perhaps out of memory; try fewer --workers") as caught:
        prepare_picture(PROGRESSIVE, "a.jpg", BASELINE)
    assert not isinstance(caught.value, BadSampleError)


# ---- settings


@needs_jpegtran
def test_versions_are_named_for_the_settings_that_change_bytes():
    told = subprocess.run(["jpegtran", "-version"], capture_output=True, text=True).stderr
    assert jpegtran_version().startswith("libjpeg-turbo ") and jpegtran_version().split()[1] in told
    assert encoder_versions(PictureSettings(check="decode", on_error="skip")) == {}
    assert encoder_versions(BASELINE) == {"jpegtran": jpegtran_version()}
    for settings in (FIX, PictureSettings(resize_short=9)):
        versions = encoder_versions(settings)
        assert versions["libjpeg_turbo"] == features.version("libjpeg_turbo")
        assert set(versions) == {"pillow", "libjpeg_turbo", "webp", "libtiff"}


@pytest.mark.parametrize("fields, message", [
    ({"on_error": "ignore"}, "--on-error must be one of fail, skip, fix, got 'ignore'"),
    ({"check": "all"}, "--check must be one of header, decode, got 'all'"),
    ({"transcode": "webp"}, "--transcode must be one of baseline, got 'webp'"),
    ({"resize_short": 0}, "--resize-short must be from 1 to 65,500 pixels, got 0"),
    ({"quality": 101}, "--quality must be from 1 to 100, got 101"),
    ({"quality": 0}, "--quality must be from 1 to 100, got 0"),
])
def test_settings_are_checked_at_the_door(fields, message):
    with pytest.raises(SettingsError, match=message):
        PictureSettings(**fields)


def test_another_process_gives_the_same_bytes():
    program = """
import hashlib, sys
from vir.data.picture import PictureSettings, prepare_picture
settings = PictureSettings(on_error="fix", resize_short=40)
print(hashlib.sha256(prepare_picture(bytes.fromhex(sys.stdin.read()), "a.JPEG", settings).data).hexdigest())
"""
    seen = {subprocess.run([sys.executable, "-c", program], input=PNG.hex(), text=True, capture_output=True,
                           check=True, env={**os.environ, "PYTHONHASHSEED": str(seed)}).stdout for seed in (1, 2)}
    assert len(seen) == 1
