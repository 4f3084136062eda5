"""What a checkpoint says of itself, and whether it is whole.

RUN/checkpoints/step-00001000/ holds DeepSpeed's files and checkpoint.json, which lists them with their checksums.
RUN/checkpoints/latest names the newest one, best the one with the best validation accuracy.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vir import files
from vir.config import PRECISIONS
from vir.errors import CheckpointError
from vir.launcher import cores
from vir.log import progress_bar, shows_bars
from vir.run_folder import CHECKPOINTS
from vir.weights.fields import Rules, check_fields, is_count, is_text, is_text_map
from vir.weights.metadata import MODEL_RULES
from vir.weights.spec import INPUT_RULES, InputSpec, ModelSpec

Files = dict[str, dict[str, Any]]
"""bytes and sha256 of each file, by name."""

DESCRIPTION = "checkpoint.json"
FORMAT = 2


def _are_numbers(value: Any) -> bool:
    """NaN and Infinity among them: the loss of a validation may be one, and so may settings."""
    return is_text_map(value) and all(type(number) in (int, float) for number in value.values())


def _are_files(value: Any) -> bool:
    return is_text_map(value) and all(Path(name).name == name != ".." and "\0" not in name for name in value)


_COUNT = (lambda value: is_count(value) and value < 2**63, "a whole number, 0 or more and below 2^63")
_RULES: Rules = {
    "samples_seen": _COUNT, "step": _COUNT, "updates": _COUNT,
    "world_size": (lambda value: is_count(value) and 0 < value < 2**63, "a whole number, 1 or more and below 2^63"),
    "zero_stage": (lambda value: is_count(value) and value <= 3, "0, 1, 2 or 3"),
    "precision": (lambda value: value in tuple(PRECISIONS), f"one of {', '.join(PRECISIONS)}"),
    "ema": (lambda value: isinstance(value, bool), "true or false"),
    "loss_scaler": (_are_numbers, "an object of numbers by their names"),
    "metrics": (_are_numbers, "an object of numbers by their names"),
    "config": (MODEL_RULES["model_args"][0], "an object of settings by their names, nested 16 deep at most"),
    **MODEL_RULES,
    "model_input": (is_text_map, "an object of fields"),
    "data_fingerprint": (is_text, "a text"),
    "teacher": (is_text, "a text"),
    "files": (_are_files, "an object of files by their names, which name no other folder")}
_FILE_RULES: Rules = {"bytes": _COUNT, "sha256": (is_text, "a text")}


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself in checkpoint.json."""

    samples_seen: int
    """Positions of the training sequence consumed: the one number that says where training stands."""
    step: int
    """Global batches consumed."""
    updates: int
    """Steps whose update was applied."""
    world_size: int
    zero_stage: int
    precision: str
    ema: bool
    loss_scaler: dict[str, float]
    """State of the fp16 loss scale, by DeepSpeed's names; empty in other precisions."""
    metrics: dict[str, float]
    """Of the evaluation at this step, e.g. top1; empty where there was none."""
    config: dict[str, Any]
    """The settings of the run."""
    model: ModelSpec
    data_fingerprint: str
    """Of the training shards and their class list."""
    teacher: str = ""
    """Fingerprint of the model that taught this one; empty where none did."""
    files: Files = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file["bytes"] for file in self.files.values())

    def with_files(self, of_ranks: Iterable[Files]) -> CheckpointInfo:
        """The same of these files, which the ranks have written."""
        return replace(self, files={name: file for files in of_ranks for name, file in files.items()})

    def to_json(self) -> str:
        """The text of checkpoint.json."""
        last = ("model", "data_fingerprint", "teacher", "files")
        fields = {name: value for name, value in vars(self).items() if name not in last}
        return json.dumps({
            "format": FORMAT, **fields, "model_name": self.model.name, "model_args": self.model.args,
            "model_input": asdict(self.model.input), "classes": self.model.classes,
            "data_fingerprint": self.data_fingerprint, "teacher": self.teacher,
            "files": dict(sorted(self.files.items()))}, indent=1)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> CheckpointInfo:
        """From the object that to_json writes, without its format. Raises ValueError, a sentence on the field."""
        check_fields(fields, _RULES, optional={"teacher"})  # checkpoints of old had none
        image = fields.pop("model_input")
        _check_within("model_input", image, INPUT_RULES, optional={"crop_mode"})
        for name, entry in fields["files"].items():
            _check_within(f"files, {name}", entry, _FILE_RULES)
        model = ModelSpec(name=fields.pop("model_name"), args=fields.pop("model_args"),
                          input=InputSpec.from_json(**image), classes=tuple(fields.pop("classes")))
        return cls(model=model, **fields)


def _check_within(name: str, fields: Any, rules: Rules, optional: Collection[str] = ()) -> None:
    """As check_fields, of an object within another, which the message names."""
    try:
        check_fields(fields, rules, optional)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_description(folder: Path) -> CheckpointInfo:
    """What a checkpoint says of itself, whatever has become of its files. Raises CheckpointError as read_info."""
    try:
        # Not strict_json, which refuses NaN and Infinity.
        fields = json.loads((folder / DESCRIPTION).read_text())
        if isinstance(fields, dict):
            if "format" not in fields:
                raise ValueError("it lacks fields: format")
            version = fields.pop("format")
            if version != FORMAT:
                raise CheckpointError(f"{folder}: format {reprlib.repr(version)} is not known here ({FORMAT}); use the "
                                      "version that wrote it")
        return CheckpointInfo.from_json(fields)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {DESCRIPTION}: it is not a complete checkpoint; name a run folder or "
                              f"one of its {CHECKPOINTS}/step-… folders") from None
    except RecursionError:
        raise CheckpointError(f"{folder / DESCRIPTION} cannot be read: it is nested too deeply") from None
    except OSError as error:
        raise CheckpointError(f"{folder / DESCRIPTION} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / DESCRIPTION} cannot be read: {error}") from error


def read_info(folder: Path) -> CheckpointInfo:
    """The description of a checkpoint, after checking that every file it lists is there at its full size.

    Raises:
        CheckpointError: no checkpoint, an incomplete one, or one of another format.
    """
    info = read_description(folder)
    sizes = {name: entry["bytes"] for name, entry in info.files.items()}
    for name, size in sizes.items():
        path = folder / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is incomplete: {name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if found != size:
            raise CheckpointError(f"{path} has {found} bytes, {size} were written; take another checkpoint")
    return info


def verify(folder: Path, info: CheckpointInfo, share: int = 0, of: int = 1) -> None:
    """Compare the checksums of every `of`-th file from number `share` on with those that were written.

    Raises:
        CheckpointError: a file that has changed since, or cannot be read.
    """
    names = sorted(info.files)[share::of]
    size = sum(info.files[name]["bytes"] for name in names)
    with progress_bar(size, "B", unit_scale=True, desc=f"checking {folder.name}", leave=False,
                      disable=share > 0 or not shows_bars()) as bar:
        threads = ThreadPoolExecutor(cores())  # hashing lets other threads run
        try:
            for name, found in zip(names, threads.map(lambda name: sha256(folder / name), names)):
                if found != info.files[name]["sha256"]:
                    raise CheckpointError(f"{folder / name} has changed since it was written (sha256 differs); take "
                                          "another checkpoint")
                bar.update(info.files[name]["bytes"])
        finally:
            threads.shutdown(cancel_futures=True)  # after an error no other file is begun


def sha256(path: Path) -> str:
    """The checksum of a checkpoint's file. Raises CheckpointError where it cannot be read."""
    try:
        return files.sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
