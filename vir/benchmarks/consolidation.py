"""vir-consolidate beside DeepSpeed's zero_to_fp32 on the same checkpoints: seconds and memory.

All take turns in each round, each in a process of its own, on files that are in the page cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vir.benchmarks.checkpoint_size import folder_bytes
from vir.benchmarks.consolidation_run import OURS, SAFE, SIDES, anonymous
from vir.benchmarks.program import check_folder
from vir.benchmarks.stopwatch import machine
from vir.benchmarks.tables import markdown
from vir.checkpoints.info import read_info
from vir.checkpoints.names import newest
from vir.errors import DataError, SettingsError
from vir.files import replace_text

COLUMNS = ("ZeRO", "checkpoint MB", "largest tensor MB", "command", "s (least to most)", "× zero_to_fp32",
           "peak anonymous MB", "of which imports")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of tools/benchmark_consolidation.py, whose --help tells each of them."""

    runs: list[Path]
    folder: Path
    rounds: int = 5
    limit_mb: int = 2000
    json: Path | None = None


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown.

    Raises:
        SettingsError, DataError: no such folder, a run without a checkpoint, a command that fails, or other weights
            than DeepSpeed's.
    """
    if settings.rounds < 1 or settings.limit_mb < 1:
        raise SettingsError(f"--rounds is {settings.rounds} and --limit_mb {settings.limit_mb}; both must be at least "
                            "1")
    check_folder(settings.folder)
    measured = [_of_run(run, settings) for run in settings.runs]
    rows = [row for one in measured for row in _rows(one)]
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": "From ZeRO shards to a file of weights", "command": command,
            "machine": f"{machine(torch.device('cpu'))}, {len(os.sched_getaffinity(0))} cores", "columns": COLUMNS,
            "rows": rows, "runs": measured}, indent=1) + "\n")
    return markdown(COLUMNS, rows)


def _of_run(run: Path, settings: Settings) -> dict[str, Any]:
    checkpoint = newest(run)
    if checkpoint is None:
        raise DataError(f"{run} has no checkpoint; make one as the head of tools/benchmark_consolidation.py says")
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(settings.rounds):
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as place:
            sides = SIDES if number % 2 else SIDES[::-1]
            rounds.append({side: turn(side, checkpoint, Path(place) / side.replace(" ", "")) for side in sides})
            if not number:
                largest = _check_equal(*(Path(place) / side.replace(" ", "") for side in (OURS, SAFE)))
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as place:
        held = turn(OURS, checkpoint, Path(place) / "held", settings.limit_mb * 10**6)
    return {"stage": read_info(checkpoint).zero_stage, "bytes": folder_bytes(checkpoint), "largest_bytes": largest,
            "rounds": rounds, "limit_mb": settings.limit_mb, "under_limit": held}


def turn(side: str, checkpoint: Path, output: Path, limit: int | None = None) -> dict[str, float]:
    """Seconds, the peak of anonymous memory in bytes, and what imports had taken of it, of one process."""
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    os.sync()  # what the turn before has left to be written
    output.mkdir()
    words = [sys.executable, "-m", "vir.benchmarks.consolidation_run", side, str(checkpoint.absolute()), str(output)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words if limit is None else [*words, str(limit)], stdout=said,
                                   stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        said.seek(0)
        lines = said.read().splitlines()
    if process.returncode:
        raise DataError(f"{side} ended with {process.returncode}: {' '.join(lines)[-1000:]}")
    seconds, before = map(float, lines[-1].split())
    print(f"{side}: {seconds:.2f} s, {peak / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return {"seconds": seconds, "peak_bytes": peak, "import_bytes": before}


def _check_equal(ours: Path, theirs: Path) -> int:
    """The bytes of the largest tensor of what both have written. Raises DataError where they differ in a bit."""
    found, expected = _tensors(ours), _tensors(theirs)
    if differing := sorted(name for name in found.keys() | expected.keys() if name not in found or name not in expected
                           or not torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8))):
        raise DataError(f"vir-consolidate and zero_to_fp32 differ in {len(differing)} tensors, such as {differing[0]}")
    return max(tensor.nbytes for tensor in found.values())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name).reshape(-1) for name in file.keys()})
    return tensors


def _rows(measured: dict[str, Any]) -> list[list[str]]:
    start = [str(measured["stage"]), f"{measured['bytes'] / 1e6:,.0f}", f"{measured['largest_bytes'] / 1e6:.1f}"]
    rows = []
    for side in SIDES:
        seconds = [of_round[side]["seconds"] for of_round in measured["rounds"]]
        peer: Sequence[float] = [of_round[SAFE]["seconds"] for of_round in measured["rounds"]]
        ratio = statistics.median(theirs / own for theirs, own in zip(peer, seconds))
        peak = max(of_round[side]["peak_bytes"] for of_round in measured["rounds"])
        rows.append([*start, side, f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})",
                     f"{ratio:.2f}", f"{peak / 1e6:.0f}", f"{measured['rounds'][0][side]['import_bytes'] / 1e6:.0f}"])
    held = measured["under_limit"]
    rows.append([*start, f"{OURS}, RLIMIT_DATA {measured['limit_mb']} MB", f"{held['seconds']:.2f}", "",
                 f"{held['peak_bytes'] / 1e6:.0f}", f"{held['import_bytes'] / 1e6:.0f}"])
    return rows
