"""ImageNet as Kaggle has it -> a Source.

    ILSVRC/Data/CLS-LOC/train/CLASS/IMAGE
    ILSVRC/Data/CLS-LOC/val/IMAGE
    LOC_val_solution.csv                   the labels of these; beside ILSVRC or in it
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vir.data.sources.folder import class_folders, images_in, read_folder, some
from vir.data.sources.imagenet import check_classes
from vir.data.sources.listing import Image, Listing, Source
from vir.errors import DataError
from vir.files import read_regular

SOLUTION = "LOC_val_solution.csv"
_KIND = "Kaggle's ImageNet"
_IMAGES = Path("Data", "CLS-LOC")
_MAX_SOLUTION_BYTES = 1 << 28


def kaggle_images(path: Path) -> Path | None:
    """The folder of the splits, where `path` is the folder that holds ILSVRC, that folder itself, or CLS-LOC in it."""
    for folder in (path / "ILSVRC" / _IMAGES, path / _IMAGES):
        if folder.is_dir():
            return folder
    return path if path.absolute().parts[-2:] == _IMAGES.parts else None


def read_kaggle(images: Path, split: str, classes: Sequence[str] | None = None, sized: bool = False) -> Source:
    """Lists `images/split`: class folders as they are, a folder of images by LOC_val_solution.csv.

    Args:
        images: what kaggle_images returned.
        classes: the class list in label order; ImageNet's if None. The source must have exactly these.
        sized: as for vir.data.sources.folder.read_folder.

    Raises:
        DataError: no such split or one without labels, no csv, a damaged one, or images and lines that do not belong
            together.
    """
    folder = images / split
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}; the splits with labels are train and val: choose another --split")
    if folders := class_folders(folder):
        found = read_folder(folder, check_classes(folders, classes, str(folder)), sized)
        return replace(found, kind=_KIND)
    if split not in ("val", "validation"):
        raise DataError(f"{folder} has no class folders, and {SOLUTION} tells the labels of val alone: the images of "
                        f"split {split!r} have no labels; choose another --split")
    return _read_flat(folder, _solution(images), classes, sized)


def _read_flat(folder: Path, solution: Path, classes: Sequence[str] | None, sized: bool) -> Source:
    wnid_of = _read_solution(solution)
    images, ignored = images_in(folder, sized)
    found = {image.name.rpartition(".")[0] for image in images}
    if unlabelled := sorted(found - wnid_of.keys()):
        raise DataError(f"{solution} has no line for images of {folder}: {some(unlabelled)}; download the csv again, "
                        "or move the images away")
    if absent := sorted(wnid_of.keys() - found):
        raise DataError(f"{folder} lacks images that {solution} has a line for: {some(absent)}; copy or unpack the "
                        "images again")
    classes = check_classes(wnid_of.values(), classes, str(solution))
    of_class: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        of_class[wnid_of[image.name.rpartition(".")[0]]].append(image)
    listing = Listing({name: label for label, name in enumerate(classes)}, sized=sized, flat=True)
    for wnid, part in sorted(of_class.items()):
        listing.add(wnid, part)
    return listing.source(_KIND, folder, classes, ignored)


def _solution(images: Path) -> Path:
    """Beside ILSVRC or in it."""
    inner = images.absolute().parent.parent
    for path in (inner.parent / SOLUTION, inner / SOLUTION):
        if path.exists():
            return path
    raise DataError(f"no such file: {inner.parent / SOLUTION}, which has the labels of {images / 'val'}; download it "
                    "to that place")


def _read_solution(path: Path) -> dict[str, str]:
    """From the name of an image, without ending, to its wnid."""
    wnid_of: dict[str, str] = {}
    try:
        lines = csv.reader(io.StringIO(read_regular(path, _MAX_SOLUTION_BYTES).decode("utf-8-sig"), newline=""),
                           strict=True)
        if (header := next(lines, [])) != ["ImageId", "PredictionString"]:
            raise DataError(f"{path} begins with {','.join(header)[:100]!r} instead of 'ImageId,PredictionString'; "
                            "download it again")
        for fields in lines:
            words = fields[1].split() if len(fields) == 2 else []
            if not words or not fields[0]:
                raise DataError(f"{path}: line {lines.line_num} is {','.join(fields)[:100]!r}, expected 'IMAGE,CLASS "
                                "and boxes'; download it again")
            if fields[0] in wnid_of:
                raise DataError(f"{path}: line {lines.line_num} names {fields[0]!r} again; download it again")
            wnid_of[fields[0]] = words[0]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from error
    return wnid_of


if __name__ == "__main__":
    raise SystemExit("vir.data.sources.kaggle is a part of the library; the program is vir-convert")
