"""vir-convert beside `tar cf` and `sha256sum`, and vir-verify and vir-index beside `sha256sum`, on the same files."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vir.benchmarks.photographs import SIZE
from vir.benchmarks.program import check_folder
from vir.benchmarks.stopwatch import machine
from vir.benchmarks.tables import markdown
from vir.errors import DataError, SettingsError
from vir.files import replace_text

_CLASSES = 50
PICTURES = 100
"""Different pictures; the files differ in a comment of each."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    folder: Path
    """Everything is written in a new folder in it, and removed again."""
    images: int = 10_000
    image_bytes: int = 110_000
    workers: int = 2
    rounds: int = 3
    json: Path | None = None


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown; each row with its median over the rounds, in which all rows take turns.

    Raises:
        SettingsError, DataError: no such folder, or a command that fails.
    """
    if min(settings.images, settings.image_bytes, settings.workers, settings.rounds) < 1:
        raise SettingsError("--images, --image_bytes, --workers and --rounds must be at least 1")
    check_folder(settings.folder)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as place:
        total = make_images(Path(place) / "src", settings.images, settings.image_bytes)
        seconds = [_round(Path(place), settings.workers) for _ in range(settings.rounds)]
    columns = ("command", "images/s (least to most)", "MB/s", "× peer")
    rows = _rows(seconds, settings, total)
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": f"{settings.images:,} files of {total / settings.images / 1000:.0f} KB", "command": command,
            "machine": machine(torch.device("cpu")), "columns": columns, "rows": rows, "seconds": seconds},
            indent=1) + "\n")
    return markdown(columns, rows)


def make_images(folder: Path, images: int, image_bytes: int, size: tuple[int, int] = SIZE,
                pictures: Sequence[bytes] = ()) -> int:
    """Writes FOLDER/train/CLASS/IMAGE, JPEGs of about `image_bytes` each, and gives the bytes of all.

    Args:
        size: width and height in pixels.
        pictures: JPEGs that the files are made of in turn; blurred noise where none are given.
    """
    pictures = pictures or _noise(min(PICTURES, images), size)
    total = 0
    for number in range(images):
        path = folder / "train" / f"n{number % _CLASSES:08d}" / f"n{number % _CLASSES:08d}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        total += path.write_bytes(_padded(pictures[number % len(pictures)], number, image_bytes))
    return total


def _noise(count: int, size: tuple[int, int]) -> list[bytes]:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        file = BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    return pictures


def _padded(jpeg: bytes, number: int, size: int) -> bytes:
    """The JPEG with comments that make it `size` bytes long, if it is shorter, and unlike all others."""
    comments = b""
    while (left := size - len(jpeg) - len(comments) - 4) > 20 or not comments:
        text = f"{number:020d}".encode().ljust(min(max(left, 20), 65_000), b"x")
        comments += b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
    return jpeg[:2] + comments + jpeg[2:]


def _round(place: Path, workers: int) -> dict[str, float]:
    """Wall clock of each command in seconds, start-up included."""
    out, tars = place / "out", place / "tars"
    python = [sys.executable, "-m"]
    convert = [*python, "vir.convert", "--source", str(place / "src"), "--split", "train", "--output", str(out)]
    seconds = {"tar cf, sha256sum": _timed(["sh", "-c", "tar cf all.tar src && sha256sum all.tar"], place)}
    (place / "all.tar").unlink()
    for count in sorted({1, workers}):
        shutil.rmtree(out, ignore_errors=True)
        seconds[f"vir-convert --workers {count}"] = _timed([*convert, "--workers", str(count)], place)
    shards = sorted(map(str, (out / "train").glob("*.tar")))
    seconds[f"sha256sum, {workers} at a time"] = _timed(
        ["xargs", "-P", str(workers), "-n", "1", "sha256sum"], place, "\n".join(shards))
    seconds[f"vir-verify --jobs {workers}"] = _timed(
        [*python, "vir.verify", str(out / "train"), "--jobs", str(workers)], place)
    tars.mkdir()
    for shard in shards:
        os.link(shard, tars / Path(shard).name)
    seconds["vir-index --jobs 1"] = _timed([*python, "vir.index", str(tars), "--jobs", "1"], place)
    shutil.rmtree(tars)
    shutil.rmtree(out)
    return seconds


def _timed(command: Sequence[str], folder: Path, text: str = "") -> float:
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.monotonic() - began


def _rows(seconds: Sequence[dict[str, float]], settings: Settings, total: int) -> list[list[str]]:
    peers = ("tar cf, sha256sum", f"sha256sum, {settings.workers} at a time")
    rows, peer = [], ""
    for name in seconds[0]:
        times = [of_round[name] for of_round in seconds]
        middle = statistics.median(times)
        if name in peers:
            peer = name
        ratio = statistics.median(of_round[peer] / of_round[name] for of_round in seconds)
        rows.append([name, f"{settings.images / middle:,.0f} ({settings.images / max(times):,.0f}–"
                     f"{settings.images / min(times):,.0f})", f"{total / middle / 1e6:,.0f}", f"{ratio:.2f}"])
    return rows
