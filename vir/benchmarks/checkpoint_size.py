"""How many bytes a checkpoint takes, and the average of the weights in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vir.checkpoints import names
from vir.checkpoints.partitions import EMA, files_of_rank, read_file
from vir.engine import ds_config


def newest(run: Path) -> Path:
    """The newest checkpoint of a run that ended well."""
    folder = names.newest(run)
    assert folder is not None, "a run that ended well has a checkpoint"
    return folder


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and in the folders below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ema_bytes(run: Path, config: str, ranks: int, parameters: int) -> dict[str, Any]:
    """What the average of the weights takes on each rank, from the files that the ranks wrote.

    Without ZeRO every rank holds the same and rank 0 alone writes it.
    """
    folder, stage = newest(run), ds_config.zero_stage(ds_config.read(config))
    sizes = [sum(average.numel() * average.element_size() for path in files_of_rank(folder, rank)
                 if path.suffix == ".pt" for average in _values_of(EMA, read_file(path)))
             for rank in range(ranks if stage else 1)]
    ideal = 4 * parameters / ranks
    return {"config": Path(config).stem, "stage": stage, "bytes_of_rank": sizes if stage else sizes * ranks,
            "ideal_bytes": ideal, "ratio": max(sizes) / ideal}


def _values_of(key: str, saved: Any) -> Iterator[Any]:
    """All tensors that lie under a key, however deep."""
    if isinstance(saved, dict):
        for name, value in saved.items():
            if name == key and hasattr(value, "numel"):
                yield value
            else:
                yield from _values_of(key, value)
    elif isinstance(saved, (list, tuple)):
        for value in saved:
            yield from _values_of(key, value)
