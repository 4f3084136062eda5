"""Name what is on images: the most probable classes of each, by a weights file.

    vir-predict vir_small.safetensors cat.jpg --topk 3
    vir-predict vir_small.safetensors photos/ https://example.org/cat.jpg --json --features photos.npz

Images are files, folders with all below them, or URLs; JPEG, PNG, WebP, GIF, BMP, TIFF or PPM. They are prepared as the
weights say, and told in their order. One that cannot be read is named, and the others go on. --stream takes each at its
own size, tens of megapixels in the memory of a strip: JPEG, PNG, TIFF and PPM are decoded strip by strip, other formats
whole, and so are JPEGs of CMYK, interlaced or animated PNGs and TIFFs that are not plain 8-bit grey or RGB. Exit codes:
0 done, 2 settings, 3 data, also where some images could not be read.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vir import cli, launcher
from vir.config import PRECISIONS
from vir.errors import DataError, VirError
from vir.evaluation.limits import add_image_flags, add_timeout, check_asked
from vir.files import replacing
from vir.log import progress_bar, shows_bars

if TYPE_CHECKING:  # --help and a wrong flag are answered before torch is imported
    from vir.evaluation.labelling import Prediction

COLUMNS = ("image", "rank", "class", "probability", "description", "error")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vir-predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="made by vir-consolidate; it names its model "
                        "itself")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER|URL", help="files of any name; of folders all files "
                        "that end as images do; http, https, s3, gs, …")
    parser.add_argument("--topk", type=int, default=5, help="classes of each image (default: 5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per image and line")
    form.add_argument("--csv", action="store_true", help=f"one row per class: {', '.join(COLUMNS)}")
    parser.add_argument("--features", type=Path, metavar="FILE.npz", help="also write what the classifier reads of "
                        "each image: `images` [N], their names, and `features` [N, D] float32")
    parser.add_argument("--force", action="store_true", help="replace that file where it exists")
    parser.add_argument("--stream", action="store_true", help="each image at its own size, neither resized nor "
                        "cropped, strip by strip in bounded memory; of a ViR alone")
    images = add_image_flags(parser)
    add_timeout(images)
    computing = parser.add_argument_group("computing")
    computing.add_argument("--device", choices=("auto", "cpu"), default="auto",
                           help="auto takes a GPU, and the CPU on a machine without one (default: auto)")
    computing.add_argument("--dtype", choices=PRECISIONS, default="fp32",
                           help="of weights and activations (default: fp32)")
    computing.add_argument("--batch-size", type=int, default=64, help="images per forward pass (default: 64)")
    computing.add_argument("--workers", type=int, help="threads that read and decode (default: as many as there are "
                           "cores, at most 16)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(sys.argv[1:] if argv is None else argv)
    if launcher.wants_cpu(args.device):
        launcher.hide_gpus()
    try:
        with cli.interruptible():
            return _predict(args)
    except VirError as error:
        return cli.tell(error, "vir-predict")
    except cli.Interrupted as end:
        print("vir-predict: interrupted", file=sys.stderr)
        cli.end_now(end.exit_code)  # threads may wait for a server
    except BrokenPipeError:  # whoever reads has seen enough
        return DataError.exit_code


def command() -> int:
    """main() as a program of its own, whose end waits for no thread that still waits for a server."""
    if code := main():
        cli.end_now(code)
    return 0


def _predict(args: argparse.Namespace) -> int:
    asked: dict[str, Any] = {name: getattr(args, name) for name in (
        "topk", "stream", "img_size", "crop_pct", "crop_mode", "batch_size", "workers", "dtype", "timeout")}
    check_asked(**asked)

    import torch

    from vir import arithmetic, distributed
    from vir.data import jpeg
    from vir.evaluation.labelling import predict_images
    from vir.evaluation.outputs import check_output
    from vir.evaluation.pictures import count_pictures

    distributed.check_driver()
    jpeg.decoder()  # as the environment asks for it
    if args.features is not None:
        check_output("--features", args.features, (".npz",), args.force, {args.weights.resolve(): "the weights"})
    total = count_pictures(args.images, args.timeout)
    arithmetic.set_up()
    distributed.share_cores()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = predict_images(args.weights, args.images, features=args.features is not None,
                           device=device or torch.device("cpu"), **asked)
    form = _json if args.json else _csv if args.csv else _text
    if args.csv:
        _write(_row(COLUMNS))
    kept: dict[str, list[Any]] = {"images": [], "features": []}
    bad = 0
    with progress_bar(total, "image", disable=total == 1, dynamic_ncols=True) as progress:
        for prediction in found:
            _tell(prediction, form)
            bad += bool(prediction.error)
            if prediction.features is not None:
                kept["images"].append(prediction.image)
                kept["features"].append(prediction.features)
            progress.update()
    if args.features is not None:
        _write_features(args.features, kept)
    if bad:
        raise DataError(f"{bad} of {total} images could not be read or have no answer; the others are done")
    return 0


def _tell(prediction: Prediction, form: Callable[[Prediction], str]) -> None:
    """On stdout in this form; what is wrong with an image also on stderr. Neither cuts through the bar."""
    if shows_bars():
        with tqdm.external_write_mode():
            _write(form(prediction))
    else:
        _write(form(prediction))
    if prediction.error:
        tqdm.write(f"vir-predict: {_one_line(prediction.image)}: {prediction.error}", file=sys.stderr)


def _write(text: str) -> None:
    """On stdout in UTF-8, the bytes of names that are none as they are.

    Raises:
        DataError: it cannot be written, as on a full disk; of a pipe that nobody reads BrokenPipeError.
    """
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest once more at its end
        if isinstance(error, BrokenPipeError):
            raise
        raise DataError(f"standard output cannot be written: {error.strerror}; free some space, or send it elsewhere"
                        ) from error


def _text(prediction: Prediction) -> str:
    if prediction.error:
        return ""
    lines = [f"{100 * guess.probability:7.2f} %  {_one_line(guess.name)} {guess.description}".rstrip()
             for guess in prediction.guesses]
    return "\n".join([_one_line(prediction.image), *lines, ""])


def _json(prediction: Prediction) -> str:
    """Names that are no UTF-8 have escapes of single surrogates, as os.fsdecode has them."""
    fields: dict[str, Any] = {"image": prediction.image}
    if prediction.error:
        fields["error"] = prediction.error
    else:
        fields["predictions"] = [
            {"class": guess.name, "logit": guess.logit, "probability": guess.probability,
             **({"description": guess.description} if guess.description else {})} for guess in prediction.guesses]
    return json.dumps(fields, allow_nan=False) + "\n"


def _csv(prediction: Prediction) -> str:
    if prediction.error:
        return _row((prediction.image, "", "", "", "", prediction.error))
    return "".join(_row((prediction.image, rank, guess.name, f"{guess.probability:.6g}", guess.description, ""))
                   for rank, guess in enumerate(prediction.guesses, 1))


def _row(cells: tuple[object, ...]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _one_line(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _write_features(path: Path, kept: dict[str, list[Any]]) -> None:
    """Args: kept: `images`, their names, and `features`, of each [D]."""
    import numpy as np

    if not kept["images"]:
        raise DataError(f"no image could be read, so --features {path} is not written")
    try:
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                np.savez(file, images=np.array(kept["images"]), features=np.stack(kept["features"]))
    except OSError as error:
        raise DataError(f"--features {path} could not be written: {error.strerror or error}; free some space or give "
                        "another file") from error


if __name__ == "__main__":
    sys.exit(command())
