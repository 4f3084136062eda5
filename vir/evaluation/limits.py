"""What may be asked of predictions and evaluations, known before torch is imported."""

from __future__ import annotations

import argparse
from typing import get_args

from vir.config import PRECISIONS, CropMode, DataConfig, check, check_timeout
from vir.errors import SettingsError


def add_image_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags of how images are prepared, in a group of their own."""
    images = parser.add_argument_group("images", "as the file says where not given")
    images.add_argument("--img-size", type=int, metavar="PIXELS", help="side of the images; positions are resampled")
    images.add_argument("--crop-pct", type=float, metavar="SHARE",
                        help="side of the crop as a share of the resized image, in (0, 1]")
    images.add_argument("--crop-mode", choices=get_args(CropMode), help="how images become square, by timm's names")
    return images


def add_timeout(group: argparse._ArgumentGroup) -> None:
    """Of servers."""
    group.add_argument("--timeout", type=float, default=DataConfig.timeout, metavar="SECONDS",
                       help=f"without an answer of a server, after which to give up (default: {DataConfig.timeout:g})")


def check_asked(*, topk: int, stream: bool, img_size: int | None, crop_pct: float | None, crop_mode: str | None,
                batch_size: int, workers: int | None, dtype: str | None, timeout: float) -> None:
    """The arguments of predict_images, which see: the call and the program refuse by it.

    Raises:
        SettingsError: with the flag of the first that cannot be.
    """
    for flag, count in (("topk", topk), ("batch-size", batch_size), ("workers", workers), ("img-size", img_size)):
        check(count is None or count >= 1, flag, count, "at least 1")
    check(crop_pct is None or 0 < crop_pct <= 1, "crop-pct", crop_pct, "in (0, 1]")
    for flag, word, words in (("crop-mode", crop_mode, get_args(CropMode)), ("dtype", dtype, PRECISIONS)):
        check(word is None or word in words, flag, word, f"one of {', '.join(words)}")
    check_timeout("timeout", timeout)
    for flag, value in (("img-size", img_size), ("crop-pct", crop_pct), ("crop-mode", crop_mode)):
        if stream and value is not None:
            raise SettingsError(f"--stream takes images at their own size; leave out --{flag}")


if __name__ == "__main__":
    raise SystemExit("vir.evaluation.limits is a part of the library; the program is vir-predict")
