"""The labelled images of a WebDataset tar: its members put together by key, images unread, labels read."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vir.data.random_access import RandomAccess, read_exactly
from vir.data.repeats import repeated
from vir.data.sources.listing import IMAGE_EXTENSIONS
from vir.data.tar import Member, scan
from vir.errors import DataError

IMAGES = tuple(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
"""Endings of members that are images, in upper or lower case."""
LABELS = ("cls", "json", "txt")
"""Endings of members that tell the label; the first one that does wins."""

MAX_LABEL_BYTES = {"cls": 64, "json": 1 << 20, "txt": 4096}
"""The most bytes of a label's member."""
_MAX_LABEL = (1 << 31) - 1


class TarSample(NamedTuple):
    """One labelled image of a tar."""

    key: str
    """The name up to the first dot of its last part, folders included, as WebDataset has it."""
    start: int
    """Of the first header block of the sample's first member."""
    image: Member
    extension: str
    """Of IMAGES."""
    label: int | str
    """A number, or what a txt says that is no number: the name of a class."""
    filename: str | None
    """What a json says that the image was called."""


class _Named(NamedTuple):
    key: str
    extension: str
    member: Member


def read_samples(file: RandomAccess, where: str) -> Iterator[TarSample]:
    """The samples of a tar in order. Members of one key lie one after another.

    The image is one of IMAGES. The label is the decimal number in cls, else "label" in json, else the number or the
    class name in txt. Other members of a sample are passed over, and so are those whose name begins with "." or "__",
    which are no data but what programs leave in archives.

    Memory: 8 bytes a sample, and no more than 1 MB else, whatever the tar holds.

    Args:
        where: names the tar in messages.

    Raises:
        DataError: what vir.data.tar.scan refuses; a sample without image or label or with two of one; a label that is
            none; a key that comes again after other ones: then at the end of the tar. It names key and byte.
        OSError: the file cannot be read.
    """
    hashes = array("q")
    for key, members in _by_key(file, where):
        hashes.append(hash(key))
        yield _sample(key, members, file, where)
    if twice := set(repeated(np.frombuffer(hashes, np.int64)).tolist()):
        _refuse_twice(twice, file, where)


def split_name(name: str) -> tuple[str, str | None]:
    """Key and ending of a member, as WebDataset has them: all up to the first dot of the last part, and what comes
    after that dot; None where there is no dot."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension if dot else None


def told_in(extension: str, content: bytes) -> Any:
    """What a member of LABELS says: a json its value; cls and txt a number where it is a decimal one, else their text.

    Raises:
        ValueError, RecursionError: it is no JSON or no UTF-8.
    """
    if extension == "json":
        return json.loads(content)
    text = content.decode("utf-8").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else text


def read_part(file: RandomAccess, member: Member, where: str) -> bytes:
    """All bytes of a member that is known to be small.

    Raises:
        DataError: the file has become shorter.
        OSError: it cannot be read.
    """
    try:
        return read_exactly(file, member.size, member.offset)
    except EOFError as error:
        raise DataError(f"{where} became shorter while it was read, at byte {member.offset}") from error


def _by_key(file: RandomAccess, where: str) -> Iterator[tuple[str, Iterable[_Named]]]:
    """Neighbours of one key, without those that are no data. A sample has few members that matter: only the first
    member and those are kept."""
    last: str | None = None
    kept: list[_Named] = []
    for member in scan(file, where):
        if member.name.rpartition("/")[2].startswith((".", "__")):
            continue
        key, extension = split_name(member.name)
        named = _Named(key, (extension or "").lower(), member)
        if named.key != last:
            if last is not None:
                yield last, kept
            last, kept = named.key, [named]
        elif named.extension in IMAGES or named.extension in LABELS:
            if twin := [other for other in kept if _is_same(other, named)]:
                raise _refused(where, named, f"has {twin[0].member.name!r} and {member.name!r}, but it can have only "
                               "one of them")
            kept.append(named)
    if last is not None:
        yield last, kept


def _is_same(one: _Named, other: _Named) -> bool:
    return one.extension == other.extension or (one.extension in IMAGES and other.extension in IMAGES)


def _sample(key: str, members: Iterable[_Named], file: RandomAccess, where: str) -> TarSample:
    first, *_ = members
    by_extension = {named.extension: named for named in members}
    images = [named for named in members if named.extension in IMAGES]
    if not images:
        raise _refused(where, first, f"has no image: it begins with {first.member.name!r}, an image would be "
                       f"{key}.jpg, .jpeg, .png or .webp beside it (a key ends at the first dot)")
    about = _told(by_extension["json"], file, where) if "json" in by_extension else None
    about = about if isinstance(about, dict) else {}
    filename = about.get("filename")
    label = _label(by_extension, about, file, where)
    if label is None:
        raise _refused(where, first, f"has no label: expected {key}.cls, or {key}.json with a \"label\", or {key}.txt "
                       "right after or before its image")
    return TarSample(key, first.member.start, images[0].member, images[0].extension, label,
                     filename if isinstance(filename, str) else None)


def _label(members: dict[str, _Named], about: dict[str, Any], file: RandomAccess, where: str) -> int | str | None:
    if named := members.get("cls"):
        return _checked(_told(named, file, where), named, where)
    if "label" in about:
        return _checked(about["label"], members["json"], where)
    if named := members.get("txt"):
        told = _told(named, file, where)
        return told if isinstance(told, str) else _checked(told, named, where)
    return None


def _told(named: _Named, file: RandomAccess, where: str) -> Any:
    limit = MAX_LABEL_BYTES[named.extension]
    if named.member.size > limit:
        raise _refused(where, named, f"has a {named.extension} of {named.member.size} bytes, the limit is {limit}")
    try:
        return told_in(named.extension, read_part(file, named.member, where))
    except (ValueError, RecursionError) as error:
        why = f"none: {str(error)[:200]}" if named.extension == "json" else "no text"
        raise _refused(where, named, f"has a {named.extension} that is {why}") from error


def _checked(label: Any, named: _Named, where: str) -> int:
    if type(label) is not int or not 0 <= label <= _MAX_LABEL:
        raise _refused(where, named, f"has the label {str(label)[:50]!r} in its {named.extension}; a label is a number "
                       f"from 0 to {_MAX_LABEL}")
    return label


def _refuse_twice(hashes: set[int], file: RandomAccess, where: str) -> None:
    """Reads the tar once more for the names behind the hashes that came twice."""
    seen: dict[str, int] = {}
    for key, members in _by_key(file, where):
        if hash(key) in hashes:
            first, *_ = members
            if key in seen:
                raise _refused(where, first, f"was there already, at byte {seen[key]}; the members of a sample must "
                               "lie one after another, and keys must differ")
            seen[key] = first.member.start


def _refused(where: str, named: _Named, what: str) -> DataError:
    return DataError(f"{where}: sample {named.key!r} at byte {named.member.start} {what}")


if __name__ == "__main__":
    raise SystemExit("vir.data.tar_samples is a part of the library; the program is vir-index")
