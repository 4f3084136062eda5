"""The official archives of ImageNet, never unpacked -> a Source.

    ILSVRC2012_img_train.tar          1,000 tars, n01440764.tar, ..., each with the images of one class
    ILSVRC2012_img_val.tar            50,000 images, ILSVRC2012_val_00000001.JPEG, ...
    ILSVRC2012_devkit_t12.tar.gz      the labels of these, by line; needed beside it
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from gzip import BadGzipFile, GzipFile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vir.data.random_access import LocalFile
from vir.data.sources.imagenet import check_classes
from vir.data.sources.listing import IMAGE_EXTENSIONS, Image, Listing, Source
from vir.data.tar import Member, opened, scan
from vir.data.tar_samples import read_part
from vir.errors import DataError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
ARCHIVES = {"train": TRAIN, "val": VAL, "validation": VAL}
"""By split."""

_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
_MAX_MEMBERS = 1 << 18
"""Of a tar whose members are kept in memory; the most there are is 50,000."""
_MAX_DEVKIT_BYTES, _MAX_DEVKIT_MEMBER = 1 << 27, 1 << 23
"""Unpacked, of all and of one file; all have a few MB, meta.mat 2."""


def read_archive(path: Path, split: str, classes: Sequence[str] | None = None) -> Source:
    """Lists ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar by the headers in it: one small read an image.

    Args:
        classes: the class list in label order; ImageNet's if None. The archive must have exactly these.

    Raises:
        DataError: it is not the archive of the split, it is damaged or cut off, or the devkit is.
    """
    if path.name != ARCHIVES.get(split):
        raise DataError(f"{path} is not the archive of split {split!r}: train is {TRAIN}, val is {VAL}; the test "
                        "images have no labels; choose another --split or --source")
    return _read_train(path, classes) if path.name == TRAIN else _read_val(path, classes)


def _read_train(path: Path, classes: Sequence[str] | None) -> Source:
    with opened(path) as file:
        inner = _named(scan(file, str(path)), (".tar",), str(path))
        classes = check_classes((name[:-len(".tar")] for name in inner.members), classes, str(path))
        listing = _listing(path, classes)
        ignored = inner.ignored
        for name, member in sorted(inner.members.items()):
            where = f"{name} in {path}"
            begin, end = member.offset, member.offset + member.size
            images = _named(scan(file, where, begin, end), IMAGE_EXTENSIONS, where, begin)
            ignored += images.ignored
            if not images.members:
                raise DataError(f"{where} has no images; copy or download the archive again")
            listing.add(name[:-len(".tar")], _images(images.members.items()))
    return listing.source("ImageNet archive", path.parent, classes, ignored)


def _read_val(path: Path, classes: Sequence[str] | None) -> Source:
    with opened(path) as file:
        images = _named(scan(file, str(path)), IMAGE_EXTENSIONS, str(path))
    wnid_of, truth = _read_devkit(path.with_name(DEVKIT))
    classes = check_classes(wnid_of.values(), classes, str(path.with_name(DEVKIT)))
    if len(truth) != len(images.members):
        raise DataError(f"{path} has {len(images.members)} images, but the ground truth in {path.with_name(DEVKIT)} "
                        f"has {len(truth)} lines; copy or download both again")
    of_class: dict[str, list[tuple[str, Member]]] = defaultdict(list)
    for number, item in zip(truth, sorted(images.members.items())):
        of_class[wnid_of[number]].append(item)
    listing = _listing(path, classes)
    for wnid, items in sorted(of_class.items()):
        listing.add(wnid, _images(items))
    return listing.source("ImageNet archive", path.parent, classes, images.ignored)


class _Named(NamedTuple):
    members: dict[str, Member]
    """By name, without folder."""
    ignored: int


def _named(members: Iterable[Member], endings: tuple[str, ...], where: str, begin: int = 0) -> _Named:
    """The members whose names end so; hidden ones are passed over, others counted. Their tar begins at `begin`."""
    found: dict[str, Member] = {}
    ignored = 0
    for member in members:
        name = member.name.rpartition("/")[2]
        if name.startswith("."):
            continue
        if not name.lower().endswith(endings):
            ignored += 1
        elif name in found:
            raise DataError(f"{where} has {name!r} twice, at bytes {found[name].start - begin} and "
                            f"{member.start - begin}; copy or download it again")
        elif len(found) == _MAX_MEMBERS:
            raise DataError(f"{where} has more than {_MAX_MEMBERS} members: it is no archive of ImageNet; download it "
                            "again")
        else:
            found[name] = member
    return _Named(found, ignored)


def _listing(path: Path, classes: Sequence[str]) -> Listing:
    return Listing({name: label for label, name in enumerate(classes)}, files=(path.name,), sized=True)


def _images(items: Iterable[tuple[str, Member]]) -> Iterator[Image]:
    return (Image(name, offset=member.offset, size=member.size) for name, member in items)


def _read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """The wnids of the classes by ILSVRC2012_ID, and the ID of each validation image in the order of the names.

    The IDs are no labels: these follow from the wnids.
    """
    if not path.exists():
        raise DataError(f"no such file: {path}, which has the labels of {VAL}; download it to that place")
    parts = _unpacked(path, (_META, _TRUTH))
    wnid_of = _wnids(parts[_META], f"{_META} in {path}")
    return wnid_of, _numbers(parts[_TRUTH], wnid_of, f"{_TRUTH} in {path}")


def _unpacked(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Some members of a .tar.gz by name."""
    parts: dict[str, bytes] = {}
    with opened(path) as packed, tempfile.TemporaryFile() as tar:
        try:
            with open(packed.descriptor, "rb", closefd=False) as file, GzipFile(fileobj=file) as unpacking:
                while block := unpacking.read(1 << 20):
                    if tar.tell() + len(block) > _MAX_DEVKIT_BYTES:
                        raise DataError(f"{path} unpacks to more than {_MAX_DEVKIT_BYTES} bytes: it is no devkit of "
                                        "ImageNet; download it again")
                    tar.write(block)
        except (BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is damaged ({error}); copy or download it again") from error
        tar.flush()
        unpacked = LocalFile(tar.fileno())
        for member in scan(unpacked, str(path)):
            if (name := os.path.normpath(member.name)) in names and member.size <= _MAX_DEVKIT_MEMBER:
                parts[name] = read_part(unpacked, member, str(path))
    if missing := [name for name in names if name not in parts]:
        raise DataError(f"{path} has no {missing[0]}, or one of more than {_MAX_DEVKIT_MEMBER} bytes; download "
                        "it again")
    return parts


def _wnids(data: bytes, where: str) -> dict[int, str]:
    """Inner nodes of WordNet, which have children, are no classes."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"{where} is read by scipy ({error}): pip install 'vir-at-scale[archives]'") from error
    try:
        synsets = loadmat(BytesIO(data), squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = [(int(synset["ILSVRC2012_ID"]), str(synset["WNID"])) for synset in np.atleast_1d(synsets)
                  if int(synset["num_children"]) == 0]
    except Exception as error:  # loadmat raises whatever it stumbles over
        raise DataError(f"{where} is damaged ({type(error).__name__}: {error}); copy or download it again") from error
    wnid_of = dict(leaves)
    if not leaves or not len(wnid_of) == len(set(wnid_of.values())) == len(leaves):
        raise DataError(f"{where} has {len(leaves)} synsets without children, some of them with one ILSVRC2012_ID or "
                        "WNID; copy or download it again")
    return wnid_of


def _numbers(text: bytes, known: dict[int, str], where: str) -> list[int]:
    numbers = []
    for line, word in enumerate(text.rstrip().split(b"\n"), 1):
        word = word.strip()
        if not word.isdigit() or len(word) > 9 or int(word) not in known:
            raise DataError(f"{where}: line {line} is {word.decode(errors='replace')[:50]!r}, expected the "
                            f"ILSVRC2012_ID of one of the {len(known)} classes; copy or download it again")
        numbers.append(int(word))
    return numbers


if __name__ == "__main__":
    raise SystemExit("vir.data.sources.archives is a part of the library; the program is vir-convert")
