"""MATLAB files: read as scipy reads them, those of MATLAB itself too; damage and malice end in one exception."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from support.imagenet import meta_mat
from vir.data.sources.mat import MAX_BYTES, read_structs

# Written by MATLAB 6.1 on a machine with big ends, by 6.5, 7.1 and 7.4 on one with little ends; the last two compress.
MADE_BY_MATLAB = sorted((Path(scipy.io.__file__).parent / "matlab" / "tests" / "data").glob("teststruct*.mat"))
HEAD = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4d49)


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def as_scipy_has_it(value):
    """Numbers and texts alone."""
    if value.dtype.kind == "U" and value.size == 1:
        return str(value[0])
    return float(value.ravel()[0]) if value.dtype.kind in "iuf" and value.size == 1 else None


@pytest.mark.parametrize("path", MADE_BY_MATLAB, ids=lambda path: path.stem)
def test_files_of_matlab_itself(path):
    content = scipy.io.loadmat(path)
    name, = (name for name in content if name.startswith("test"))
    fields = content[name].dtype.names
    assert read_structs(path.read_bytes(), name, fields) == [
        {field: as_scipy_has_it(row[field]) for field in fields} for row in content[name].ravel()]


def test_there_are_files_of_matlab_or_scipy_left_them_out():
    assert not MADE_BY_MATLAB or len(MADE_BY_MATLAB) == 12


@pytest.mark.parametrize("compressed", [True, False])
def test_the_structs_of_the_devkit(compressed):
    wnids = tuple(f"n{number:08d}" for number in random.Random(0).sample(range(10 ** 8), 1000))
    rows = read_structs(meta_mat(wnids, compressed), "synsets", ["WNID", "ILSVRC2012_ID", "num_children", "words"])
    assert len(rows) == 1860
    assert [row["WNID"] for row in rows[:1000]] == list(wnids)
    assert [row["ILSVRC2012_ID"] for row in rows] == list(range(1, 1861))
    assert [row["num_children"] for row in rows] == [0] * 1000 + [2] * 860
    assert rows[4]["words"] == "thing 5, Ding ä"


def test_every_type_of_number_and_what_is_none():
    kinds = {f"a{kind}": np.array([[7]], kind) for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")}
    values = {**kinds, "row": np.arange(3.0), "empty": np.zeros((0, 0)), "text": "ä€", "none": ""}
    file = io.BytesIO()
    scipy.io.savemat(file, {"other": 1.0, "s": values})
    assert read_structs(file.getvalue(), "s", list(values)) == [
        {**dict.fromkeys(kinds, 7.0), "row": None, "empty": None, "text": "ä€", "none": ""}]


def good():
    file = io.BytesIO()
    scipy.io.savemat(file, {"s": {"a": 1.0, "b": "x"}})
    return file.getvalue()


@pytest.mark.parametrize("data, message", [
    (b"", "no MATLAB 5 file"),
    (b"PK\3\4" * 1000, "no MATLAB 5 file"),
    (HEAD, "has no s"),
    (HEAD + b"\1\2", "cut off"),
    (HEAD + struct.pack("<II", 14, 1 << 31), "cut off"),
    (HEAD + element(15, b"no zlib"), "header"),
    (HEAD + element(15, zlib.compress(bytes(MAX_BYTES + 1))), f"unpacks to more than {MAX_BYTES} bytes"),
    (HEAD + element(14, b""), "has no s"),
    (HEAD + element(14, element(6, bytes(8))), "not enough values"),
    (HEAD + struct.pack("<II", 5 << 16 | 1, 0), "a small element of 5 bytes"),
    (good().replace(b"a\0b\0", b"c\0b\0"), "no field a"),
], ids=range(11))
def test_damage_is_a_value_error(data, message):
    with pytest.raises(ValueError, match=message):
        read_structs(data, "s", ["a"])
    assert read_structs(good(), "s", ["a", "b"]) == [{"a": 1.0, "b": "x"}]


def test_a_struct_that_says_it_is_large_takes_no_memory():
    whole = good()
    shape = element(5, struct.pack("<ii", 1, 1))
    assert shape in whole
    with pytest.raises(ValueError, match="2 values where 4611686014132420609 times 2 belong"):
        read_structs(whole.replace(shape, element(5, struct.pack("<ii", 2 ** 31 - 1, 2 ** 31 - 1)), 1), "s", ["a"])


def test_cells_nested_100000_deep_are_passed_over():
    """scipy.io.loadmat ends with a segmentation fault here."""
    inner = element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, b"")
    depth, size = 100_000, 8 + len(inner)
    cells = b"".join(struct.pack("<II", 14, size * (depth - i) - 8) + inner for i in range(depth))
    assert read_structs(HEAD + cells + good()[128:], "s", ["a"]) == [{"a": 1.0}]


def test_flipped_bytes_and_cuts_end_in_a_value_error_or_pass():
    data, draw = good(), random.Random(3)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[draw.randrange(128, len(data))] = draw.randrange(256)
        try:
            read_structs(bytes(damaged[:draw.choice([draw.randrange(128, len(data)), len(data)])]), "s", ["a", "b"])
        except ValueError:
            refused += 1
    assert 500 < refused < 1900
