"""One weights file on one split: what is loaded, how it is computed, and all that is known of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vir import distributed, files
from vir.config import RetentionMode
from vir.data.loader import eval_batches
from vir.data.reader import Reader
from vir.distributed import World
from vir.errors import SettingsError
from vir.evaluation.classes import Shared, shared_classes
from vir.evaluation.predictions import Forward, Measured, of_shared, predict, with_mirror_images
from vir.evaluation.real_labels import real_accuracy
from vir.evaluation.summary import summary
from vir.log import log
from vir.models import load
from vir.weights.metadata import DTYPES, WeightsMetadata
from vir.weights.portable import files_of, read_metadata
from vir.weights.spec import InputSpec, ModelSpec, input_of

MODES = get_args(RetentionMode)
FORMS = MODES[1:]


@dataclass(frozen=True, kw_only=True)
class How:
    """The way of computing."""

    mode: str
    """Form of retention."""
    compare_modes: bool
    """Compute in the two other forms as well."""
    dtype: str
    """fp32, bf16 or fp16, of weights and activations."""
    hflip_tta: bool
    """Take the mean of the probabilities of each image and its mirror image."""
    img_size: int | None
    """Side of the images; that of the file where not given. So are the next two."""
    crop_pct: float | None
    crop_mode: str | None
    batch_size: int
    """Images per forward pass and process."""
    workers: int | None


@dataclass(frozen=True)
class Evaluation:
    """What came out, in each form of retention that was asked for, the first before the others."""

    fields: dict[str, Any]
    """All that is known of it, for JSON."""
    shared: Shared
    measured: dict[str, Measured]
    samples: np.ndarray
    """[N] indices of the images in the split."""

    @property
    def first(self) -> Measured:
        return next(iter(self.measured.values()))


def evaluate(weights: Path, reader: Reader, how: How, world: World, bar: Callable[[int, str], tqdm[Any]]) -> Evaluation:
    """Evaluate one weights file. Collective.

    Args:
        bar: from the number of images and a title to a progress bar.

    Raises:
        DataError: the file is not a whole weights file; an image is damaged.
        SettingsError: it does not fit `how`, or shares no classes with the data.
    """
    model, metadata = distributed.at_the_door(lambda: _loaded(weights, how, world))
    model_input = _input(model, how)
    shared = _shared(weights, metadata.model, int(getattr(model, "num_classes")), reader)
    if shared.said and world.is_main:
        log.warning("%s: %s", weights, shared.said)
    chosen = shared.samples(reader.labels)
    samples = np.arange(len(reader)) if chosen is None else chosen
    batches = eval_batches(reader, model_input, batch_size=how.batch_size, rank=world.rank, world_size=world.size,
                           workers=how.workers, device=world.device, chosen=chosen)
    with bar(len(samples), weights.name) as progress:
        measured = predict(_forwards(model, how, shared), batches, model_input, shared, world.device, progress,
                           dtype=DTYPES[how.dtype])
    fields = _of_weights(weights, metadata) | _of_images(reader, model_input, samples, shared) | {
        "mode": next(iter(measured)) or None, "dtype": how.dtype, "hflip_tta": how.hflip_tta,
        "batch_size": how.batch_size, "processes": world.size, "device": _title(world.device),
        **_numbers(next(iter(measured.values())))}
    found = Evaluation(fields, shared, measured, samples)
    if not_finite := int(np.count_nonzero(~np.isfinite(found.first.predictions.losses))):
        fields["images_not_finite"] = not_finite
        log.warning("%s: %d images have logits that are not finite, and count as they come; fp16 holds no more than "
                    "65504: try --dtype bf16", weights, not_finite)
    if world.is_main:  # the others would only compute the same
        fields["weights_sha256"] = {path.name: files.sha256(path) for path in files_of(weights)}
        keys = (reader.key(int(sample)) for sample in samples)
        fields |= real_accuracy(found.first.predictions, keys, shared.names) or {}
    if len(measured) > 1:
        fields["modes"] = {mode: _numbers(of_mode) | {"largest_logit_difference": of_mode.difference}
                           for mode, of_mode in measured.items()}
    return found


def check_weights(weights: Sequence[Path], reader: Reader) -> None:
    """At the door, what the files say: the last of several may come hours after the first.

    Raises:
        DataError: one is no weights file.
        SettingsError: one shares no classes with the data.
    """
    for path in weights:
        if path.is_dir():
            raise SettingsError(f"--weights {path} is a folder; make a weights file of a run first: vir-consolidate "
                                f"{path} --output {path.name or 'vir'}.safetensors")
        spec = read_metadata(path).model
        _shared(path, spec, spec.args.get("num_classes", len(spec.classes) or len(reader.classes)), reader)


def _shared(weights: Path, spec: ModelSpec, num_logits: int, reader: Reader) -> Shared:
    try:
        shared = shared_classes(spec.classes, num_logits, reader.classes)
    except SettingsError as error:
        raise SettingsError(f"--weights {weights} and --data {reader.name} do not fit: {error}") from error
    if not (shared.labels[reader.labels] >= 0).any():
        raise SettingsError(f"--data {reader.name} has no image of the {len(shared.names)} classes that it shares with "
                            f"--weights {weights}; give other data")
    return shared


def _loaded(weights: Path, how: How, world: World) -> tuple[nn.Module, WeightsMetadata]:
    sizes = {} if how.img_size is None else {"img_size": how.img_size}
    model = load(weights, world.device, DTYPES[how.dtype], **sizes)
    metadata: WeightsMetadata = getattr(model, "weights_metadata")
    if not hasattr(model, "set_retention_mode") and (how.mode != "auto" or how.compare_modes):
        raise SettingsError(f"{weights} holds a {metadata.model.name}, which has no retention; leave out --mode and "
                            "--compare-modes")
    return model, metadata


def _input(model: nn.Module, how: How) -> InputSpec:
    given: dict[str, Any] = {"crop_pct": how.crop_pct, "crop_mode": how.crop_mode}
    return replace(input_of(model), **{name: value for name, value in given.items() if value is not None})


def _forwards(model: nn.Module, how: How, shared: Shared) -> dict[str, Forward]:
    """By form of retention."""
    if not hasattr(model, "set_retention_mode"):
        return {"": _logits(model, how, shared)}
    first = "parallel" if how.compare_modes and how.mode == "auto" else how.mode
    others = [form for form in FORMS if form != first] if how.compare_modes else []
    return {mode: _in_form(model, mode, _logits(model, how, shared)) for mode in (first, *others)}


def _logits(model: nn.Module, how: How, shared: Shared) -> Forward:
    forward = of_shared(model, shared)
    return with_mirror_images(forward) if how.hflip_tta else forward


def _in_form(model: nn.Module, mode: str, forward: Forward) -> Forward:
    def compute(images: Tensor) -> Tensor:
        getattr(model, "set_retention_mode")(mode)
        return forward(images)

    return compute


def _of_weights(weights: Path, metadata: WeightsMetadata) -> dict[str, Any]:
    return {
        "weights": str(weights), "model": metadata.model.name, "model_args": metadata.model.args, "step": metadata.step,
        "samples_seen": metadata.samples_seen, "ema": metadata.ema, "weights_dtype": metadata.dtype,
        "config_hash": metadata.config_hash, "training_data_fingerprint": metadata.data_fingerprint,
        "classes_of_model": len(metadata.model.classes)}


def _of_images(reader: Reader, model_input: InputSpec, samples: np.ndarray, shared: Shared) -> dict[str, Any]:
    return {
        "data": reader.name, "data_fingerprint": reader.fingerprint, "classes_of_data": len(reader.classes),
        "classes": len(shared.names), "images": len(samples), "images_left_out": len(reader) - len(samples),
        **model_input.timm_cfg()}


def _numbers(measured: Measured) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    numbers = asdict(summary(measured.predictions))
    images = numbers.pop("images")
    return {name: value if np.isfinite(value) else None for name, value in numbers.items()} | {
        "images_per_second": images / measured.seconds}


def _title(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
