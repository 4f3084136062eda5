"""Images decoded in strips have the pixels of decode_image, whatever the kind of file and its damage."""

import errno
import io
import random
import sys

import numpy as np
import pytest
import pyvips
from PIL import Image

from vir.data import strip_decoding
from vir.data.decode import FOREIGN, FORMATS, BadSampleError, decode_image
from vir.data.strip_decoding import LooksDamagedError, open_strips
from vir.errors import SettingsError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS).resize((83, 61), Image.Resampling.BICUBIC)
GREY, PALETTE = RGB.convert("L"), RGB.quantize(9)
ALPHA = Image.merge("RGBA", (*RGB.split(), GREY))
GREY16 = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 255 + 77)


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_vips(pixels, ending, **options):
    return pyvips.Image.new_from_array(pixels).write_to_buffer(ending, **options)


RGB16 = np.asarray(RGB).astype(np.uint16) * 257 - 3
IN_STRIPS = {
    "JPEG": file_of(RGB, "JPEG"), "4:4:4": file_of(RGB, "JPEG", subsampling=0, quality=95),
    "progressive": file_of(RGB, "JPEG", progressive=True), "stored as RGB": file_of(RGB, "JPEG", keep_rgb=True),
    "grey JPEG": file_of(GREY, "JPEG"), "turned by EXIF": file_of(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"
                                                                  b"\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "PNG": file_of(RGB, "PNG"), "grey PNG": file_of(GREY, "PNG"), "one bit": file_of(GREY.convert("1"), "PNG"),
    "alpha": file_of(ALPHA, "PNG"), "grey and alpha": file_of(ALPHA.convert("LA"), "PNG"),
    "palette": file_of(PALETTE, "PNG"), "palette of 4 bits": file_of(PALETTE, "PNG", bits=4),
    "a transparent colour": file_of(PALETTE, "PNG", transparency=3), "grey of 16 bits": file_of(GREY16, "PNG"),
    "16 bits": by_vips(RGB16, ".png", bitdepth=16),
    "TIFF": file_of(RGB, "TIFF"), "LZW": file_of(RGB, "TIFF", compression="tiff_lzw"),
    "deflate": file_of(GREY, "TIFF", compression="tiff_adobe_deflate"),
    "packbits": file_of(RGB, "TIFF", compression="packbits"),
    "tiles": by_vips(np.asarray(RGB), ".tif", tile=True, tile_width=16, tile_height=32, compression="lzw",
                     predictor="horizontal"),
    "PPM": file_of(RGB, "PPM"), "PGM": file_of(GREY, "PPM")}
WHOLE = {
    "CMYK": file_of(RGB.convert("CMYK"), "JPEG"), "interlaced": by_vips(np.asarray(RGB), ".png", interlace=True),
    "animated": file_of(RGB, "PNG", save_all=True, append_images=[ALPHA.convert("RGB").rotate(180)]),
    "WebP": file_of(RGB, "WebP"), "GIF": file_of(PALETTE, "GIF"), "BMP": file_of(RGB, "BMP"),
    "JPEG in TIFF": file_of(RGB, "TIFF", compression="jpeg"), "alpha in TIFF": file_of(ALPHA, "TIFF"),
    "TIFF of 16 bits": file_of(GREY16, "TIFF"), "turned TIFF": file_of(RGB, "TIFF", tiffinfo={274: 6}),
    "TIFF of one bit": file_of(GREY.convert("1"), "TIFF"), "PPM as text": b"P3 2 1 255 1 2 3 4 5 6"}


def strips_of(data, whole=False):
    try:
        with open_strips(data, whole) as strips:
            return np.concatenate(list(strips.pixels))
    except LooksDamagedError:
        return strips_of(data, whole=True)


def pixels_of(data):
    return np.asarray(decode_image(data, FORMATS + FOREIGN))


@pytest.mark.parametrize("kind", [*IN_STRIPS, *WHOLE])
def test_strips_have_the_pixels_of_the_whole(kind, monkeypatch, tmp_path):
    """From the bytes and from a file, whose name means something to libvips."""
    monkeypatch.setattr(strip_decoding, "_STRIP_PIXELS", 700)
    data = (IN_STRIPS | WHOLE)[kind]
    (tmp_path / "x[page=3].jpg").write_bytes(data)
    for file in (data, tmp_path / "x[page=3].jpg"):
        with open_strips(file) as strips:
            pieces = list(strips.pixels)
        assert (strips.height, strips.width) == np.concatenate(pieces).shape[:2]
        assert len(pieces) > 1 or kind == "PPM as text"
        assert strips.is_whole == (kind in WHOLE)
        assert np.array_equal(np.concatenate(pieces), pixels_of(data))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "TIFF", "LZW", "deflate", "PPM"])
def test_a_broken_file_is_told_where_the_whole_is(kind, capfd):
    """Cut short, with wrong bytes, with zeros: never other pixels. Damage behind the pixels is not always seen."""
    data, draw = IN_STRIPS[kind], random.Random(1)
    told = missed = 0
    for turn in range(90):
        broken = bytearray(data)
        place = draw.randrange(20, len(data))
        if turn % 3 == 0:
            del broken[place:]
        elif turn % 3 == 1:
            broken[place] = draw.randrange(256)
        else:
            broken[place:place + 100] = bytes(len(broken[place:place + 100]))
        try:
            expected = pixels_of(bytes(broken))
        except BadSampleError:
            try:
                strips_of(bytes(broken))
                missed += 1
            except BadSampleError:
                told += 1
            continue
        assert np.array_equal(strips_of(bytes(broken)), expected)
    assert told >= 25 and missed <= 1


def test_a_strip_is_decoded_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(strip_decoding, "_STRIP_PIXELS", 83)
    image = Image.effect_noise((83, 2000), 50).convert("RGB")
    for data in (file_of(image, "JPEG"), file_of(image, "PNG"), file_of(image, "PPM")):
        with open_strips(data[:len(data) // 2]) as strips:
            assert np.array_equal(np.concatenate([next(strips.pixels) for _ in range(40)]), pixels_of(data)[:40])
            with pytest.raises(BadSampleError, match="does not decode"):
                list(strips.pixels)


def test_what_is_too_large_or_no_image_is_told(tmp_path, monkeypatch):
    def said(file):
        with pytest.raises(BadSampleError) as error:
            with open_strips(file):
                pass
        return str(error.value)

    assert said(b"P5 65537 1 255 ") == "the image has 65537 x 1 pixels, more than 65,536 on a side"
    assert said(b"") == "the file is empty"
    assert said(b"no image").startswith("neither JPEG, PNG, WebP, GIF, BMP, TIFF nor PPM: it begins with b'no image'")
    assert said(tmp_path / "none") == "it cannot be read: No such file or directory"
    assert said(tmp_path) == "it cannot be read: it is no regular file"
    monkeypatch.setattr("vir.data.decode.MAX_PIXELS", 5000)
    assert said(WHOLE["BMP"]) == "the image has 83 x 61 pixels, more than 5,000; it could be a decompression bomb"
    with open_strips(IN_STRIPS["PNG"]) as strips:
        assert strips.height == 61  # in strips it may


@pytest.mark.parametrize("kind", ["progressive", "one colour after another"])
def test_a_jpeg_of_several_scans_has_a_bound(kind, monkeypatch):
    """libjpeg has its coefficients in memory."""
    monkeypatch.setattr("vir.data.decode.MAX_PIXELS", 5000)
    before, after = IN_STRIPS["JPEG"].split(b"\xff\xda\x00\x0c\x03")  # the header of a scan of three colours
    with open_strips(IN_STRIPS["JPEG"]) as strips:
        assert strips.height == 61
    data = IN_STRIPS.get(kind) or before + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + after[9:]
    with pytest.raises(BadSampleError, match="83 x 61 pixels, more than 5,000; it could be a decompression bomb"):
        with open_strips(data):
            pass


def test_a_file_that_vanishes_or_cannot_be_read_on_is_told(tmp_path, monkeypatch):
    class Failing(io.BytesIO):
        fails = False

        def read(self, *size):
            if self.fails:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(*size)

    monkeypatch.setattr(strip_decoding, "BytesIO", Failing)
    with open_strips(IN_STRIPS["PPM"]) as strips:
        Failing.fails = True
        with pytest.raises(BadSampleError, match="^it cannot be read: Input/output error$"):
            next(strips.pixels)
    with pytest.raises(BadSampleError, match="^it cannot be read: Input/output error$"):
        with open_strips(IN_STRIPS["PPM"]):
            pass
    path, loader = tmp_path / "x.jpg", strip_decoding._loader
    path.write_bytes(IN_STRIPS["JPEG"])
    monkeypatch.setattr(strip_decoding, "_loader", lambda image: (path.unlink(), loader(image))[1])
    with pytest.raises(BadSampleError, match="^it cannot be read: No such file or directory$"):
        with open_strips(path):
            pass


def test_damage_in_an_image_that_is_too_large_for_a_whole_is_told(monkeypatch):
    monkeypatch.setattr(strip_decoding, "MAX_PIXELS", 5000)
    with pytest.raises(BadSampleError, match="does not decode: vipspng: libpng read error") as error:
        with open_strips(IN_STRIPS["PNG"][:3000]) as strips:
            list(strips.pixels)
    assert not isinstance(error.value, LooksDamagedError)


def test_without_pyvips_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(SettingsError, match=r"pip install 'vir-at-scale\[stream\]', or leave out --stream"):
        strip_decoding.vips.__wrapped__()
