"""Plans of ViRs from 22 million to ten billion parameters on 8 to 1,024 GPUs, each by its command and timed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vir.benchmarks.stopwatch import machine
from vir.benchmarks.tables import markdown
from vir.errors import DataError
from vir.files import replace_text
from vir.output_folder import check_file

COLUMNS = ("model", "parameters", "GPUs", "JSON", "batch = accumulation x micro-batch x ranks",
           "memory of a GPU, GB", "images/s", "bound by", "hours of the recipe, with failures", "GPU hours",
           "goodput %", "downloads per shard", "planned in s", "command")
_SMALL = ("--config vir/recipes/vir_small_in1k.yaml", "zero2_bf16")
_LARGE = ("--config vir/recipes/vir_small_in1k.yaml --model.name vir_large_patch14_224", "zero2_bf16")
_GIANT = ("--config vir/recipes/vir_giant_in1k.yaml", "zero2_bf16")
_TEN = ("--config vir/recipes/vir_giant_in1k.yaml --model.args '{embed_dim: 4096, depth: 50, num_heads: 32}'",
        "zero3_bf16_ckpt")
MODELS = {"ViR-S/16": _SMALL, "ViR-L/14": _LARGE, "one billion": _GIANT, "ten billion": _TEN}
"""The settings and the DeepSpeed JSON of each."""
BATCHES = {"ViR-S/16": {1: (1024, 128), 8: (4096, 64), 32: (8192, 32), 128: (8192, 8)},
           "ViR-L/14": {1: (1024, 64), 8: (4096, 64), 32: (8192, 32), 128: (8192, 8)},
           "one billion": {1: (4096, 32), 8: (4096, 32), 32: (8192, 32), 128: (8192, 8)},
           "ten billion": {1: (4096, 16), 8: (4096, 32), 32: (8192, 32), 128: (8192, 8)}}
"""Global and micro-batch by the number of machines with 8 GPUs."""


_CORES = 112
"""Of a node, as NVIDIA's DGX H100 has them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    gpu: str = "h100-80gb"
    json: Path | None = None
    picture: Path | None = None


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown.

    Raises:
        SettingsError: --json or --picture cannot be written.
        DataError: a plan fails.
    """
    check_file("--json", settings.json)
    rows, plans = [], []
    for model, batches in BATCHES.items():
        for nodes in batches:
            words = _words(model, nodes, settings.gpu)
            plan, seconds = _planned(words)
            plans.append((model, plan))
            rows.append(_row(model, plan, seconds, words))
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": f"Plans for {settings.gpu}", "command": command, "machine": machine(torch.device("cpu")),
            "columns": COLUMNS, "rows": rows}, indent=1) + "\n")
    if settings.picture is not None:
        _draw(plans, settings.picture)
    return markdown(COLUMNS, rows)


def _words(model: str, nodes: int, gpu: str) -> list[str]:
    """Of vir-plan."""
    settings, name = MODELS[model]
    size, micro = BATCHES[model][nodes]
    return [*shlex.split(settings), "--deepspeed_config", name, "--nodes", str(nodes), "--gpu", gpu, "--cores",
            str(_CORES), "--train.global_batch_size", str(size), "--train.micro_batch_size", str(micro)]


def _planned(words: Sequence[str]) -> tuple[dict[str, Any], float]:
    """What a process of vir-plan writes, and the seconds that it takes from beginning to end."""
    with tempfile.TemporaryDirectory(prefix="planning-") as folder:
        file = Path(folder, "plan.json")
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "vir.plan", *words, "--json", str(file)], capture_output=True,
                              text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise DataError(f"vir-plan {shlex.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
        return json.loads(file.read_text()), seconds


def _row(model: str, plan: dict[str, Any], seconds: float, words: Sequence[str]) -> list[str]:
    world = plan["cluster"]["nodes"] * plan["cluster"]["gpus_per_node"]
    memory, wall = plan["chosen"]["memory_total"], [one / 3600 for one in plan["wall_seconds"]]
    fits = "" if plan["chosen"]["fits"] else ", too much"
    return [model, f"{plan['parameters']:,}", f"{world:,}", plan["chosen"]["name"],
            f"{plan['global_batch_size']:,} = {plan['accumulation']} x {plan['micro_batch_size']} x {world:,}",
            f"{memory / 1e9:.1f}{fits}", _between(plan["images_per_second"]), plan["bound"], _between(wall),
            _between([one * world for one in wall]), f"{100 * plan['checkpoints']['as_set']['goodput']:.1f}",
            f"{plan['traffic']['first_epoch']['downloads_per_shard']:.3f}", f"{seconds:.1f}",
            f"`vir-plan {shlex.join(words)}`"]


def _between(ends: Sequence[float]) -> str:
    low, high = (f"{end:,.0f}" if end >= 100 else f"{end:.3g}" for end in ends)
    return low if low == high else f"{low}–{high}"


def _draw(plans: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """A PNG: images/s and hours against GPUs, one line per model with the range that is estimated."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axis, (value, label, scale) in zip(figure.subplots(1, 2), (
            ("images_per_second", "images/s", 1.0), ("wall_seconds", "hours of the recipe", 3600.0))):
        for number, model in enumerate(dict.fromkeys(model for model, _ in plans)):
            points = sorted((plan["cluster"]["nodes"] * plan["cluster"]["gpus_per_node"],
                             *(end / scale for end in plan[value])) for name, plan in plans if name == model)
            gpus, low, high = zip(*points)
            axis.fill_between(gpus, low, high, alpha=0.25, color=f"C{number}")
            axis.plot(gpus, low, color=f"C{number}", label=model)
            axis.plot(gpus, high, color=f"C{number}")
        axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel=label, xticks=gpus, xticklabels=map(str, gpus))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axis.legend()
    figure.suptitle("Planned, not run: bands from the worst to the best of each estimate")
    figure.savefig(path, dpi=110)
