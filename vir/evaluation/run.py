"""One weights file on one split: what is loaded, how it is computed, and all that is known of the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vir import distributed, files
from vir.data.loader import eval_batches
from vir.data.reader import Reader
from vir.distributed import World
from vir.errors import DataError, SettingsError
from vir.evaluation.classes import Shared, shared_classes
from vir.evaluation.predictions import Forward, Measured, of_shared, predict, with_mirror_images
from vir.evaluation.real_labels import real_accuracy
from vir.evaluation.summary import summary
from vir.log import log
from vir.models import RETENTION_MODES, load
from vir.models.kernels import is_out_of_memory
from vir.models.network import described
from vir.weights.hub import refuse_folder
from vir.weights.metadata import DTYPES, WeightsMetadata
from vir.weights.portable import files_of, outline
from vir.weights.spec import InputSpec, ModelSpec, input_of


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

    def without_records(self) -> Evaluation:
        """The same without what is known of single images."""
        return replace(self, measured={}, samples=self.samples[:0])


def evaluate(weights: Path, reader: Reader, how: How, world: World, bar: Callable[[int, str], tqdm[Any]]) -> Evaluation:
    """Evaluate one weights file. Collective.

    Args:
        bar: from the number of images and a title to a progress bar.

    Raises:
        DataError: the file is not a whole weights file; an image is damaged.
        SettingsError: it does not fit `how`, shares no classes with the data, or needs more memory than there is.
    """
    loaded = distributed.at_the_door(lambda: _loaded(weights, reader, how, world))
    shared, model_input = loaded.shared, loaded.input
    if shared.said and world.is_main:
        log.warning("%s: %s", weights, shared.said)
    chosen = shared.samples(reader.labels)
    samples = np.arange(len(reader)) if chosen is None else chosen
    batches = eval_batches(reader, model_input, batch_size=how.batch_size, rank=world.rank, world_size=world.size,
                           workers=how.workers, device=world.device, chosen=chosen)
    began = time.monotonic()
    try:
        with bar(len(samples), str(weights)) as progress:
            measured = predict(_forwards(loaded.model, how, shared, world.device), batches, model_input, shared,
                               world.device, progress, dtype=DTYPES[how.dtype])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise SettingsError(f"{weights}: --batch-size {how.batch_size} needs more memory than rank {world.rank} has "
                            f"({str(error).splitlines()[0]}); give a smaller one, or --dtype bf16") from error
    seconds = max(distributed.gather(time.monotonic() - began))
    results = {mode: _numbers(of_mode) for mode, of_mode in measured.items()}
    fields = _of_weights(weights, loaded) | _of_images(reader, model_input, samples, shared) | {
        "mode": next(iter(measured)) or None, "dtype": how.dtype, "hflip_tta": how.hflip_tta,
        "batch_size": how.batch_size, "processes": world.size, "device": _title(world.device),
        **next(iter(results.values())), "images_per_second": len(samples) / seconds}
    found = Evaluation(fields, shared, measured, samples)
    if world.is_main:  # the others would only compute the same
        keys = (reader.key(int(sample)) for sample in samples)
        fields |= real_accuracy(found.first.predictions, keys, shared.names) or {}
        if worst := max(of_mode["not_finite"] for of_mode in results.values()):
            log.warning("%s: %d images have logits that are not finite, and count as they come; fp16 holds no more "
                        "than 65504: try --dtype bf16", weights, worst)
    if len(measured) > 1:
        fields["modes"] = {mode: results[mode] | {
            "forward_images_per_second": len(samples) / of_mode.seconds,
            "largest_logit_difference": _for_json(of_mode.difference)} for mode, of_mode in measured.items()}
    return found


def check_weights(weights: Sequence[Path], reader: Reader, how: How) -> None:
    """At the door, by what the files say, without their numbers: the last of several may come hours after the first.

    Raises:
        DataError: one is no whole weights file.
        SettingsError: one shares no classes with the data, or has no retention to choose a form of.
    """
    for path in weights:
        refuse_folder("--weights", path)
        metadata, outlines = outline(path)
        network = described(path, metadata.model, outlines)
        _check_retention(path, metadata.model, network, how)
        _shared(path, metadata.model, int(getattr(network, "num_classes")), reader)


def _check_retention(weights: Path, spec: ModelSpec, network: nn.Module, how: How) -> None:
    if not hasattr(network, "set_retention_mode") and (how.mode != "auto" or how.compare_modes):
        raise SettingsError(f"{weights} holds a {spec.name}, which has no retention; leave out --mode and "
                            "--compare-modes")


def _shared(weights: Path, spec: ModelSpec, num_logits: int, reader: Reader) -> Shared:
    try:
        shared = shared_classes(spec.classes, num_logits, reader.classes)
    except SettingsError as error:
        raise SettingsError(f"--weights {weights} and --data {reader.name} do not fit: {error}") from error
    if not (shared.labels[reader.labels] >= 0).any():
        raise SettingsError(f"--data {reader.name} has no image of the {len(shared.names)} classes that it shares with "
                            f"--weights {weights}; give other data")
    return shared


@dataclass(frozen=True)
class _Loaded:
    model: nn.Module
    metadata: WeightsMetadata
    input: InputSpec
    shared: Shared
    sha256: dict[str, str]
    """Of each file of the weights."""


def _loaded(weights: Path, reader: Reader, how: How, world: World) -> _Loaded:
    sizes = {} if how.img_size is None else {"img_size": how.img_size}
    try:
        # Rank 0 alone tells it.
        checksums = {path.name: files.sha256(path) for path in files_of(weights)} if world.is_main else {}
    except OSError as error:
        raise DataError(f"{weights} cannot be read: {error}; copy it again") from error
    model = load(weights, world.device, DTYPES[how.dtype], **sizes)
    metadata: WeightsMetadata = getattr(model, "weights_metadata")
    model_input = input_of(model).with_crop(how.crop_pct, how.crop_mode)
    if how.img_size is not None:
        check_size(weights, model, model_input, how.img_size, DTYPES[how.dtype], world.device)
    shared = _shared(weights, metadata.model, int(getattr(model, "num_classes")), reader)
    return _Loaded(model, metadata, model_input, shared, checksums)


@torch.inference_mode()
def check_size(weights: Path, model: nn.Module, model_input: InputSpec, img_size: int, dtype: torch.dtype,
               device: torch.device) -> None:
    """Some families take any size when they are built, and fail when called. Raises SettingsError."""
    try:
        model(torch.zeros(1, *model_input.size, dtype=dtype, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise SettingsError(f"{weights} takes no images of --img-size {img_size}: {str(error).splitlines()[0]}"
                            ) from error


def _forwards(model: nn.Module, how: How, shared: Shared, device: torch.device) -> dict[str, Forward]:
    """By form of retention; of a network without it one without a name."""
    forward = of_shared(model, shared, device)
    if how.hflip_tta:
        forward = with_mirror_images(forward)
    if not hasattr(model, "set_retention_mode"):
        return {"": forward}
    auto, *forms = RETENTION_MODES
    first = forms[0] if how.compare_modes and how.mode == auto else how.mode
    others = [form for form in forms if form != first] if how.compare_modes else []
    return {mode: _in_form(model, mode, forward) for mode in (first, *others)}


def _in_form(model: nn.Module, mode: str, forward: Forward) -> Forward:
    def compute(images: Tensor) -> Tensor:
        getattr(model, "set_retention_mode")(mode)
        return forward(images)

    return compute


def _of_weights(weights: Path, loaded: _Loaded) -> dict[str, Any]:
    metadata = loaded.metadata
    return {
        "weights": str(weights), "weights_sha256": loaded.sha256, "model": metadata.model.name,
        "model_args": metadata.model.args, "step": metadata.step, "samples_seen": metadata.samples_seen,
        "ema": metadata.ema, "weights_dtype": metadata.dtype, "config_hash": metadata.config_hash,
        "training_data_fingerprint": metadata.data_fingerprint, "classes_of_model": len(metadata.model.classes)}


def _of_images(reader: Reader, model_input: InputSpec, samples: np.ndarray, shared: Shared) -> dict[str, Any]:
    return {
        "data_fingerprint": reader.fingerprint, "classes_of_data": len(reader.classes), "classes": len(shared.names),
        "images_left_out": len(reader) - len(samples), **model_input.timm_cfg()}


def _numbers(measured: Measured) -> dict[str, Any]:
    return {name: _for_json(value) for name, value in asdict(summary(measured.predictions)).items()}


def _for_json(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _title(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
