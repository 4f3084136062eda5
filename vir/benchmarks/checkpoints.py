"""What checkpoints cost that are written beside training: a step held, slower steps, a slower run.

Each launch (vir/benchmarks/checkpoints_run.py) measures what is of the same ranks and the same DeepSpeed JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vir import launcher
from vir.benchmarks.launching import TORCHRUN, launch
from vir.benchmarks.program import check_folder
from vir.benchmarks.stopwatch import machine
from vir.benchmarks.tables import checkpointing_table
from vir.engine import ds_config, half_precision
from vir.errors import SettingsError
from vir.files import replace_text
from vir.output_folder import check_file

_STEPS_UNDER = "zero2_fp32"
"""Of writing and throughput."""

_LARGE = {"name": "vir_small_patch16_224", "args": {"depth": 22}}
"""Of which each rank of two copies over 300 MB in every ZeRO stage."""
_MODELS: dict[str, dict[str, Any]] = {
    "stall": {**_LARGE, "img_size": 32, "micro_batch_size": 1},
    "writing": {**_LARGE, "img_size": 112, "micro_batch_size": 2},
    "throughput": {"name": "vir_tiny_patch16_224", "args": {}, "img_size": 224, "micro_batch_size": 4}}
_QUICK = {"name": "vir_tiny_patch16_224", "args": {"patch_size": 14, "embed_dim": 128, "depth": 2, "num_heads": 2},
          "img_size": 28, "micro_batch_size": 2}
_STEPS, _QUICK_STEPS = 20, 3
"""Of a turn of throughput, in which one checkpoint is made."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of tools/benchmark_checkpoints.py, whose --help tells each of them and its default."""

    folder: Path
    parts: Sequence[str]
    """Keys of _MODELS."""
    deepspeed_configs: Sequence[str]
    ranks: int
    writing_ranks: int
    turns: int
    written: int
    rounds: int
    quick: bool
    json: Path | None

    def __post_init__(self) -> None:
        for flag in ("ranks", "writing_ranks", "written", "rounds"):
            if getattr(self, flag) < 1:
                raise SettingsError(f"--{flag} is {getattr(self, flag)}; it must be at least 1")
        if self.turns < self.written:
            raise SettingsError(f"--turns is {self.turns}; it must be at least --written, which is {self.written}")


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown.

    Raises:
        SettingsError: --json cannot be written, no such DeepSpeed JSON, a launch that fails.
        DataError: no such folder.
    """
    check_file("--json", settings.json)
    check_folder(settings.folder)
    launcher.hide_gpus()  # the ranks inherit it
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as place:
        configs = [name for name in settings.deepspeed_configs if not _is_slow(_json_of(name, Path(place)))]
        tasks = [task for (ranks, config), of_launch in _launches(settings, configs).items()
                 for task in _measured(ranks, _json_of(config, Path(place)), of_launch, Path(place))]
    tasks.sort(key=lambda task: [*_MODELS].index(task["part"]))
    if settings.json is not None:
        torch.set_num_threads(1)  # as each rank has
        replace_text(settings.json, json.dumps({
            "title": "Checkpoints beside training", "command": command,
            "machine": f"{machine(torch.device('cpu'))}, {len(os.sched_getaffinity(0))} cores",
            "checkpointing": tasks}, indent=1) + "\n")
    return checkpointing_table(tasks)


def _launches(settings: Settings, configs: list[str]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """What to measure, by the number of ranks and the DeepSpeed JSON."""
    under = _STEPS_UNDER if _STEPS_UNDER in configs or not configs else configs[0]
    asked = {"stall": [(settings.ranks, config) for config in configs], "writing": [(settings.writing_ranks, under)],
             "throughput": [(settings.ranks, under)]}
    how = {"stall": {"turns": settings.turns, "written": settings.written}, "writing": {"turns": settings.turns},
           "throughput": {"turns": settings.rounds, "steps": _QUICK_STEPS if settings.quick else _STEPS}}
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for part in settings.parts:
        for key in asked[part]:
            found.setdefault(key, []).append(
                {"part": part, "model": _QUICK if settings.quick else _MODELS[part], "how": how[part]})
    return found


def _json_of(name: str, place: Path) -> str:
    """As given; zero3_fp32, which is not shipped, is the shipped zero3_bf16 without its bf16."""
    if name != "zero3_fp32":
        return name
    path = place / f"{name}.json"
    content = {key: value for key, value in ds_config.read("zero3_bf16").items() if key != "bf16"}
    path.write_text(json.dumps(content))
    return str(path)


def _is_slow(config: str) -> bool:
    """Whether this processor does not have what its precision needs, which would take minutes for a step."""
    precision = ds_config.precision(ds_config.read(config))
    if slow := precision != "fp32" and half_precision.measure(precision).is_slow:
        print(f"{config} is left out: this processor is slow in {precision}", file=sys.stderr, flush=True)
    return slow


def _measured(ranks: int, config: str, tasks: list[dict[str, Any]], place: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        settings = Path(folder, "settings.json")
        settings.write_text(json.dumps({"config": config, "tasks": tasks}))
        launch(TORCHRUN, ranks, ["--module", "vir.benchmarks.checkpoints_run", str(settings.absolute())],
               "see that --folder has room and that the ranks fit into memory")
        found: list[dict[str, Any]] = json.loads(Path(folder, "measured.json").read_text())
    print(f"{Path(config).stem}, {ranks} ranks: {', '.join(task['part'] for task in found)}", file=sys.stderr,
          flush=True)
    return found
