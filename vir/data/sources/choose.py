"""Which kind of source lies at a path: the one place that tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vir.data.sources.archives import ARCHIVES, DEVKIT, TRAIN, VAL, read_archive
from vir.data.sources.folder import class_folders, classes_beside, images_in, names_in, read_folder, some
from vir.data.sources.kaggle import kaggle_images, read_kaggle
from vir.data.sources.listing import Source
from vir.data.sources.tars import SPLITS, read_tars, tars_in, tars_of
from vir.errors import DataError


def open_source(path: Path, split: str, classes: Sequence[str] | None = None, sized: bool = False) -> Source:
    """The labelled images of one split, whatever they lie in.

    Args:
        path: what the user gave as --source.
        classes: the class list in label order. None: the kind of source knows it.
        sized: the size of each image is needed.

    Raises:
        DataError: nothing there that is known, or what is there is damaged.
    """
    try:
        if not path.exists():
            raise DataError(f"no such folder: {path}")
        return _open(path, split, classes, sized)
    except OSError as error:  # a folder on the way that cannot be searched, a name that is too long
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from error


def _open(path: Path, split: str, classes: Sequence[str] | None, sized: bool) -> Source:
    if not path.is_dir():
        return _open_file(path, split, classes)
    folder, tars = path / split, tars_in(path)
    if images := kaggle_images(path):
        return read_kaggle(images, split, classes, sized)
    if folder.is_dir() and class_folders(folder):
        return read_folder(folder, classes_beside(path, split) if classes is None else classes, sized)
    if official := [name for name in tars if name in ARCHIVES.values()]:
        # Also beside a folder of the split that holds what was unpacked of it, without classes.
        name = ARCHIVES.get(split, official[0])
        if name in official:
            return read_archive(path / name, split, classes)
        raise _nothing(path, split)
    if folder.is_dir():
        inner = tars_in(folder)
        return read_tars(folder, inner, classes) if inner else read_folder(folder, classes, sized)
    if tars:
        return read_tars(path, tars_of(tars, split, path), classes)
    if _holds_classes(path):
        return read_folder(path, classes, sized)
    raise _nothing(path, split)


def _open_file(path: Path, split: str, classes: Sequence[str] | None) -> Source:
    if path.name in ARCHIVES.values():
        return read_archive(path, split, classes)
    if path.suffix == ".tar":
        return read_tars(path, None, classes)
    raise DataError(f"{path} is neither a folder nor a tar; give a folder, {TRAIN}, {VAL} or a WebDataset shard")


def _holds_classes(path: Path) -> bool:
    """Whether images lie in the folders of `path`: SOURCE/CLASS/IMAGE. Folders of splits are no classes."""
    folders = class_folders(path)
    return bool(folders) and not set(folders) <= SPLITS.keys() and bool(images_in(path / folders[0])[0])


def _nothing(path: Path, split: str) -> DataError:
    archive = {TRAIN: TRAIN, VAL: f"{VAL} with {DEVKIT}"}.get(ARCHIVES.get(split, ""))
    return DataError(f"no such folder: {path / split}; {path} has {some(names_in(path))} (images are expected at "
                     "SOURCE/SPLIT/CLASS/IMAGE" + (f", in SOURCE/{archive}" if archive else "") +
                     f", in SOURCE/ILSVRC/Data/CLS-LOC/{split}, in tars in SOURCE/SPLIT or SOURCE, or at "
                     "SOURCE/CLASS/IMAGE)")


if __name__ == "__main__":
    raise SystemExit("vir.data.sources.choose is a part of the library; the program is vir-convert")
