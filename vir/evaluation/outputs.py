"""The files that an evaluation writes: JSON, the predictions, a table of the classes, a picture of the worst pairs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from vir.errors import SettingsError
from vir.files import replace_text, replacing, try_to_write

if TYPE_CHECKING:  # the flags are read before torch is imported
    from vir.data.reader import Reader
    from vir.evaluation.run import Evaluation


@dataclass(frozen=True)
class Output:
    """A file that can be asked for."""

    help: str
    endings: tuple[str, ...]
    """Of its name, the first is the usual one; none: any."""
    write: Callable[[Path, Sequence[Evaluation], Reader], None]
    """Raises OSError."""


def check_outputs(paths: Mapping[str, Path], force: bool, inputs: Collection[Path]) -> None:
    """At the door: an evaluation takes long.

    Args:
        paths: by flag.
        inputs: files that are read.

    Raises:
        SettingsError: one exists and `force` is not set, cannot be written, has an ending of another kind, or is also
            another one.
    """
    taken = {path.resolve(): "one of --weights" for path in inputs}
    for flag, path in paths.items():
        check_output(flag, path, OUTPUTS[flag].endings, force, taken)
        taken[path.resolve()] = flag


def check_output(flag: str, path: Path, endings: tuple[str, ...], force: bool, taken: Mapping[Path, str]) -> None:
    """The same of one file.

    Args:
        taken: other files, resolved, and what they are.
    """
    if endings and path.suffix.lower() not in endings:
        raise SettingsError(f"{flag} {path} does not end in {' or '.join(endings)}; give {flag} "
                            f"{path.with_suffix(endings[0]) if path.suffix else f'{path}{endings[0]}'}")
    if other := taken.get(path.resolve()):
        raise SettingsError(f"{flag} {path} is {other} too; give another file")
    try:
        try_to_write(path)
    except OSError as error:
        raise SettingsError(f"{flag} {path} cannot be written: {error.strerror}; give another file, in a folder "
                            "that is there") from error
    if path.exists() and not force:
        raise SettingsError(f"{flag} {path} exists; give another file, or --force to replace it")


def write_outputs(paths: Mapping[str, Path], evaluations: Sequence[Evaluation], reader: Reader) -> str:
    """Write the files; what went wrong with some of them, the others are written. Of none: an empty text.

    Args:
        paths: by flag; others than --json are of the first evaluation.
    """
    problems = []
    for flag, output in OUTPUTS.items():
        if flag in paths:
            try:
                output.write(paths[flag], evaluations, reader)
            except OSError as error:
                problems.append(f"{flag} {paths[flag]} could not be written: {error.strerror or error}")
    return "; ".join(problems)


def json_of(evaluations: Sequence[Evaluation], indent: int | None = None) -> str:
    """An object for one evaluation, a list of them for several."""
    results = [evaluation.fields for evaluation in evaluations]
    return json.dumps(results[0] if len(results) == 1 else results, indent=indent, allow_nan=False)


def _write_json(path: Path, evaluations: Sequence[Evaluation], reader: Reader) -> None:
    replace_text(path, json_of(evaluations, indent=1) + "\n")


def _write_predictions(path: Path, evaluations: Sequence[Evaluation], reader: Reader) -> None:
    import numpy as np

    evaluation = evaluations[0]
    found = evaluation.first.predictions
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            np.savez_compressed(
                file, keys=np.array([reader.key(int(sample)) for sample in evaluation.samples]),
                samples=evaluation.samples, labels=found.labels, predictions=found.top,
                probabilities=found.probabilities, losses=found.losses, classes=np.array(evaluation.shared.names))


def _write_classes(path: Path, evaluations: Sequence[Evaluation], reader: Reader) -> None:
    from vir.evaluation.summary import OfClass, per_class

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["class", *(field.name for field in fields(OfClass)[1:])])
    for row in per_class(evaluations[0].first.predictions, evaluations[0].shared.names):
        rows.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in asdict(row).values()])
    replace_text(path, text.getvalue())


def _write_picture(path: Path, evaluations: Sequence[Evaluation], reader: Reader) -> None:
    from vir.evaluation.classes import in_words
    from vir.evaluation.summary import worst_pairs
    from vir.reports.confusion import draw_confusion

    evaluation, every = evaluations[0], evaluations[0].shared.names
    found = worst_pairs(evaluation.first.predictions, len(every))
    names = [every[label] for label in found.labels]
    if words := in_words(names):
        names = [word.split(",")[0] for word in words]
    shown = "all classes" if len(names) == len(every) else (
        f"the {len(names)} classes of the worst pairs, of {len(every)}")
    title = (f"{evaluation.fields['model']}, top-1 {evaluation.fields['top1']:.2f} % of {evaluation.fields['images']} "
             f"images: {shown}")
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            draw_confusion(file, path.suffix[1:].lower(), names, found.counts, found.images, title)


OUTPUTS = {
    "--json": Output("the results, and all that is needed to repeat them", (), _write_json),
    "--save-predictions": Output("what the model says of each image, as NumPy arrays", (".npz",), _write_predictions),
    "--per-class": Output("a table of the classes", (".csv",), _write_classes),
    "--confusion": Output("a picture of the classes that are confused most", (".png", ".pdf", ".svg"), _write_picture)}
"""By flag, in the order in which they are written."""
