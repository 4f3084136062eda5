"""The portable weights file: safetensors whose header says which model it is, so that evaluation never asks again.

The tensors carry the model's own state_dict names: timm, Hugging Face and safetensors tools read the file as well.
Nothing here executes what it reads: no pickle, and a file cannot name other weights to fetch.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from vir.errors import DataError, SettingsError
from vir.files import read_regular
from vir.weights.fields import is_list_of_texts, is_text_map, some, strict_json
from vir.weights.metadata import FutureError, WeightsMetadata
from vir.weights.tensor_files import CODES, INDEX_ENDING, TensorEntry, existing, index_of, of_tensor, write_tensors

METADATA_KEY = "vir"

_MOST_JSON = 100_000_000
"""Bytes of an index; safetensors takes headers of as many."""

_PART = re.compile(r"[^/\\\0]+\.safetensors")


def save_weights(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], metadata: WeightsMetadata) -> None:
    """Write the file so that `path` is either as before or complete and on disk; folders are made as needed.

    Raises:
        SettingsError: the metadata is not what a file can say; a type that a file cannot hold; weights in several files
            have this name.
        DataError: it cannot be written.
    """
    if several := [file for file in existing(Path(path)) if file != Path(path)]:
        raise SettingsError(f"{path} is the name of weights in several files, {several[0].name} among them; give "
                            "another name, or remove these")
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


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file of that name, or one of weights in several files."""
    return os.path.isfile(_index_of(path) or path)


def read_metadata(path: str | os.PathLike[str]) -> WeightsMetadata:
    """What the header says; the tensors are not read. DataError where the file is not one of ours."""
    return _parse(path, _stored(path).header)


def stated_metadata(path: str | os.PathLike[str]) -> WeightsMetadata | None:
    """What the header says; None where the file, or those of an index, are of another kind and name no model."""
    if _index_of(path) is None:
        if not os.path.isfile(path):  # opening a pipe would wait
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        if METADATA_KEY not in header:
            return None
    header = _stored(path).header
    return _parse(path, header) if METADATA_KEY in header else None


def outline(path: str | os.PathLike[str]) -> tuple[WeightsMetadata, dict[str, Tensor]]:
    """What the headers say: also of the tensors, which are on the meta device and have no numbers."""
    stored = _stored(path)
    metadata = _parse(path, stored.header)
    outlines: dict[str, Tensor] = {}
    for file, tensors in stored.files.items():
        for name, fields in tensors.items():
            dtype, shape = _TYPES.get(fields["dtype"]), fields["shape"]
            try:
                if dtype is None:
                    raise ValueError("which is not read here")
                outlines[name] = torch.empty(shape, dtype=dtype, device="meta")
            except (RuntimeError, TypeError, ValueError) as error:  # sides whose product no computer can count
                raise DataError(f"{file}: {name[:100]} is {fields['dtype']} of shape {reprlib.repr(shape)} "
                                f"({str(error).splitlines()[0]}); make it anew with vir-consolidate") from error
    return metadata, outlines


def read(path: str | os.PathLike[str]) -> tuple[WeightsMetadata, dict[str, Tensor]]:
    """What the header says, and the tensors. DataError where the file is not one of ours."""
    stored = _stored(path)
    metadata = _parse(path, stored.header)
    tensors: dict[str, Tensor] = {}
    for one in stored.files:
        with _open(one) as file:
            tensors |= {name: file.get_tensor(name) for name in stored.files[one]}
    return metadata, tensors


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files that hold the tensors. DataError where they are none of weights."""
    return list(_stored(path).files)


_TYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class _Stored:
    """The header of a file of weights, or of all its parts."""

    header: dict[str, str]
    files: dict[Path, dict[str, dict[str, Any]]]
    """The tensors of each: their dtype and shape."""


def _stored(path: str | os.PathLike[str]) -> _Stored:
    """Raises DataError where the files are not safetensors, or not those of their index."""
    index = _index_of(path)
    if index is None:
        header, tensors = _header(Path(path))
        return _Stored(header, {Path(path): tensors})
    files: dict[Path, dict[str, dict[str, Any]]] = {}
    headers: list[dict[str, str]] = []
    for name, expected in _parts(index).items():
        file = index.parent / name
        if not os.path.isfile(file):
            raise DataError(f"{index} names {name}, which is not beside it; copy all files of these weights")
        header, files[file] = _header(file)
        if found := files[file].keys() ^ expected:
            raise DataError(f"{file} does not hold the tensors that {index.name} says: {some(found)}; copy all files "
                            "of these weights again")
        headers.append(header)
        if header.get(METADATA_KEY) != headers[0].get(METADATA_KEY):
            raise DataError(f"{file} says something else of itself than {next(iter(files)).name}: they are of "
                            "different steps or runs; copy all files of these weights again")
    return _Stored(headers[0], files)


def _index_of(path: str | os.PathLike[str]) -> Path | None:
    """The index of weights that lie in several files; None where they are in one, or there are none."""
    if os.fspath(path).endswith(INDEX_ENDING):
        return Path(path)
    index = index_of(Path(path))
    return index if not os.path.exists(path) and os.path.isfile(index) else None


def _parts(index: Path) -> dict[str, set[str]]:
    """Names of the files of an index, and the tensors that it says of each."""
    _check_file(index)
    try:
        fields = strict_json(read_regular(index, _MOST_JSON))
        names = fields.get("weight_map") if isinstance(fields, dict) else None
        if not is_text_map(names) or not names or not is_list_of_texts(list(names.values())):
            raise ValueError("its weight_map must name the file of each tensor")
        if wrong := {name for name in names.values() if not _PART.fullmatch(name)}:
            raise ValueError(f"it names the file {some(wrong)}; files are named without a folder and end in "
                             ".safetensors")
    except OSError as error:
        raise DataError(f"{index} cannot be read: {error.strerror or error}; copy it again") from error
    except ValueError as error:
        raise DataError(f"{index} is no index of weights: {error}; copy it again, or make it anew with "
                        "vir-consolidate") from error
    parts: dict[str, set[str]] = {}
    for tensor, name in names.items():
        parts.setdefault(name, set()).add(tensor)
    return parts


def _header(path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """What a file says of itself and of its tensors.

    safetensors sees to it that the tensors fill the file without holes or overlaps, by shapes and dtypes of its own
    list; of two entries with one name it would keep the last.
    """
    with _open(path) as file:
        header = file.metadata() or {}
    try:
        with path.open("rb") as raw:
            fields = strict_json(raw.read(int.from_bytes(raw.read(8), "little")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a safetensors file or is damaged ({error}); copy it again, or make it anew "
                        "with vir-consolidate") from error
    fields.pop("__metadata__", None)
    return header, fields


def _check_file(path: str | os.PathLike[str]) -> None:
    if not os.path.isfile(path):
        raise DataError(f"no weights file at {path}; vir-consolidate makes one from a run folder")


def _open(path: str | os.PathLike[str]) -> Any:
    _check_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a safetensors file or is cut short ({error}); copy it again, or make it anew "
                        "with vir-consolidate") from error


def _parse(path: str | os.PathLike[str], header: dict[str, str]) -> WeightsMetadata:
    text = header.get(METADATA_KEY)
    if text is None:
        raise DataError(f"{path} is a safetensors file but does not say which model it holds; files made by "
                        "vir-consolidate do, others load with timm.create_model(name, checkpoint_path=…)")
    try:
        return WeightsMetadata.from_json(text)
    except FutureError as error:
        raise DataError(f"{path} has {error}") from error
    except ValueError as error:
        raise DataError(f"{path} has damaged metadata: {error}; make it anew with vir-consolidate") from error
