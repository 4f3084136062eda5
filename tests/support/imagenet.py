"""A small ImageNet-1k as its three publishers hand it out: class folders, the official archives, Kaggle's layout.

All 1,000 classes, one or two images of each in train and in val, and the devkit as MATLAB's own writer lays it out.
"""

from __future__ import annotations

import csv
import io
import random
import shutil
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from vir.data.sources.imagenet import imagenet_classes
from vir.data.sources.listing import WHOLE, Source

DEVKIT_DATA = "ILSVRC2012_devkit_t12/data"


def jpeg(comment: str) -> bytes:
    """A whole image of 8 x 8 pixels, another for each comment."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 90, 20)).save(file, "JPEG")
    text = comment.encode()
    return file.getvalue()[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + file.getvalue()[2:]


@dataclass
class ImageNet:
    """Images by split, wnid and file name; the wnid of each ILSVRC2012_ID."""

    images: dict[str, dict[str, dict[str, bytes]]]
    wnids: tuple[str, ...]
    """By ILSVRC2012_ID - 1: in another order than labels have."""


def tiny_imagenet() -> ImageNet:
    draw = random.Random(5)
    wnids = list(imagenet_classes())
    train = {wnid: {f"{wnid}_{number}.JPEG": b"" for number in draw.sample(range(20000), 1 + i % 2)}
             for i, wnid in enumerate(wnids)}
    order = wnids + draw.choices(wnids, k=200)
    draw.shuffle(order)
    val: dict[str, dict[str, bytes]] = {wnid: {} for wnid in wnids}
    for number, wnid in enumerate(order, 1):
        val[wnid][f"ILSVRC2012_val_{number:08d}.JPEG"] = b""
    draw.shuffle(wnids)
    images = {split: {wnid: {name: jpeg(name) for name in names} for wnid, names in folders.items()}
              for split, folders in (("train", train), ("val", val))}
    return ImageNet(images, tuple(wnids))


def write_folders(root: Path, images: dict[str, dict[str, bytes]]) -> None:
    for wnid, files in images.items():
        (root / wnid).mkdir(parents=True)
        for name, data in files.items():
            (root / wnid / name).write_bytes(data)


def write_archives(root: Path, imagenet: ImageNet) -> None:
    root.mkdir()
    inner = {f"{wnid}.tar": tar(files) for wnid, files in imagenet.images["train"].items()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    val = flat(imagenet)
    names = random.Random(1).sample(sorted(val), len(val))  # the order in the tar is no order of the labels
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar({name: val[name][1] for name in names}))
    write_devkit(root, meta_mat(imagenet.wnids), ground_truth(imagenet))


def write_kaggle(root: Path, imagenet: ImageNet) -> None:
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_folders(images / "train", imagenet.images["train"])
    for split in ("val", "test"):
        (images / split).mkdir()
    for name, (_, data) in flat(imagenet).items():
        (images / "val" / name).write_bytes(data)
    shutil.copy(images / "val" / "ILSVRC2012_val_00000001.JPEG", images / "test" / "ILSVRC2012_test_00000001.JPEG")
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["ImageId", "PredictionString"])
        for name, (wnid, _) in random.Random(2).sample(sorted(flat(imagenet).items()), len(flat(imagenet))):
            lines.writerow([name.removesuffix(".JPEG"), f"{wnid} 85 1 499 272 {wnid} 1 2 3 4 "])


def flat(imagenet: ImageNet) -> dict[str, tuple[str, bytes]]:
    """The images of val by name, each with its wnid."""
    return {name: (wnid, data) for wnid, files in imagenet.images["val"].items() for name, data in files.items()}


def ground_truth(imagenet: ImageNet) -> bytes:
    number_of = {wnid: number for number, wnid in enumerate(imagenet.wnids, 1)}
    return b"".join(b"%d\n" % number_of[wnid] for _, (wnid, _) in sorted(flat(imagenet).items()))


@cache
def meta_mat(wnids: tuple[str, ...], compressed: bool = True) -> bytes:
    """Leaves first, by their IDs, then inner nodes of WordNet with IDs from 1001."""
    rows = [(np.array([[i]], np.uint16), wnid, f"thing {i}, Ding ä", "a gloss " * 5, np.array([[0]], np.uint8),
             np.zeros((1, 0), np.uint16), np.array([[0]], np.uint8), np.array([[1300]], np.uint16))
            for i, wnid in enumerate(wnids, 1)]
    rows += [(np.array([[i]], np.uint16), f"n{i:08d}", "inner", "node", np.array([[2]], np.uint8),
              np.array([[1, i - 1000]], np.uint16), np.array([[i % 19 + 1]], np.uint8), np.array([[0]], np.uint16))
             for i in range(1001, 1861)]
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images")
    synsets = np.empty((len(rows), 1), [(field, object) for field in fields])
    for i, row in enumerate(rows):
        synsets[i, 0] = row
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": synsets}, do_compression=compressed)
    return file.getvalue()


def write_devkit(root: Path, meta: bytes | None, truth: bytes | None) -> None:
    members = {"ILSVRC2012_devkit_t12/readme.txt": b"see data", f"{DEVKIT_DATA}/meta.mat": meta,
               f"{DEVKIT_DATA}/ILSVRC2012_validation_ground_truth.txt": truth}
    path = root / "ILSVRC2012_devkit_t12.tar.gz"
    path.unlink(missing_ok=True)  # it may be a link
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo(DEVKIT_DATA)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members.items():
            if data is not None:
                _add(archive, name, data)


def tar(members: dict[str, bytes]) -> bytes:
    """As GNU tar writes them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items():
            _add(archive, name, data)
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.uname, header.gname = len(data), 1340000000, "imagenet", "imagenet"
    archive.addfile(header, io.BytesIO(data))


def contents(source: Source) -> list[tuple[str, int, str, bytes]]:
    """Key, label, file name and bytes of every sample, in order: what a shard depends on."""
    result = []
    for sample in source.samples:
        with open(source.root / sample.path, "rb") as file:
            file.seek(sample.offset)
            data = file.read() if sample.size == WHOLE else file.read(sample.size)
        result.append((sample.key, sample.label, sample.filename, data))
    return result
