"""What may be asked of predictions, known before torch is imported: the program and the call refuse by it."""

from __future__ import annotations

from typing import get_args

from vir.config import PRECISIONS, CropMode, check, check_timeout
from vir.errors import SettingsError


def check_asked(*, topk: int, stream: bool, img_size: int | None, crop_pct: float | None, crop_mode: str | None,
                batch_size: int, workers: int | None, dtype: str | None, timeout: float) -> None:
    """The arguments of predict_images, which see. Raises SettingsError with the flag of the first that cannot be."""
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
