"""The members of a tar by their headers alone, in constant memory; also of a tar within a tar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from vir.data.random_access import LocalFile, RandomAccess
from vir.errors import DataError
from vir.files import open_regular

BLOCK = 512
Size = TypeVar("Size", int, np.ndarray)
"""One number of bytes, or an array of them."""
_ZEROS = bytes(BLOCK)
_FILES = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_LONG_NAME, _LONG_LINK, _PAX_GLOBAL = b"L", b"K", b"g"
_PAX = (b"x", b"X")
_MAX_EXTENSION = 1 << 20
"""The longest extended header, in bytes: names are far shorter."""


class TarError(DataError):
    """What makes a tar unreadable from some byte on.

    Args:
        offset: of the header in question, from the beginning of the tar.
        reason: without the tar's name and the way out, which the message has.
        is_cut: the file ends too early, as far as can be said.
    """

    def __init__(self, message: str, offset: int = 0, reason: str = "", is_cut: bool = False) -> None:
        super().__init__(message, offset, reason, is_cut)  # all of them, so that it can leave a worker process
        self.offset, self.reason, self.is_cut = offset, reason, is_cut

    def __str__(self) -> str:
        return str(self.args[0])


class Member(NamedTuple):
    """A regular file in a tar; all offsets count from the beginning of the outermost file."""

    name: str
    start: int
    """Of the first header block, extended headers included."""
    offset: int
    """Of the first byte of the content."""
    size: int


class _Extension(NamedTuple):
    """What extended headers say of the member that follows."""

    start: int
    name: bytes | None = None
    size: int | None = None


def padded(size: Size) -> Size:
    """The bytes that so many bytes of content take in a tar: whole blocks."""
    return -(-size // BLOCK) * BLOCK


@contextmanager
def opened(path: Path) -> Iterator[LocalFile]:
    """A tar, open until the end of the block.

    Raises:
        DataError: it is no regular file, or the block or the opening met an OSError.
    """
    try:
        descriptor = open_regular(path)
        try:
            yield LocalFile(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def scan(file: RandomAccess, where: str, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The regular files of the tar in bytes start..end of a file; folders and links are passed over.

    Reads GNU, PAX, ustar and v7 headers, one block at a time.

    Args:
        where: names the tar in messages.

    Raises:
        TarError: a header that is damaged, a member beyond the end, a tar that is cut off, a name that is not UTF-8
            or has a NUL, a sparse file.
        OSError: the file cannot be read.
        DataError: what can be tried to read it was tried.
    """
    end = file.size if end is None else end
    position, extension = start, None
    while True:
        header = file.pread(BLOCK, position) if position + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise TarError(f"{where} is cut off at byte {position - start}: a tar ends with blocks of zeros; copy or "
                           "download it again", position - start, "the tar is cut off", is_cut=True)
        if header == _ZEROS:
            if extension is not None:
                raise _damaged(where, position - start, "an extended header without its member")
            return
        if not _is_sound(header):
            raise _damaged(where, position - start, _why_unsound(header, position - start))
        kind = header[156:157]
        size = _number(header[124:136], where, position - start)
        if kind in _FILES and extension is not None and extension.size is not None:
            size = extension.size
        offset = position + BLOCK
        following = offset if kind in _WITHOUT_DATA else offset + padded(size)
        if following > end:
            raise TarError(f"{where}: the member at byte {position - start} says it has {size} bytes, more than the "
                           "file has left; the file is cut off or damaged; copy or download it again",
                           position - start, f"a member of {size} bytes, more than the file has left", is_cut=True)
        begin = position if extension is None else extension.start
        if kind == _LONG_NAME or kind in _PAX:
            content = _content(file, offset, size, where, position - start)
            known = extension or _Extension(begin)
            extension = (known._replace(name=content.rstrip(b"\0")) if kind == _LONG_NAME else
                         _pax(known, content, where, position - start))
        elif kind == _LONG_LINK:
            extension = extension or _Extension(begin)
        elif kind == _PAX_GLOBAL:
            content = _content(file, offset, size, where, position - start)
            if _pax(_Extension(begin), content, where, position - start) != _Extension(begin):
                raise _damaged(where, position - start, "one name or size for all members that follow")
        else:
            if kind == b"S":
                raise _damaged(where, position - start, "sparse files are not supported")
            if kind in _FILES:
                raw = extension.name if extension is not None and extension.name is not None else _name(header)
                if not raw.endswith(b"/"):  # v7 marks folders so
                    yield Member(_text(raw, where, position - start), begin, offset, size)
            extension = None
        position = following


def _is_sound(header: bytes) -> bool:
    try:
        expected = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    unsigned = sum(header) - sum(header[148:156]) + 256
    if unsigned == expected:
        return True
    rest = header[:148] + header[156:]
    return unsigned - 256 * sum(byte > 127 for byte in rest) == expected  # some old programs added signed bytes


def _why_unsound(header: bytes, position: int) -> str:
    if position == 0 and header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "it is compressed, only plain tars can be read by offset: unpack it (gunzip, ...)"
    return "the checksum of its header is wrong"


def _number(field: bytes, where: str, position: int) -> int:
    """Octal digits or, with the first bit set, a binary number: GNU's form for large sizes."""
    if field[0] & 0x80:
        if field[0] & 0x7f:
            raise _damaged(where, position, "its size is negative or has no end")
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise _damaged(where, position, f"its size is {digits!r}")
    return int(digits, 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        return prefix + b"/" + name
    return name


def _text(name: bytes, where: str, position: int) -> str:
    if b"\0" in name:
        raise _damaged(where, position, f"the name {name[:100]!r} has a NUL")
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(where, position, f"the name {name[:100]!r} is not UTF-8") from error


def _content(file: RandomAccess, offset: int, size: int, where: str, position: int) -> bytes:
    if size > _MAX_EXTENSION:
        raise _damaged(where, position, f"an extended header of {size} bytes")
    return file.pread(size, offset)


def _pax(known: _Extension, content: bytes, where: str, position: int) -> _Extension:
    """The records "LENGTH KEY=VALUE\\n" of a PAX header; only path and size are of use."""
    content, begin = content.rstrip(b"\0"), 0
    while begin < len(content):
        digits = content[begin:begin + 8].partition(b" ")[0]
        end = begin + int(digits) if digits.isdigit() and len(digits) < 8 else 0
        if end <= begin + len(digits) or content[end - 1:end] != b"\n":
            raise _damaged(where, position, f"a PAX record that begins with {content[begin:begin + 20]!r}")
        key, _, value = content[begin + len(digits) + 1:end - 1].partition(b"=")
        if key == b"path":
            known = known._replace(name=value or None)  # without a value: what the header itself says
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise _damaged(where, position, f"its PAX size is {value[:30]!r}")
            known = known._replace(size=int(value))
        elif key.startswith(b"GNU.sparse"):
            raise _damaged(where, position, "sparse files are not supported")
        begin = end
    return known


def _damaged(where: str, position: int, what: str) -> TarError:
    return TarError(f"{where} is damaged or no tar: at byte {position}, {what}; copy or download it again", position,
                    what)


if __name__ == "__main__":
    raise SystemExit("vir.data.tar is a part of the library; the program is vir-index")
