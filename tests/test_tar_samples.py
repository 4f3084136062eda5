"""Members of a tar are put together to samples as webdataset does it, and what is no sample is refused by name."""

import io
import itertools
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset

from vir.data.tar import opened
from vir.data.tar_samples import read_samples
from vir.errors import DataError


def write(path: Path, *members, format=tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def read(path):
    with opened(path) as file:
        return list(read_samples(file, path.name))


def label(number):
    return json.dumps({"label": number}).encode()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_are_those_of_webdataset(format, tmp_path):
    far = "a/" * 60 if format != tarfile.USTAR_FORMAT else "a" * 90 + "/" + "b" * 50 + "/"
    path = write(
        tmp_path / "x.tar", ("a/1.jpg", b"one"), ("a/1.cls", b"7"), ("b/1.cls", b" 12\n"), ("b/1.JPEG", b"two"),
        (far + "é.json", json.dumps({"label": 3, "filename": "n/é.PNG"}).encode()), (far + "é.seg.png", b"seg"),
        (far + "é.png", b"three"), (".x.jpg", b"hidden"), ("__MACOSX/._1.jpg", b""), ("__key__", b""),
        ("2.txt", b"5"), ("2.webp", b"four"), ("2.npy", b"kept by webdataset alone"), format=format)
    found = read(path)
    data = path.read_bytes()
    expected = []
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        # Of __MACOSX/._1.jpg it makes a sample of the member "_1.jpg".
        expected += [(sample["__key__"], sample[name]) for name in ("jpg", "jpeg", "png", "webp") if name in sample]
    assert [(one.key, data[one.image.offset:][:one.image.size]) for one in found] == expected
    assert [one.label for one in found] == [7, 12, 3, 5]
    assert [one.extension for one in found] == ["jpg", "jpeg", "png", "webp"]
    assert [one.filename for one in found] == [None, None, "n/é.PNG", None]
    with tarfile.open(path) as tar:
        first = {name: tar.getmember(name).offset for name in ("a/1.jpg", "b/1.cls", f"{far}é.json", "2.txt")}
    assert [one.start for one in found] == list(first.values())


@pytest.mark.parametrize("members, expected", [
    ((("1.cls", b"4"), ("1.json", label(9)), ("1.txt", b"8")), 4),
    ((("1.txt", b"8"), ("1.json", label(9))), 9),
    ((("1.json", b"[1]"), ("1.txt", b"8")), 8),
    ((("1.json", b'{"caption": 1}'), ("1.txt", b" n01440764 \n")), "n01440764"),
    ((("1.txt", "größe".encode()),), "größe"),
    ((("1.txt", b"-1"),), "-1"),
    ((("1.cls", b"2147483647"),), 2147483647),
])
def test_the_label_is_of_cls_then_json_then_txt(members, expected, tmp_path):
    for order in itertools.permutations((*members, ("1.jpg", b"i"))):
        assert read(write(tmp_path / "x.tar", *order))[0].label == expected


@pytest.mark.parametrize("members, message", [
    ([("a.cls", b"1")], r"x.tar: sample 'a' at byte 2048 has no image: it begins with 'a.cls'"),
    ([("a.b.jpg", b""), ("a.b.cls", b"1")], r"sample 'a' at byte 2048 has no image: .*a key ends at the first dot"),
    ([("README", b"")], r"sample 'README' at byte 2048 has no image"),
    ([("a.jpg", b"")], r"sample 'a' at byte 2048 has no label: expected a.cls, or a.json"),
    ([("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"1"), ("b.cls", b"2")], r"sample 'a' at byte 2048 has no label"),
    ([("a.jpg", b""), ("a.json", b"{}")], r"sample 'a' at byte 2048 has no label"),
    ([("a.jpg", b""), ("a.png", b""), ("a.cls", b"1")], r"sample 'a' at byte 2560 has 'a.jpg' and 'a.png'"),
    ([("a.jpg", b""), ("a.cls", b"1"), ("a.cls", b"1")], r"sample 'a' at byte 3584 has 'a.cls' and 'a.cls'"),
    ([("a.jpg", b""), ("a.cls", b"one")], r"sample 'a' at byte 2560 has the label 'one' in its cls; a label is a"),
    ([("a.jpg", b""), ("a.cls", b"-1")], r"the label '-1' in its cls"),
    ([("a.jpg", b""), ("a.cls", b"2147483648")], r"the label '2147483648' in its cls"),
    ([("a.jpg", b""), ("a.cls", b"")], r"the label '' in its cls"),
    ([("a.jpg", b""), ("a.cls", "٣".encode())], r"the label '٣' in its cls"),
    ([("a.jpg", b""), ("a.cls", b"1" * 65)], r"a cls of 65 bytes, the limit is 64"),
    ([("a.jpg", b""), ("a.cls", b"\xff")], r"has a cls that is no text"),
    ([("a.jpg", b""), ("a.json", b'{"label": true}')], r"the label 'True' in its json"),
    ([("a.jpg", b""), ("a.json", b'{"label": 1.5}')], r"the label '1.5' in its json"),
    ([("a.jpg", b""), ("a.json", b'{"label": "1"}')], r"the label '1' in its json"),
    ([("a.jpg", b""), ("a.json", b"{")], r"sample 'a' at byte 2560 has a json that is none: Expecting"),
    ([("a.jpg", b""), ("a.json", b"[" * 1000000)], r"has a json that is none: maximum recursion"),
    ([("a.jpg", b""), ("a.json", b'{"label": 1' + b"0" * 5000 + b"}")], r"a json that is none: Exceeds the limit"),
    ([("a.jpg", b""), ("a.json", bytes((1 << 20) + 1))], r"a json of 1048577 bytes, the limit is 1048576"),
    ([("a.jpg", b""), ("a.txt", b"c" * 5000)], r"a txt of 5000 bytes, the limit is 4096"),
    ([("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"1"), ("a.jpg", b""), ("a.cls", b"1")],
     r"sample 'a' at byte 5120 was there already, at byte 2048"),
])
def test_what_is_no_sample_is_refused_with_key_and_byte(members, message, tmp_path):
    good = [("0.jpg", b""), ("0.cls", b"1")]
    assert len(read(write(tmp_path / "x.tar", *good))) == 1
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "x.tar", *good, ("._junk", b""), *members))


def test_a_file_that_becomes_shorter_is_refused(tmp_path):
    path = write(tmp_path / "x.tar", ("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"1"))
    with opened(path) as file:
        samples = read_samples(file, "x.tar")
        next(samples)
        os.truncate(path, 3 * 512)
        with pytest.raises(DataError, match="x.tar"):
            list(samples)


def test_members_of_one_key_without_end_fill_no_memory(tmp_path):
    members = [("a.jpg", b""), *((f"a.{i}", b"") for i in range(5000)), ("a.cls", b"1"), ("b.jpg", b""),
               ("b.cls", b"2")]
    path = write(tmp_path / "x.tar", *members)
    tracemalloc.start()
    assert len(read(path)) == 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
