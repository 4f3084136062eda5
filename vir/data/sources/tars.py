"""WebDataset shards, whoever wrote them -> a Source, so that they can be written anew as other shards."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vir.data.shards import MANIFEST, SplitManifest, read_manifest
from vir.data.sources.folder import some
from vir.data.sources.listing import Image, Listing, Source, make_key
from vir.data.tar import opened
from vir.data.tar_samples import TarSample, read_samples
from vir.errors import DataError

SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
"""Words for splits as they stand in file names, and which of them mean the same."""

_MAX_CLASSES = 1 << 20
"""Of a class list that is made up from the labels."""


def tars_in(folder: Path) -> list[str]:
    """The sorted names of the tars in a folder, without hidden ones."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def tars_of(names: Sequence[str], split: str, folder: Path) -> list[str]:
    """Those of the tars that belong to a split: those whose names have its word, as in NAME-train-0000.tar, or all,
    where none has a word for a split.

    Raises:
        DataError: only other splits are named.
    """
    words = {name: {SPLITS.get(word, word) for word in re.split(r"[^a-z]+", name.lower())} for name in names}
    if own := [name for name in names if SPLITS.get(split, split) in words[name]]:
        return own
    if others := [name for name in names if words[name] & set(SPLITS.values())]:
        raise DataError(f"{folder} has no tar of split {split!r} by its name, but {some(others)}; choose another "
                        "--split, or rename the files")
    return list(names)


def read_tars(path: Path, names: Sequence[str] | None = None, classes: Sequence[str] | None = None) -> Source:
    """Lists the samples of tars: headers and labels are read, no images.

    The class list is that of the manifest beside the tars, else `classes`, else "0", "1", ... to the greatest label.
    An image keeps the file name that its json tells as CLASS/NAME, where its key follows from it; so our own shards and
    timm's give the shards that the images' folder would. Otherwise it is called as its key, and keeps that.

    Args:
        path: a folder of tars, or one tar.
        names: of the tars in the folder that make the split, in order; None for one tar.

    Raises:
        DataError: what vir.data.tar_samples.read_samples refuses; a class that the list lacks; tars that are not those
            of the manifest beside them.
    """
    folder, tars = (path.parent, [path.name]) if names is None else (path, list(names))
    manifest = _manifest(folder, tars, names is not None)
    if manifest is not None:
        classes = _classes_of(manifest, classes, folder)
    counts = {shard.name: shard.num_samples for shard in manifest.shards} if manifest is not None else {}
    found = _Found(None if classes is None else tuple(classes))
    for number, name in enumerate(tars):
        with opened(folder / name) as file:
            count = found.add_all(read_samples(file, str(folder / name)), number, folder / name)
        if count != counts.get(name, count):
            raise DataError(f"{folder / name} has {count} samples, but {MANIFEST} says {counts[name]}; copy the split "
                            "again")
    if not found.buckets:
        raise DataError(f"the tars in {folder} have no samples: {some(tars)}")
    classes = tuple(map(str, range(found.greatest + 1))) if found.classes is None else found.classes
    listing = Listing({name: label for label, name in enumerate(classes)}, files=tars, sized=True)
    for group in sorted(found.buckets):
        class_name, class_in_key = group
        listing.add(class_name, found.buckets.pop(group).images(), class_in_key)
    return listing.source("WebDataset shards", folder, classes, 0)


def _manifest(folder: Path, tars: Sequence[str], is_whole: bool) -> SplitManifest | None:
    """The manifest beside the tars, where there is one; it knows them, and no others if they are the whole split."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    known = {shard.name for shard in manifest.shards}
    if differing := sorted(known ^ set(tars) if is_whole else set(tars) - known):
        raise DataError(f"{folder} has other tars than its {MANIFEST}: {some(differing)}; copy the split again")
    return manifest


def _classes_of(manifest: SplitManifest, classes: Sequence[str] | None, folder: Path) -> tuple[str, ...]:
    if classes is not None and tuple(classes) != manifest.classes:
        raise DataError(f"the class list of {len(classes)} classes is not that of {folder / MANIFEST} "
                        f"({len(manifest.classes)} classes); leave out --classes or choose another --output")
    return manifest.classes


class _Bucket:
    """Images of one class in arrays, until all tars are read."""

    def __init__(self) -> None:
        self.names, self.lengths, self.files = bytearray(), array("i"), array("i")
        self.offsets, self.sizes = array("q"), array("q")
        self.keys: dict[int, str] = {}

    def add(self, image: Image) -> None:
        if image.key is not None:
            self.keys[len(self.files)] = image.key
        name = image.name.encode()
        self.names += name
        self.lengths.append(len(name))
        self.files.append(image.file)
        self.offsets.append(image.offset)
        self.sizes.append(image.size)

    def images(self) -> Iterator[Image]:
        end = 0
        for i, length in enumerate(self.lengths):
            begin, end = end, end + length
            yield Image(self.names[begin:end].decode(), self.files[i], self.offsets[i], self.sizes[i],
                        self.keys.get(i))


class _Found:
    """What the tars hold, by class and by whether the class stands in the keys."""

    def __init__(self, classes: tuple[str, ...] | None) -> None:
        self.classes = classes
        self.buckets: dict[tuple[str, bool], _Bucket] = {}
        self.greatest = -1
        self._names = frozenset(classes or ())

    def add_all(self, samples: Iterable[TarSample], file: int, path: Path) -> int:
        """Returns their number."""
        count = 0
        for count, sample in enumerate(samples, 1):
            class_name = self._class_name(sample, path)
            named = _named(sample, class_name)
            bucket = self.buckets.setdefault((class_name, named.has_class), _Bucket())
            bucket.add(Image(named.name, file, sample.image.offset, sample.image.size, named.key))
        return count

    def _class_name(self, sample: TarSample, path: Path) -> str:
        label, where = sample.label, f"{path}: sample {sample.key!r} at byte {sample.start}"
        if isinstance(label, str):
            if label not in self._names:
                raise DataError(f"{where} has the label {label[:100]!r}, which is neither a number nor a name in the "
                                f"class list of {len(self._names)} classes; give the right list with --classes, or "
                                f"make one of the names with vir-index {path.parent}")
            return label
        self.greatest = max(self.greatest, label)
        if self.classes is None:
            if label >= _MAX_CLASSES:
                raise DataError(f"{where} has the label {label}; labels from {_MAX_CLASSES} need a class list: give it "
                                "with --classes")
            return str(label)
        if label >= len(self.classes):
            raise DataError(f"{where} has the label {label}, but the class list ends with {len(self.classes) - 1}; "
                            "give the right list with --classes")
        return self.classes[label]


class _Name(NamedTuple):
    name: str
    key: str | None
    """Where it does not follow from the name."""
    has_class: bool
    """The class stands in the key."""


def _named(sample: TarSample, class_name: str) -> _Name:
    """By what name an image is listed, so that it keeps its key."""
    stem = sample.key.rpartition("/")[2]
    folder, _, name = (sample.filename or "").rpartition("/")
    if folder == class_name and _is_file_name(name):
        key = make_key(class_name, name)
        if key == stem:
            return _Name(name, None, True)
        if re.fullmatch(re.escape(key) + r"-[1-9][0-9]*", stem):  # it was made unique
            return _Name(name, stem, True)
    return _Name(f"{stem}.{sample.extension}", None, False)


def _is_file_name(name: str) -> bool:
    """Whether a folder could have it: a json can tell any text."""
    try:
        return 0 < len(name.encode()) <= 255 and "\0" not in name
    except UnicodeEncodeError:  # half of a pair
        return False


if __name__ == "__main__":
    raise SystemExit("vir.data.sources.tars is a part of the library; the program is vir-convert")
