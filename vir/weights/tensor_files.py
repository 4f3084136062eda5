"""Safetensors files, written tensor by tensor: the header first, then the numbers, in pieces that bound the memory.

One file X.safetensors, or as Hugging Face names several: X-00001-of-00003.safetensors …, and beside them
X.safetensors.index.json, which says where each tensor is. Then there is no X.safetensors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from vir.errors import DataError, SettingsError
from vir.files import flush, replacing

ENDING = ".safetensors"
INDEX_ENDING = ".index.json"
"""X.safetensors has the index X.safetensors.index.json."""

PIECE_BYTES = 1 << 20
"""Of a tensor, read and written at once. Measured: in pieces of 4 MB and more, writing is up to 3 times slower."""

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
         torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64",
         torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL"}
"""Names of types in a file."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    """Its numbers [start, stop) in row-major order, flat, on the CPU, in its dtype; each is asked for twice: to be
    written and to be compared with what is then in the file."""

    @property
    def numbers(self) -> int:
        """How many it has."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numbers * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """Its bytes, in order."""
        step = PIECE_BYTES // self.dtype.itemsize
        for start in range(0, self.numbers, step):
            piece = self.read(start, min(start + step, self.numbers))
            assert piece.dtype == self.dtype and piece.ndim == 1, self.name
            yield piece.detach().contiguous().view(torch.uint8)


def of_tensor(name: str, tensor: Tensor) -> TensorEntry:
    """The entry of a tensor that is at hand, on any device. Raises SettingsError where a file cannot hold its type."""
    if tensor.dtype not in CODES:
        raise SettingsError(f"{name} is {tensor.dtype}, which safetensors cannot hold; leave it out or convert it")
    flat = tensor.detach().contiguous().view(-1)
    return TensorEntry(name, tuple(tensor.shape), tensor.dtype, lambda start, stop: flat[start:stop].cpu())


def index_of(path: Path) -> Path:
    """The index of the files that stand for one of this name."""
    return path.with_name(path.name + INDEX_ENDING)


def existing(path: Path) -> list[Path]:
    """What is there of the file of this name, whole or in several: the file, the index, then the others in order."""
    of_several = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    whole = [one for one in (path, index_of(path)) if os.path.lexists(one)]
    if not path.parent.is_dir():
        return whole
    return whole + sorted(one for one in path.parent.iterdir() if of_several.fullmatch(one.name))


def write_tensors(path: Path, entries: Sequence[TensorEntry], header: Mapping[str, str], *,
                  max_file_bytes: int | None = None, progress: tqdm[Any] | None = None) -> list[Path]:
    """Write them as one file, or as several with an index, in place of all that is there under that name.

    Nothing takes its name before all files are written, read back by the safetensors library, compared bit for bit, and
    on disk; the index comes last. An error leaves what was there, and nothing else; where as many files take the place
    of several, one that comes while the names change leaves no index, so that no reader takes a mixture for a whole.

    Args:
        path: NAME.safetensors in a folder that is there.
        header: of every file, beside the tensors.
        max_file_bytes: of the tensors in one file; a larger tensor gets a file of its own.
        progress: moved on by the bytes of tensors that are written.

    Returns:
        The files, the index last.

    Raises:
        DataError: too little space, or the file does not read back as it was written.
        OSError: it cannot be written.
    """
    parts = _split(entries, max_file_bytes)
    names = [path] if len(parts) == 1 else [
        path.with_name(f"{path.stem}-{number:05d}-of-{len(parts):05d}{path.suffix}")
        for number in range(1, len(parts) + 1)]
    heads = [_head(part, header) for part in parts]
    needed = sum(map(len, heads)) + sum(entry.nbytes for entry in entries)
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise DataError(f"{path} needs {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free there; free some space "
                        "or choose another folder")
    before, written = existing(path), list(names)
    # Renames from the last to the first. The disk works while what it was given is compared.
    try:
        with _one_thread(), ExitStack() as renaming, ThreadPoolExecutor(1) as disk:
            if len(parts) > 1:
                written.append(index_of(path))
                renaming.enter_context(replacing(written[-1])).write_text(_index(names, parts), encoding="utf-8")
            for name, part, head in zip(names, parts, heads):
                temporary = renaming.enter_context(replacing(name))
                _write(temporary, part, head, progress)
                flushed = disk.submit(flush, temporary)
                _compare(temporary, name, part, header)
                flushed.result()
            if len(parts) > 1 and set(names) & set(before):  # an index must not point at files of two writings
                index_of(path).unlink(missing_ok=True)
                flush(path.parent)
    except BaseException:
        for name in written:
            if name not in before:
                name.unlink(missing_ok=True)
        raise
    for stale in before:
        if stale not in written:
            stale.unlink(missing_ok=True)
    return written


@contextmanager
def _one_thread() -> Iterator[None]:
    """Copying is bound by memory. On cores that are busy, threads wait for each other: it took 20 times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _split(entries: Sequence[TensorEntry], limit: int | None) -> list[list[TensorEntry]]:
    """As Hugging Face's tools do: in their order, each file as full as the limit allows, a tensor that is larger alone.

    Within a file in the order of the safetensors library, by which every tensor begins at a multiple of its numbers'
    size.
    """
    assert len({entry.name for entry in entries}) == len(entries), "two tensors have the same name"
    parts: list[list[TensorEntry]] = []
    filling: list[TensorEntry] = []
    size = 0
    for entry in entries:
        if limit is not None and entry.nbytes > limit:
            parts.append([entry])
            continue
        if limit is not None and size + entry.nbytes > limit:
            parts.append(filling)
            filling, size = [], 0
        filling.append(entry)
        size += entry.nbytes
    if filling or not parts:
        parts.append(filling)
    return [sorted(part, key=lambda entry: (-entry.dtype.itemsize, entry.name)) for part in parts]


def _head(part: Sequence[TensorEntry], header: Mapping[str, str]) -> bytes:
    """What a file begins with: the length of the JSON, the JSON, spaces up to a multiple of 8."""
    fields: dict[str, Any] = {"__metadata__": dict(header)}
    offset = 0
    for entry in part:
        fields[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape),
                              "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(names: Sequence[Path], parts: Sequence[Sequence[TensorEntry]]) -> str:
    return json.dumps({
        "metadata": {"total_size": sum(entry.nbytes for part in parts for entry in part)},
        "weight_map": {entry.name: name.name for name, part in zip(names, parts) for entry in part}},
        ensure_ascii=False, indent=2, sort_keys=True) + "\n"


def _write(path: Path, part: Sequence[TensorEntry], head: bytes, progress: tqdm[Any] | None) -> None:
    with path.open("xb") as file:
        file.write(head)
        for entry in part:
            for piece in entry.pieces():
                file.write(piece.numpy().data)
                if progress is not None:
                    progress.update(len(piece))


def _compare(path: Path, name: Path, part: Sequence[TensorEntry], header: Mapping[str, str]) -> None:
    """Raises DataError where the file at `path`, which is to take a name, is not what is to be in it.

    The safetensors library judges the header, from which the places of the numbers are then taken.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            found = {key: (one.get_dtype(), tuple(one.get_shape())) for key, one in slices.items()}
            is_right = file.metadata() == dict(header) and found == {
                entry.name: (CODES[entry.dtype], entry.shape) for entry in part}
            wrong = "" if is_right else "its header"
    except SafetensorError as error:
        wrong = f"its header ({error})"
    if wrong or (wrong := _first_differing(path, part)):
        raise DataError(f"{name}: {wrong} did not read back as it was written; the disk or the memory of this machine "
                        "fails: write to another disk")


def _first_differing(path: Path, part: Sequence[TensorEntry]) -> str:
    """The tensor whose bytes in the file are others than its own; none: an empty string."""
    there = bytearray()  # which, unlike others, compares with any bytes at the speed of memory
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        places = json.loads(file.read(length))
        for entry in part:
            file.seek(8 + length + places[entry.name]["data_offsets"][0])
            for piece in entry.pieces():
                if len(there) != len(piece):
                    there = bytearray(len(piece))
                if file.readinto(there) != len(piece) or there != piece.numpy().data:
                    return f"the tensor {entry.name}"
    return ""
