"""The header scan of tars against Python's tarfile and GNU tar, and the hostile tars that it must refuse."""

import io
import os
import re
import subprocess
import tarfile
import tracemalloc

import pytest

from vir.data.random_access import LocalFile
from vir.data.tar import scan
from vir.errors import DataError

FORMATS = {"v7": None, "ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = ["a.jpg", "x" * 100, "n01440764/" + "y" * 80 + ".JPEG", "d" * 90 + "/" + "e" * 90, "./dots.in.name"]
LONG = ["z" * 101, "f/" * 100 + "g" * 100, "größe/写真.jpg", "ö" * 50, "ö" * 51]
SIZES = [0, 1, 511, 512, 513, 10000]
END = bytes(1024)


def write(path, content):
    path.write_bytes(content)
    return path


def members(path, **bounds):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [tuple(member) for member in scan(LocalFile(descriptor), "a.tar", **bounds)]
    finally:
        os.close(descriptor)


def by_tarfile(path):
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset, member.offset_data, member.size) for member in tar if member.isreg()]


def tar_of(names, form, path):
    """Files of all sizes, among folders and links, by Python's tarfile."""
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                other = tarfile.TarInfo(f"{number}/other")
                other.type, other.linkname = kind, "l" * 90
                tar.addfile(other)
            info = tarfile.TarInfo(name)
            info.size = SIZES[number % len(SIZES)]
            tar.addfile(info, io.BytesIO(bytes([65 + number]) * info.size))
    return path


def header(name=b"a.jpg", size=0, kind=b"0", magic=b"ustar\x0000", prefix=b"", size_field=None, signed=False):
    """One block by the definition of POSIX, independent of tarfile."""
    field = b"%011o\0" % size if size_field is None else size_field
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" +
                      b" " * 8 + kind + bytes(100) + magic + bytes(80) + prefix.ljust(155, b"\0") + bytes(12))
    assert len(block) == 512
    block[148:156] = b"%06o\0 " % sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % 512)


def pax(*records, kind=b"x"):
    body = b"".join(records)
    return header(b"PaxHeader", len(body), kind) + padded(body)


def record(key, value):
    rest = b" " + key + b"=" + value + b"\n"
    size = len(rest) + 1
    while len(b"%d" % size) + len(rest) != size:
        size += 1
    return b"%d" % size + rest


# ---- what tarfile and GNU tar say too

@pytest.mark.parametrize("form", ["ustar", "gnu", "pax"])
def test_members_are_those_of_tarfile(form, tmp_path):
    names = NAMES if form == "ustar" else NAMES + LONG
    path = tar_of(names, FORMATS[form], tmp_path / "a.tar")
    found = members(path)
    assert found == by_tarfile(path)
    content = path.read_bytes()
    assert [name for name, *_ in found] == names
    for number, (_, start, offset, size) in enumerate(found):
        assert content[offset:offset + size] == bytes([65 + number]) * size and start < offset


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_members_are_those_of_gnu_tar(form, tmp_path):
    names = ["a.jpg", "folder/b.JPEG"] + ([] if form == "v7" else ["c/" * 45 + "d" * 60]) + (
        ["e/" * 100 + "f" * 100 + ".png", "größe/写真.webp"] if form in ("gnu", "oldgnu", "posix") else [])
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "in" / name, bytes([65 + number]) * SIZES[1 + number])
    (tmp_path / "in/hard link").hardlink_to(tmp_path / "in/a.jpg")
    (tmp_path / "in/link").symlink_to("n" * 200 if form in ("gnu", "oldgnu", "posix") else "a.jpg")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", tmp_path / "in", "."], check=True)
    assert members(path) == by_tarfile(path)
    assert sorted(name for name, *_ in members(path)) == sorted(f"./{name}" for name in names)


@pytest.mark.parametrize("form", ["gnu", "pax"])  # a binary number in the header, and a PAX record
def test_a_member_of_more_than_8_gib(form, tmp_path):
    info = tarfile.TarInfo("big.bin")
    info.size = (9 << 30) + 5
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(info.tobuf(FORMATS[form]))
        offset = file.tell()
        file.truncate(offset + (9 << 30) + 512)  # a hole, no bytes on the disk
        file.seek(0, os.SEEK_END)
        file.write(header(b"after") + END)
    assert members(path) == by_tarfile(path) == [
        ("big.bin", 0, offset, info.size), ("after", offset + (9 << 30) + 512, offset + (9 << 30) + 1024, 0)]


def test_the_dialects_of_headers(tmp_path):
    blocks = [header(b"old", kind=b"\0", magic=bytes(8)), header(b"a folder of v7/", kind=b"\0", magic=bytes(8)),
              header(b"name", prefix=b"prefix"), header(b"no prefix", magic=b"ustar  \0", prefix=b"01234567"),
              header(b"contiguous", kind=b"7"), header(b"spaces", size_field=b"        3 \0 ") + padded(b"abc"),
              header("größe".encode(), signed=True), header(b"dump", 3, b"D") + padded(b"abc"),
              pax(record(b"path", b"sun"), kind=b"X") + header(), pax(record(b"path", b"")) + header(b"own name"),
              pax(record(b"comment", b"by git"), kind=b"g") + header(b"last")]
    names = ["old", "prefix/name", "no prefix", "contiguous", "spaces", "größe", "sun", "own name", "last"]
    path = write(tmp_path / "a.tar", b"".join(blocks) + END)
    assert [name for name, *_ in members(path)] == names
    # tarfile strips no prefix from files of the old GNU format; all else it reads alike.
    path = write(tmp_path / "a.tar", b"".join(blocks[:3] + blocks[4:9]) + END)
    assert members(path) == by_tarfile(path)


def test_a_tar_within_a_tar(tmp_path):
    inner = tar_of(NAMES, tarfile.USTAR_FORMAT, tmp_path / "inner.tar")
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        tar.add(inner, "inner.tar")
        tar.add(inner, "again.tar")
    (_, _, first, size), (_, _, second, _) = members(tmp_path / "outer.tar")
    assert first > 0 and [
        (name, start - second, offset - second, length) for name, start, offset, length in
        members(tmp_path / "outer.tar", start=second, end=second + size)] == by_tarfile(inner)


def test_very_many_empty_members_take_no_memory(tmp_path):
    path = write(tmp_path / "a.tar", header() * 20_000 + END)
    descriptor = os.open(path, os.O_RDONLY)
    tracemalloc.start()
    try:
        assert sum(1 for _ in scan(LocalFile(descriptor), "a.tar")) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
        os.close(descriptor)


# ---- what is refused

@pytest.mark.parametrize("form", ["ustar", "gnu", "pax"])
def test_a_tar_that_is_cut_off_anywhere(form, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name in ("a" * 100, "b" * 90 + "/" + "b" * 50, *(LONG if form != "ustar" else ())):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    content = path.read_bytes()
    *_, (_, _, offset, size) = members(path)
    end = offset + -(-size // 512) * 512
    for length in [*range(0, end, 256), end - 1, end + 511]:  # boundaries, within headers, within content
        write(path, content[:length])
        with pytest.raises(DataError, match=r"a\.tar.*(cut off|more than the file has left)"):
            members(path)
    write(path, content[:end + 512])
    assert len(members(path)) > 1  # one block of zeros is enough


def test_every_flipped_byte_of_a_header_is_seen(tmp_path):
    block = header(b"name.jpg", 3, prefix=b"folder")
    for position in range(512):
        damaged = bytearray(block)
        damaged[position] ^= 0x15
        path = write(tmp_path / "a.tar", header(b"first") + bytes(damaged) + padded(b"abc") + END)
        with pytest.raises(DataError, match=r"a\.tar is damaged or no tar: at byte 512, the checksum of its header"):
            members(path)


BINARY = b"\x80" + bytes(3)
HUGE = b"%d" % 10 ** 17
HOSTILE = {
    "a size beyond the file": (header(size=8 << 20), "the member at byte 0 says it has 8388608 bytes, more than"),
    "offsets that overflow 64 bits": (header(size_field=b"\x80" + b"\xff" * 11), "says it has 3094850098213450687"),
    "a binary size just beyond 63 bits": (header(size_field=BINARY + b"\x80" + bytes(7)), "9223372036854775808 b"),
    "a negative size": (header(size_field=b"\xff" * 12), "its size is negative or has no end"),
    "a size of letters": (header(size_field=b"12345678xyz\0"), "its size is b'12345678xyz'"),
    "a size with a sign": (header(size_field=b"-0000000001\0"), "its size is b'-0000000001'"),
    "a PAX size with a sign": (pax(record(b"size", b"-5")) + header(), "its PAX size is b'-5'"),
    "a PAX size that is huge": (pax(record(b"size", HUGE)) + header(), "more than the file has left"),
    "a PAX size of 30 digits": (pax(record(b"size", b"9" * 30)) + header(), "its PAX size is b'9999"),
    "a PAX header of 4 GB": (header(b"P", 4 << 30, b"x"), "says it has 4294967296 bytes, more than the file has left"),
    "a PAX header of 2 MB": (header(b"P", 2 << 20, b"x") + bytes(2 << 20), "an extended header of 2097152 bytes"),
    "a long name of 2 MB": (header(b"L", 2 << 20, b"L") + bytes(2 << 20), "an extended header of 2097152 bytes"),
    "a NUL in a PAX path": (pax(record(b"path", b"a.jpg\0.txt")) + header(), "has a NUL"),
    "a NUL in a long name": (header(b"L", 5, b"L") + padded(b"a\0b\0\0") + header(), "has a NUL"),
    "a name that is no UTF-8": (header(b"\xff\xfe.jpg"), "the name b'.xff.xfe.jpg' is not UTF-8"),
    "a surrogate in a PAX path": (pax(record(b"path", b"\xed\xa0\x80")) + header(), "is not UTF-8"),
    "a PAX record without a length": (pax(b"path=x\n") + header(), "a PAX record that begins with b'path=x"),
    "a PAX record of length 0": (pax(b"0 path=x\n") + header(), "a PAX record that begins with b'0 path=x"),
    "a PAX record that ends in its length": (pax(b"2 path=x\n") + header(), "a PAX record that begins with b'2 path=x"),
    "a PAX record beyond its header": (pax(b"99 path=x\n") + header(), "a PAX record that begins with b'99 path=x"),
    "a PAX record without an end of line": (pax(b"8 path=xy") + header(), "a PAX record that begins with b'8 path=x"),
    "a PAX record of a huge length": (pax(b"9" * 400 + b" path=x\n") + header(), "a PAX record that begins with b'999"),
    "extended headers without end": (pax(record(b"path", b"x")) * 50, "is cut off at byte 51200"),
    "an extended header without member": (pax(record(b"path", b"x")) + END, "an extended header without its member"),
    "a name for all that follow": (pax(record(b"path", b"x"), kind=b"g") + header(), "one name or size for all"),
    "a sparse file of GNU": (header(kind=b"S"), "sparse files are not supported"),
    "a sparse file of PAX": (pax(record(b"GNU.sparse.major", b"1")) + header(), "sparse files are not supported"),
    "text": (b"<html>not found</html>".ljust(1024), "at byte 0, the checksum of its header is wrong"),
    "a compressed tar": (b"\x1f\x8b\x08".ljust(1024, b"\0"), "it is compressed, only plain tars .* unpack it"),
    "an empty file": (b"", "is cut off at byte 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_are_refused_in_a_sentence(name, tmp_path):
    content, message = HOSTILE[name]
    end = b"" if "without end" in name or not content else END
    with pytest.raises(DataError, match=r"^a\.tar.*" + message) as caught:
        members(write(tmp_path / "a.tar", content + end))
    assert len(str(caught.value)) < 400 and "\0" not in str(caught.value)
    assert re.search(r"byte \d", str(caught.value))


def test_a_megabyte_of_tiny_records_takes_no_time(tmp_path):
    """Each record costs its own length, not that of all."""
    path = write(tmp_path / "a.tar", pax(b"5 a=\n" * 200_000, record(b"path", b"found")) + header() + END)
    assert members(path)[0][0] == "found"


def test_numbers_count_from_the_tar_within(tmp_path):
    path = write(tmp_path / "a.tar", bytes(1024) + header() + header(kind=b"S") + END)
    with pytest.raises(DataError, match="at byte 512, sparse"):
        members(path, start=1024)
