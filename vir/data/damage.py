"""What is wrong within one shard: by its index rows, its tar headers and its labels, named by key and offset."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from vir.data.random_access import LocalFile
from vir.data.shards import ShardInfo, index_dtype, member_header, sample_json
from vir.data.sources.listing import IMAGE_EXTENSIONS, make_key
from vir.data.tar import BLOCK, Member, TarError, padded, scan
from vir.data.tar_samples import IMAGES, LABELS, MAX_LABEL_BYTES, split_name, told_in

MAX_ALIKE = 100
"""The most findings of one kind that a file gets; the others are counted."""

_PIECE = 1 << 20
"""Bytes that are read at once."""
_OWN_FIELDS = {"filename", "height", "label", "width"}
"""Of the json members that vir-convert writes."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be in a split."""

    shard: str
    """Name of the file in the split folder: a shard, the index or the manifest."""
    key: str | None
    """Of the sample, where it is one's."""
    offset: int | None
    """Where it begins, in bytes from the beginning of the file."""
    what: str

    def __str__(self) -> str:
        shard, key = (_one_line(name) for name in (self.shard, self.key or ""))
        return f"{shard}{':' * bool(key)}{key}{'' if self.offset is None else f'@{self.offset}'}: {self.what}"


def damaged_images(descriptor: int, shard: str, rows: np.ndarray) -> list[Finding]:
    """The images whose bytes are not those of the index, by their CRC-32. Raises OSError."""
    size = os.fstat(descriptor).st_size
    findings: list[Finding] = []
    more = 0
    for row in rows[rows["offset"] <= size - rows["size"]]:
        offset, length = int(row["offset"]), int(row["size"])
        if (crc := _crc32(descriptor, offset, length)) == row["crc32"]:
            continue
        if len(findings) == MAX_ALIKE:
            more += 1
            continue
        findings.append(Finding(shard, _key(row), offset, f"the image's {length} bytes are damaged: their CRC-32 is "
                                f"{crc:08x}, the index says {row['crc32']:08x}"))
    if more:
        findings.append(Finding(shard, None, None, f"and {more:,} more of its images"))
    return findings


def lost_images(size: int, shard: str, rows: np.ndarray) -> list[Finding]:
    """The images that lie beyond the end of a shard that now has `size` bytes."""
    lost = rows[rows["offset"] > size - rows["size"]]
    if not len(lost):
        return []
    first = lost[np.argmin(lost["offset"])]
    count = "1 image, this one, lies" if len(lost) == 1 else f"{len(lost):,} images, from this one on, lie"
    return [Finding(shard, _key(first), int(first["offset"]), f"cut off: {count} beyond the end of the file")]


def damaged_structure(descriptor: int, info: ShardInfo, rows: np.ndarray | None, classes: Sequence[str]
                      ) -> list[Finding]:
    """What tar headers, labels and padding say against the index and against themselves.

    Of a shard without sha256, headers alone are read.

    Args:
        rows: of this shard, in the index; None where the index cannot be trusted: then a damaged header ends the look.

    Raises:
        OSError: the file cannot be read.
    """
    return _Look(descriptor, info, rows, classes).findings()


class _Sample(NamedTuple):
    """What the index says of one image."""

    key: str
    label: int
    offset: int
    size: int
    width: int
    height: int


class _Look:
    """One walk over the headers of a shard, that goes on behind a damaged header where the next sample begins.

    Memory grows neither with the members of the tar nor with its damages; the index rows are copied once.
    """

    def __init__(self, descriptor: int, info: ShardInfo, rows: np.ndarray | None, classes: Sequence[str]) -> None:
        self.descriptor, self.shard, self.classes = descriptor, info.name, classes
        self.reads_contents = info.sha256 is not None
        self.size = os.fstat(descriptor).st_size
        self.is_truncated = self.size < info.bytes
        self.has_index = rows is not None
        rows = np.empty(0, index_dtype(1)) if rows is None else rows
        self.rows = rows[np.argsort(rows["offset"], kind="stable")]
        self.offsets = np.ascontiguousarray(self.rows["offset"])
        # The members of a sample ask for the same rows, one after another.
        self._sample = functools.lru_cache(maxsize=8)(functools.partial(_sample, self.rows))
        self.is_met = np.zeros(len(rows), bool)
        self.found: list[Finding] = []
        self.more = 0
        self.told: dict[str, Finding | None] = {}
        """Of the sample at hand: which of its members tell the label, and what is wrong with what they tell; "" is a
        json that tells none."""
        self.odd = {kind: _Odd() for kind in ("header", *LABELS)}
        """What differs from what vir-convert writes: a trace only where it is the exception."""

    def findings(self) -> list[Finding]:
        position: int | None = 0
        while position is not None:
            position = self._walk(position)
        if not self.found:  # else a damaged header explains it
            is_inside = self.offsets <= self.size - padded(np.minimum(self.rows["size"], self.size))
            for i in np.flatnonzero(~self.is_met & is_inside).tolist():
                self._add(self._sample(i).key, self._sample(i).offset, "the index has an image here, the tar has none")
        if not self.found and self.odd["header"].is_exception():
            for odd in filter(_Odd.is_exception, self.odd.values()):
                self.found, self.more = self.found + odd.findings, self.more + odd.count - len(odd.findings)
        more = [Finding(self.shard, None, None, f"and {self.more:,} more of its members")] if self.more else []
        return [*self.found, *more]

    def _around(self, offset: int) -> list[_Sample]:
        """The last sample whose image begins before that byte, and the two whose images begin there or behind."""
        after = int(np.searchsorted(self.offsets, offset))
        return [self._sample(i) for i in range(max(after - 1, 0), min(after + 2, len(self.rows)))]

    def _walk(self, begin: int) -> int | None:
        """Checks the members from there on; returns where to go on behind what cannot be read."""
        last, is_told, last_key, is_whole = begin, False, None, begin == 0
        try:
            for member in scan(LocalFile(self.descriptor), self.shard, begin):
                key, extension = split_name(member.name)
                if key != last_key:
                    self._end_sample(is_whole)
                    is_whole = is_whole or last_key is not None
                self._member(member, key, (extension or "").lower())
                last, last_key = member.offset + padded(member.size), key
            self._end_sample(is_whole)
        except TarError as error:
            self._end_sample(is_whole=False)
            stop, is_told = begin + error.offset, error.is_cut and self.is_truncated
            what = f"{'the tar ends too early' if error.is_cut else 'a damaged tar header'}: {error.reason}"
        else:
            if not len(self.offsets) or self.offsets[-1] <= last:
                self._tail(last)
                return None
            stop, what = last, "zeros where a tar header belongs"
        around = self._around(stop)
        if not is_told:
            self._add(_owner(around, stop), stop, what)
        # Behind the damaged header, the index knows where images begin and end; headers are before and behind them.
        places = [place for sample in around
                  for place in (_header_start(self.descriptor, sample.offset), sample.offset + padded(sample.size))
                  if stop < place <= self.size - BLOCK]
        return min(places, default=None)

    def _member(self, member: Member, key: str, extension: str) -> None:
        sample = next((sample for sample in self._around(member.start) if sample.key == key), None)
        if self.has_index and extension in IMAGES:
            self._image(member, key)
        elif self.has_index and extension in LABELS and sample is None:
            self._add(key, member.start, f"the index does not know {member.name!r}")
        if self.reads_contents:
            self._contents(member, key, extension, sample)

    def _image(self, member: Member, key: str) -> None:
        i = int(np.searchsorted(self.offsets, member.offset))
        if i == len(self.offsets) or self.offsets[i] != member.offset:
            self._add(key, member.start, f"the index does not know {member.name!r}")
            return
        sample, self.is_met[i] = self._sample(i), True
        if sample.key != key:
            self._add(sample.key, member.start, f"the tar calls this image {member.name!r}")
        elif sample.size != member.size:
            self._add(key, member.start, f"the image has {member.size} bytes by its tar header, the index says "
                      f"{sample.size}")

    def _contents(self, member: Member, key: str, extension: str, sample: _Sample | None) -> None:
        end = member.offset + member.size
        padding = os.pread(self.descriptor, -member.size % BLOCK, end)
        if stripped := padding.lstrip(b"\0"):
            self._add(key, end + len(padding) - len(stripped), "bytes that belong to no image are damaged: the padding "
                      f"after {member.name!r} is not zero")
        header = os.pread(self.descriptor, min(member.offset - member.start, _PIECE), member.start)
        self._compare("header", header == member_header(member.name, member.size), Finding(
            self.shard, key, member.start, f"the tar header of {member.name!r} is not as vir-convert writes it"))
        if sample is not None and extension in LABELS and member.size <= MAX_LABEL_BYTES[extension]:
            content = os.pread(self.descriptor, member.size, member.offset)
            self._label(member, extension, content, sample)
            is_own = (content == str(sample.label).encode() if extension == "cls" else
                      extension == "json" and self._is_own_json(content, sample))
            self._compare(extension, is_own, Finding(
                self.shard, key, member.offset, f"{member.name!r} is not as vir-convert writes it: {content[:200]!r}"))

    def _label(self, member: Member, extension: str, content: bytes, sample: _Sample) -> None:
        """Keeps what a member tells of the label until the sample ends: a cls comes before a json, both before a txt,
        which may be a caption."""
        try:
            told = told_in(extension, content)
        except (ValueError, RecursionError):
            told = None
        if extension == "json":
            if what := _wrong_json(told, content, sample):  # not as it was when the index was made, also beside a cls
                self._add(sample.key, member.offset, what)
                return
            if not isinstance(told, dict) or "label" not in told:
                extension, told, what = "", None, 'json has no "label"'
            else:
                told, what = told["label"], f"json's label is {str(told['label'])[:50]}"
        else:
            what = f"{extension} is {content.strip()[:50]!r}"
        name = self._class_name(sample) if extension == "txt" else None
        self.told[extension] = None if told is not None and told in (sample.label, name) else Finding(
            self.shard, sample.key, member.offset,
            f"a damaged label: the {what}, the index says {sample.label}{f' ({name})' if name else ''}")

    def _end_sample(self, is_whole: bool) -> None:
        """Args: is_whole: no damaged header may hide a member of the sample, such as a cls."""
        order = (*LABELS, "") if is_whole else LABELS[:1]
        first = next((self.told[extension] for extension in order if extension in self.told), None)
        if first is not None and first.key is not None and first.offset is not None:
            self._add(first.key, first.offset, first.what)
        self.told.clear()

    def _is_own_json(self, content: bytes, sample: _Sample) -> bool:
        """Whether it is what vir-convert writes for this sample, as far as its file name leads to class and key."""
        try:
            told = told_in("json", content)
        except (ValueError, RecursionError):
            return False
        filename = told.get("filename") if isinstance(told, dict) else None
        if not isinstance(filename, str) or content != sample_json(filename, sample.label, sample.width, sample.height):
            return False
        class_name, _, name = filename.rpartition("/")
        ending = os.path.splitext(name)[1]  # the only part of the name that the key lacks
        return class_name == self._class_name(sample) and _is_image_ending(ending) and any(
            sample.key == key or sample.key.startswith(f"{key}-")
            for key in (make_key(class_name, name), make_key(class_name, name, class_in_key=False)))

    def _class_name(self, sample: _Sample) -> str:
        return self.classes[sample.label] if 0 <= sample.label < len(self.classes) else ""

    def _tail(self, begin: int) -> None:
        """The end of the tar: zeros."""
        if not self.reads_contents:
            return
        for offset in range(begin, self.size, _PIECE):
            piece = os.pread(self.descriptor, _PIECE, offset)
            if stripped := piece.lstrip(b"\0"):
                self._add(None, offset + len(piece) - len(stripped), "bytes that belong to no image are damaged: the "
                          "end of the tar is not zero")
                return

    def _add(self, key: str | None, offset: int, what: str) -> None:
        if len(self.found) < MAX_ALIKE:
            self.found.append(Finding(self.shard, key, offset, what))
        else:
            self.more += 1

    def _compare(self, kind: str, is_own: bool, finding: Finding) -> None:
        """Counts whether something is as vir-convert writes it."""
        odd = self.odd[kind]
        odd.members += 1
        odd.count += not is_own
        if not is_own and len(odd.findings) < MAX_ALIKE:
            odd.findings.append(replace(finding, what=f"bytes that belong to no image are damaged: {finding.what}"))


class _Odd:
    """What of one kind is not as vir-convert writes it."""

    def __init__(self) -> None:
        self.members = self.count = 0
        self.findings: list[Finding] = []

    def is_exception(self) -> bool:
        return self.count <= max(1, self.members // 2)


def _sample(rows: np.ndarray, i: int) -> _Sample:
    _, label, offset, size, _, width, height, key = rows[i].item()
    return _Sample(key.decode("utf-8", "backslashreplace"), label, offset, size, width, height)


def _wrong_json(told: Any, content: bytes, sample: _Sample) -> str | None:
    """What is wrong with it wherever the label comes from; told is None where it is no JSON."""
    if told is None and content.strip() != b"null":
        return f"a damaged label: the json is none: {content[:200]!r}"
    if isinstance(told, dict) and told.keys() == _OWN_FIELDS:
        pairs = [("label", sample.label)]
        pairs += [("width", sample.width), ("height", sample.height)] if sample.width else []
        for field, expected in pairs:
            if told[field] != expected:
                return f"a damaged label: the json's {field} is {str(told[field])[:50]}, the index says {expected}"
    return None


def _is_image_ending(ending: str) -> bool:
    return ending.lower() in IMAGE_EXTENSIONS and ending in (ending.lower(), ending.upper())


def _owner(around: Sequence[_Sample], header: int) -> str | None:
    """Key of the sample that the header at that byte belongs to: the one whose image follows, else the one before."""
    before = None
    for sample in around:
        if sample.offset > header:
            return sample.key if sample.offset - header <= 3 * BLOCK else before
        before = sample.key
    return before


def _header_start(descriptor: int, offset: int) -> int:
    """Where the headers of the member begin whose content begins at `offset`: with an extended one before, or not."""
    begin = offset - 3 * BLOCK
    block = os.pread(descriptor, BLOCK, begin) if begin >= 0 else b""
    # Two signs, because one of them may be what is damaged.
    return begin if block[156:157] in (b"x", b"L") or block.startswith(b"././@") else offset - BLOCK


def _crc32(descriptor: int, offset: int, size: int) -> int:
    crc = 0
    for piece in _pieces(descriptor, offset, size):
        crc = zlib.crc32(piece, crc)
    return crc


def _pieces(descriptor: int, offset: int, size: int) -> Iterator[bytes]:
    while size > 0 and (piece := os.pread(descriptor, min(size, _PIECE), offset)):
        yield piece
        offset, size = offset + len(piece), size - len(piece)


def _key(row: np.void) -> str:
    return row["key"].decode("utf-8", "backslashreplace")


def _one_line(name: str) -> str:
    return name if name.isprintable() else repr(name)


if __name__ == "__main__":
    raise SystemExit("vir.data.damage is a part of the library; the program is vir-verify")
