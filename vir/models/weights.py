"""The portable weights file: safetensors whose header says which model it is, so that evaluation never asks again.

The tensors carry the model's own state_dict names: timm, Hugging Face and safetensors tools read the file as well.
Nothing here executes what it reads: no pickle, and a file cannot name other weights to fetch.
"""

import dataclasses
import json
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vir.errors import DataError
from vir.files import replacing

FORMAT_VERSION = 1
METADATA_KEY = "vir"

FORBIDDEN_ARGS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
"""Arguments of timm.create_model with which a file could make its reader fetch or open other weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsMetadata:
    model_name: str
    """As timm knows it."""

    model_args: dict
    """Keyword arguments for timm.create_model beside the name. JSON: tuples come back as lists."""

    classes: tuple[str, ...]
    """The class of each logit, in order; empty where unknown."""

    input_size: tuple[int, int, int]
    """Channels, height and width of the images that the model takes."""

    mean: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]."""

    std: tuple[float, ...]

    interpolation: str
    """For resizing: bilinear, bicubic, …"""

    crop_pct: float
    """Side of the centre crop / shorter side of the resized image."""

    step: int
    """Global batches that trained these weights."""

    samples_seen: int

    ema: bool
    """Whether these are the averaged weights."""

    dtype: str
    """In which the file holds the weights; a loaded model is float32."""

    format_version: int = FORMAT_VERSION


def save_weights(path: str | os.PathLike, state_dict: Mapping[str, Tensor], metadata: WeightsMetadata) -> None:
    """Write the file so that `path` is either as before or complete and on disk; folders are made as needed."""
    path = Path(path)
    header = {"format": "pt", METADATA_KEY: json.dumps(dataclasses.asdict(metadata), ensure_ascii=False)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(_separate(state_dict), temporary, metadata=header)
            temporary.chmod(mode)  # as the umask says; safetensors leaves 0600, and clusters share folders
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write {path}: {error}; free some space or choose another file") from error


def read_metadata(path: str | os.PathLike) -> WeightsMetadata:
    """What the header says; the tensors are not read. DataError where the file is not one of ours."""
    with _open(path) as file:
        return _parse(path, file.metadata())


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """The model in the file, float32, in eval mode, on `device`; any model that timm knows, not only ViR.

    Its preprocessing, classes and history are at `model.weights_metadata` (a WeightsMetadata); the preprocessing is
    also in `model.pretrained_cfg`, where timm.data.resolve_model_data_config finds it.
    """
    with _open(path) as file:
        metadata = _parse(path, file.metadata())
        model = _create(path, metadata)
        state_dict = {name: file.get_tensor(name) for name in file.keys()}
    _check_tensors(path, metadata, state_dict, model.state_dict())
    num_classes = getattr(model, "num_classes", None)
    if metadata.classes and len(metadata.classes) != num_classes:
        raise DataError(f"{path} names {len(metadata.classes)} classes but its model has {num_classes} logits; save it "
                        f"with the classes that it was trained on, or with none")
    model.load_state_dict(state_dict)
    model.weights_metadata = metadata
    return model.to(device).eval()


def initialize_from(model: nn.Module, path: str | os.PathLike) -> None:
    """Begin training from weights in a file: one of ours, or any that timm reads (weights only, no code is run).

    Position tables and patches are resampled where the model's family knows how. A classifier of another class count
    keeps its random start; everything else must be there.

    Raises:
        DataError: a file that cannot be read, or that holds weights of another architecture.
    """
    try:
        state_dict = timm.models.load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
        resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state_dict = resample(state_dict, model) if resample else state_dict
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, pickle.UnpicklingError,
            SafetensorError) as error:
        raise DataError(f"{path} cannot be read as weights: {error}") from error
    own = model.state_dict()
    heads = (getattr(model, "default_cfg", None) or {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    for name in [name for name in state_dict if name.rsplit(".", 1)[0] in heads]:
        if name in own and own[name].shape != state_dict[name].shape:
            state_dict[name] = own[name]
    problems = _problems(state_dict, own)
    if problems:
        raise DataError(f"{path} does not fit {type(model).__name__} as it is built here: {problems}; give weights of "
                        "the same architecture")
    model.load_state_dict(state_dict)


def _open(path: str | os.PathLike):
    if not Path(path).is_file():
        raise DataError(f"no weights file at {path}; tools/consolidate_checkpoint.py makes one from a run folder")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{path} is not a safetensors file or is cut short ({error}); copy it again, or make it anew "
                        f"with tools/consolidate_checkpoint.py") from error


def _parse(path: str | os.PathLike, header: dict[str, str] | None) -> WeightsMetadata:
    text = (header or {}).get(METADATA_KEY)
    if text is None:
        raise DataError(f"{path} is a safetensors file but does not say which model it holds; files made by tools/"
                        f"consolidate_checkpoint.py do, others load with timm.create_model(name, checkpoint_path=…)")
    try:
        fields = json.loads(text)
        version = int(fields["format_version"])
        if version > FORMAT_VERSION:
            raise DataError(f"{path} has format_version {version}, this vir reads up to {FORMAT_VERSION}; update vir")
        for name in ("classes", "input_size", "mean", "std"):
            fields[name] = tuple(fields[name])
        fields["model_args"] = dict(fields["model_args"])
        return WeightsMetadata(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} has damaged metadata ({type(error).__name__}: {error}); make it anew with "
                        f"tools/consolidate_checkpoint.py") from error


def _create(path: str | os.PathLike, metadata: WeightsMetadata) -> nn.Module:
    name, args = metadata.model_name, metadata.model_args
    if not timm.is_model(name):
        raise DataError(f"{path} holds a {name!r}, which timm {timm.__version__} does not know; install the timm that "
                        f"wrote it, or import the package that registers this model first")
    if forbidden := sorted(FORBIDDEN_ARGS & args.keys()):
        raise DataError(f"{path} has model_args {forbidden}, which would fetch other weights; remove them where the "
                        f"file is made")
    overlay = {key: getattr(metadata, key) for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    try:
        return timm.create_model(name, pretrained_cfg_overlay=overlay, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
        raise DataError(f"{path}: timm {timm.__version__} cannot create {name!r} with model_args {args} ({error}); "
                        f"install the versions of vir and timm that wrote it") from error


def _check_tensors(
    path: str | os.PathLike, metadata: WeightsMetadata, found: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    if told := _problems(found, expected):
        raise DataError(f"{path} does not fit {metadata.model_name} with model_args {metadata.model_args}: {told}; "
                        f"correct the model_args where the file is made")


def _problems(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being a model's state_dict; empty where nothing does."""
    shapes = [f"{name} is {list(found[name].shape)}, not {list(expected[name].shape)}"
              for name in found.keys() & expected.keys() if found[name].shape != expected[name].shape]
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(names)} tensors {kind} ({_some(names)})" for kind, names in problems.items() if names)


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _separate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none sharing memory (safetensors refuses tied weights and views of one buffer)."""
    tensors, storages = {}, set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors
