"""Struct arrays in MATLAB 5 files, as the meta.mat of ImageNet's devkit is one.

Sizes and depth are bounded: scipy's loadmat ends with a segmentation fault at deeply nested cells, and unpacks what a
few bytes say is large.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

MAX_BYTES = 1 << 23
"""Of a file, and of what is unpacked from one; meta.mat has 2 MB."""

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "utf-8", 2: "utf-8", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_STRUCT, _CHAR, _NUMERIC = 2, 4, range(6, 16)

_Element = tuple[int, memoryview]


def read_structs(data: bytes, name: str, fields: Sequence[str]) -> list[dict[str, float | str | None]]:
    """Some fields of the struct array `name`: numbers and texts; None for what is neither.

    Raises:
        ValueError: no such file, no such array, a field that it lacks, or damage.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER])
    if order is None:
        raise ValueError("it is no MATLAB 5 file")
    for kind, content in _unpacked(memoryview(data)[_HEADER:], order):
        if kind == _MATRIX and content.nbytes:
            (_, flags), (_, shape), (_, title), *parts = _elements(content, order)
            if bytes(title) == name.encode():
                if _class(flags, order) != _STRUCT:
                    raise ValueError(f"{name} is no struct")
                return _structs(parts, math.prod(_integers(shape, order)), fields, order)
    raise ValueError(f"it has no {name}")


def _structs(parts: list[_Element], count: int, fields: Sequence[str],
             order: str) -> list[dict[str, float | str | None]]:
    (_, length), (_, text), *values = parts
    width = _integers(length, order)[0]
    if width < 1:
        raise ValueError(f"field names of {width} bytes")
    names = [bytes(text[i:i + width]).rstrip(b"\0").decode() for i in range(0, len(text), width)]
    if missing := [field for field in fields if field not in names]:
        raise ValueError(f"it has no field {missing[0]}")
    if len(values) != count * len(names):
        raise ValueError(f"{len(values)} values where {count} times {len(names)} belong")
    places = {field: names.index(field) for field in fields}
    return [{field: _value(values[i + place], order) for field, place in places.items()}
            for i in range(0, len(values), len(names))]


def _value(element: _Element, order: str) -> float | str | None:
    kind, content = element
    if kind != _MATRIX or not content.nbytes:
        return None
    (_, flags), _, _, *parts = _elements(content, order)
    if not parts:
        return None
    kind, content = parts[0]
    array_class = _class(flags, order)
    if array_class == _CHAR and kind in _TEXTS:
        coding = _TEXTS[kind]
        ends = "" if coding == "utf-8" else "-le" if order == "<" else "-be"
        return bytes(content).decode(coding + ends)
    if array_class in _NUMERIC and kind in _NUMBERS:
        numbers = np.frombuffer(content, order + _NUMBERS[kind])
        return float(numbers[0]) if len(numbers) == 1 else None
    return None


def _unpacked(content: memoryview, order: str) -> Iterator[_Element]:
    left = MAX_BYTES
    for kind, part in _elements(content, order):
        if kind != _COMPRESSED:
            yield kind, part
            continue
        unpacking = zlib.decompressobj()
        try:
            unpacked = unpacking.decompress(part, left)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        left -= len(unpacked)
        if left <= 0:
            raise ValueError(f"it unpacks to more than {MAX_BYTES} bytes")
        yield from _elements(memoryview(unpacked), order)


def _elements(content: memoryview, order: str) -> Iterator[_Element]:
    """Type and bytes of each element. One of at most 4 bytes may stand in its tag, its size then beside its type."""
    at, tag = 0, np.dtype(order + "u4")
    while at < content.nbytes:
        if content.nbytes - at < 8:
            raise ValueError("it is cut off")
        kind, size = np.frombuffer(content[at:at + 8], tag).tolist()
        if kind >> 16:
            kind, size, begin, following = kind & 0xffff, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError(f"a small element of {size} bytes")
        else:
            begin = at + 8
            following = begin + size + (0 if kind == _COMPRESSED else -size % 8)
        if begin + size > content.nbytes:
            raise ValueError("it is cut off")
        yield kind, content[begin:begin + size]
        at = following


def _class(flags: memoryview, order: str) -> int:
    return _integers(flags, order)[0] & 0xff


def _integers(content: memoryview, order: str) -> list[int]:
    numbers: list[int] = np.frombuffer(content, order + "i4").tolist()
    if not numbers:
        raise ValueError("numbers are missing")
    return numbers


if __name__ == "__main__":
    raise SystemExit("vir.data.sources.mat is a part of the library; the program is vir-convert")
