"""The files that an evaluation writes: JSON, a table of classes, a picture of the worst pairs, the predictions."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from vir.data.reader import Reader
from vir.errors import DataError, SettingsError
from vir.evaluation.run import Evaluation
from vir.evaluation.summary import OfClass, per_class, worst_pairs
from vir.files import replace_text, replacing, try_to_write

ENDINGS = {"--per-class": (".csv",), "--confusion": (".png", ".pdf", ".svg"), "--save-predictions": (".npz",)}


def check_outputs(paths: dict[str, Path], force: bool) -> None:
    """At the door: an evaluation takes long.

    Args:
        paths: by flag.

    Raises:
        SettingsError: one exists and `force` is not set, cannot be written, or has an ending of another kind.
    """
    for flag, path in paths.items():
        endings = ENDINGS.get(flag, ())
        if endings and path.suffix.lower() not in endings:
            raise SettingsError(f"{flag} {path} does not end in {' or '.join(endings)}; give {flag} "
                                f"{path.with_suffix(endings[0]) if path.suffix else f'{path}{endings[0]}'}")
        try:
            try_to_write(path)
        except OSError as error:
            raise SettingsError(f"{flag} {path} cannot be written: {error.strerror}; give a file in a folder that is "
                                "there") from error
        if path.exists() and not force:
            raise SettingsError(f"{flag} {path} exists; give another file, or --force to replace it")


def write_outputs(paths: dict[str, Path], evaluations: Sequence[Evaluation], reader: Reader) -> None:
    """Write each file that was asked for; of several evaluations --json has a list, the others are of the first.

    Raises:
        DataError: one could not be written; the others are.
    """
    problems = []
    for flag, path in paths.items():
        try:
            _WRITERS[flag](path, evaluations, reader)
        except OSError as error:
            problems.append(f"{flag} {path} could not be written: {error.strerror or error}")
    if problems:
        raise DataError(f"{'; '.join(problems)}; the last line on stdout is the result")


def json_of(evaluations: Sequence[Evaluation]) -> Any:
    """An object for one evaluation, a list of them for several."""
    found = [evaluation.fields for evaluation in evaluations]
    return found[0] if len(found) == 1 else found


def _write_json(path: Path, evaluations: Sequence[Evaluation], reader: Reader) -> None:
    replace_text(path, json.dumps(json_of(evaluations), indent=1) + "\n")


def _write_classes(path: Path, evaluations: Sequence[Evaluation], reader: Reader) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["class", *(field.name for field in fields(OfClass)[1:])])
    for row in per_class(evaluations[0].first.predictions, evaluations[0].shared.names):
        rows.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in asdict(row).values()])
    replace_text(path, text.getvalue())


def _write_picture(path: Path, evaluations: Sequence[Evaluation], reader: Reader) -> None:
    from vir.reports.confusion import draw_confusion

    first = evaluations[0]
    found = worst_pairs(first.first.predictions, len(first.shared.names))
    names = _readable([first.shared.names[label] for label in found.labels])
    shown = "all classes" if len(names) == len(first.shared.names) else (
        f"the {len(names)} classes of the worst pairs, of {len(first.shared.names)}")
    title = f"{first.fields['model']}, top-1 {first.fields['top1']:.2f} % of {first.fields['images']} images: {shown}"
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            draw_confusion(file, path.suffix[1:].lower(), names, found.counts, found.images, title)


def _readable(names: Sequence[str]) -> list[str]:
    """ImageNet's wnids in words."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return list(names)
    from timm.data import ImageNetInfo

    words = ImageNetInfo().label_name_to_description
    try:
        return [words(name).split(",")[0] for name in names]
    except KeyError:  # of another hierarchy
        return list(names)


def _write_predictions(path: Path, evaluations: Sequence[Evaluation], reader: Reader) -> None:
    first = evaluations[0]
    found = first.first.predictions
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            np.savez_compressed(
                file, keys=np.array([reader.key(int(sample)) for sample in first.samples]), samples=first.samples,
                labels=found.labels, predictions=found.top, probabilities=found.probabilities, losses=found.losses,
                classes=np.array(first.shared.names))


_WRITERS = {"--json": _write_json, "--per-class": _write_classes, "--confusion": _write_picture,
            "--save-predictions": _write_predictions}
