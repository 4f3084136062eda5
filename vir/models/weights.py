"""The portable weights file: safetensors whose header says which model it is, so that evaluation never asks again.

The tensors carry the model's own state_dict names: timm, Hugging Face and safetensors tools read the file as well.
Nothing here executes what it reads: no pickle, and a file cannot name other weights to fetch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from vir.config import PRECISIONS
from vir.errors import DataError
from vir.models.spec import InputSpec, ModelSpec
from vir.models.tensor_files import TensorEntry, of_tensor, write_tensors

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16)))
FORMAT_VERSION = 2
METADATA_KEY = "vir"


@dataclass(frozen=True, kw_only=True)
class WeightsMetadata:
    """What a weights file says of itself."""

    model: ModelSpec
    """The file is JSON, so tuples in its args are lists after loading."""

    step: int
    """Global batches that trained these weights."""

    samples_seen: int

    ema: bool
    """Whether these are the averaged weights."""

    dtype: str
    """In which the file holds the weights; a loaded model is float32."""

    config_hash: str = ""
    """SHA-256 of the settings of the run; empty where there was none."""

    data_fingerprint: str = ""
    """Of the images that trained them, and their class list; empty where unknown."""

    format_version: int = FORMAT_VERSION
    """2 added crop_mode, config_hash and data_fingerprint."""

    def to_json(self) -> str:
        """The header, flat."""
        return json.dumps({
            "model_name": self.model.name, "model_args": self.model.args, "classes": self.model.classes,
            **self.model.input.timm_cfg(), "step": self.step, "samples_seen": self.samples_seen, "ema": self.ema,
            "dtype": self.dtype, "config_hash": self.config_hash, "data_fingerprint": self.data_fingerprint,
            "format_version": self.format_version}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> WeightsMetadata:
        """Raises ValueError, TypeError or KeyError where the text is not what to_json writes."""
        fields = json.loads(text)
        image = InputSpec.from_json(
            size=fields.pop("input_size"), mean=fields.pop("mean"), std=fields.pop("std"),
            interpolation=fields.pop("interpolation"), crop_pct=fields.pop("crop_pct"),
            crop_mode=fields.pop("crop_mode", "center"))
        model = ModelSpec(name=fields.pop("model_name"), args=dict(fields.pop("model_args")), input=image,
                          classes=tuple(fields.pop("classes")))
        return cls(model=model, **fields)


def save_weights(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], metadata: WeightsMetadata) -> None:
    """Write the file so that `path` is either as before or complete and on disk; folders are made as needed."""
    write_weights(Path(path), [of_tensor(name, tensor) for name, tensor in state_dict.items()], metadata)


def write_weights(path: Path, entries: Sequence[TensorEntry], metadata: WeightsMetadata, *,
                  max_file_bytes: int | None = None, progress: tqdm[Any] | None = None) -> list[Path]:
    """The same, from tensors that are read as they are written, in as many files as `write_tensors` makes."""
    header = {"format": "pt", METADATA_KEY: metadata.to_json()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_tensors(path, entries, header, max_file_bytes=max_file_bytes, progress=progress)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; free some space or choose another file") from error


def read_metadata(path: str | os.PathLike[str]) -> WeightsMetadata:
    """What the header says; the tensors are not read. DataError where the file is not one of ours."""
    with _open(path) as file:
        return _parse(path, file.metadata())


def stated_metadata(path: str | os.PathLike[str]) -> WeightsMetadata | None:
    """What the header says; None where the file is of another kind and names no model."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return _parse(path, header) if METADATA_KEY in header else None


def read(path: str | os.PathLike[str]) -> tuple[WeightsMetadata, dict[str, Tensor]]:
    """What the header says, and the tensors. DataError where the file is not one of ours."""
    with _open(path) as file:
        return _parse(path, file.metadata()), {name: file.get_tensor(name) for name in file.keys()}


def _open(path: str | os.PathLike[str]) -> Any:
    if not os.path.isfile(path):
        raise DataError(f"no weights file at {path}; vir-consolidate makes one from a run folder")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{path} is not a safetensors file or is cut short ({error}); copy it again, or make it anew "
                        "with vir-consolidate") from error


def _parse(path: str | os.PathLike[str], header: dict[str, str] | None) -> WeightsMetadata:
    text = (header or {}).get(METADATA_KEY)
    if text is None:
        raise DataError(f"{path} is a safetensors file but does not say which model it holds; files made by "
                        "vir-consolidate do, others load with timm.create_model(name, checkpoint_path=…)")
    try:
        version = int(json.loads(text)["format_version"])
        if version > FORMAT_VERSION:
            raise DataError(f"{path} has format_version {version}, this vir reads up to {FORMAT_VERSION}; update vir")
        return WeightsMetadata.from_json(text)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} has damaged metadata ({type(error).__name__}: {error}); make it anew with "
                        "vir-consolidate") from error
