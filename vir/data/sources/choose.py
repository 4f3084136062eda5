"""Which kind of source lies at a path: the one place that tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vir.data.sources.folder import class_folders, images_in, names_in, read_folder, some
from vir.data.sources.listing import Source
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
    if not path.exists():
        raise DataError(f"no such folder: {path}")
    if (path / split).is_dir():
        return read_folder(path / split, _classes_of(path, split) if classes is None else classes, sized)
    if _holds_classes(path):
        return read_folder(path, classes, sized)
    raise DataError(f"no such folder: {path / split}; {path} has {some(names_in(path))} "
                    f"(images are expected at SOURCE/SPLIT/CLASS/IMAGE)")


def _classes_of(path: Path, split: str) -> list[str] | None:
    """The class folders of the training split, so that a validation split with fewer keeps its labels."""
    train = path / "train"
    if split != "train" and train.is_dir():
        return class_folders(train) or None
    return None


def _holds_classes(path: Path) -> bool:
    """Whether images lie in the folders of `path`: SOURCE/CLASS/IMAGE."""
    folders = class_folders(path)
    return bool(folders) and bool(images_in(path / folders[0])[0])
