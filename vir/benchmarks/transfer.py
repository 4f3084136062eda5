"""What beginning from weights, and a teacher, give: accuracy beside the same training without them, seed by seed.

Each row is `python -m vir.train` with vir/recipes/quickstart.yaml in a process of its own, evaluated at its end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vir.benchmarks.program import check_folder
from vir.benchmarks.stopwatch import device, machine
from vir.benchmarks.tables import markdown
from vir.benchmarks.training import RECIPE
from vir.checkpoints.consolidate import consolidate
from vir.errors import DataError, SettingsError
from vir.files import replace_text
from vir.output_folder import check_file
from vir.reports.metrics import read_metrics

PARTS = ("all", "few", "distilled")
"""Digits to clothes with all images, and with few; with a teacher."""
PER_CLASS = 20
"""Images of each class where they are few."""

_COLUMNS = ("training images", "training", "top-1 % of each seed", "mean", "more than without it")
_ARGS = {"patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 2}
_ALIKE = ("--deepspeed_config", "zero0_fp32", "--train.global_batch_size", "100", "--train.micro_batch_size", "100",
          "--eval.every_epochs", "100000", "--eval.batch_size", "500", "--checkpoint.every_epochs", "100000",
          "--ema.decay", "0", "--augment.hflip", "0.5", "--augment.scale", "[0.75, 1]", "--augment.ratio",
          "[0.75, 1.3333333333333333]", "--optim.name", "adamw", "--model.args",
          json.dumps(_ARGS))
"""Settings of every row, whatever the recipe of the quick start becomes. Clothes need more augmentation than digits."""
_PROBE = ("--train.linear_probe", "true", "--augment.scale", "[1, 1]", "--augment.hflip", "0", "--optim.lr", "1e-2",
          "--optim.weight_decay", "0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: the flags of tools/benchmark_transfer.py, whose --help tells each of them."""

    digits: Path
    fashion: Path
    folder: Path
    parts: Sequence[str] = ()
    """Of PARTS; all of them where none is named."""
    seeds: int = 3
    scale: float = 1.0
    json: Path | None = None


Flags = Mapping[int, Sequence[str]]
"""Of each seed."""


class _Runs:
    """Runs vir.train in a folder.

    Args:
        scale: share of the steps that are done.
    """

    def __init__(self, place: Path, scale: float) -> None:
        self._place, self._scale = place, scale

    def steps(self, number: int) -> int:
        return max(round(self._scale * number), 2)

    def top1(self, name: str, seed: int, steps: int, train: Path, val: Path, *flags: str) -> float:
        """Accuracy in percent at the end of a run. Raises DataError where it fails."""
        output = self._place / f"{name}-{seed}"
        command = [sys.executable, "-m", "vir.train", "--config", RECIPE, *_ALIKE, "--data.train", train, "--data.val",
                   val, "--train.steps", self.steps(steps), "--train.seed", seed, "--output", output, *flags]
        done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        if done.returncode:
            raise DataError(f"{name} with seed {seed} ended with code {done.returncode}:\n{done.stdout[-2000:]}")
        return float([event for event in read_metrics(output) if event["kind"] == "eval"][-1]["top1"])

    def weights(self, name: str, seed: int) -> Path:
        """The weights of that run, in one file."""
        path = self._place / f"{name}-{seed}.safetensors"
        consolidate(self._place / f"{name}-{seed}", path)
        return path


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown.

    Raises:
        SettingsError, DataError: numbers that are too small, no such images, a run that failed.
    """
    if settings.seeds < 1 or not 0 < settings.scale <= 1:
        raise SettingsError(f"--seeds {settings.seeds} must be at least 1, and --scale {settings.scale:g} more than 0 "
                            "and at most 1")
    for flag, source in (("digits", settings.digits), ("fashion", settings.fashion)):
        if missing := [split for split in ("train", "val") if not (source / split).is_dir()]:
            raise DataError(f"--{flag} {source} has no folder {missing[0]}; python tools/make_demo_dataset.py makes it")
    check_folder(settings.folder)
    check_file("--json", settings.json)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=settings.folder) as place:
        rows = list(_rows(settings, _Runs(Path(place), settings.scale), Path(place)))
    if settings.json is not None:
        replace_text(settings.json, json.dumps({
            "title": "Accuracy on Fashion-MNIST with what was learned before, and without it", "command": command,
            "machine": machine(device()), "columns": _COLUMNS,
            "rows": rows}, indent=1) + "\n")
    return markdown(_COLUMNS, rows)


def _rows(settings: Settings, runs: _Runs, place: Path) -> Iterator[Sequence[str]]:
    """Part by part, each beginning with what the row or rows below it are compared with."""
    parts, seeds, source = settings.parts or PARTS, range(settings.seeds), settings.fashion
    everything = dict.fromkeys(seeds, source / "train")
    scratch: Flags = dict.fromkeys(seeds, ("--optim.lr", "1e-3"))
    if "all" in parts or "few" in parts:
        for seed in seeds:
            runs.top1("digits", seed, 800, settings.digits / "train", settings.digits / "val", "--optim.lr", "3e-3",
                      "--augment.hflip", "0")
        digits = {seed: ("--model.init_from", str(runs.weights("digits", seed))) for seed in seeds}
        tuned = {seed: (*scratch[seed], *digits[seed]) for seed in seeds}
    if "all" in parts:
        yield from _part("all images", 150, everything, source / "val", runs, {
            "from scratch": scratch, "fine-tuned from digits": tuned})
    if "few" in parts:
        few = {seed: some_of(source / "train", PER_CLASS, seed, place / f"few-{seed}") for seed in seeds}
        yield from _part(f"{PER_CLASS} a class", 150, few, source / "val", runs, {
            "from scratch": scratch, "fine-tuned from digits": tuned})
        yield from _part(f"{PER_CLASS} a class", 150, few, source / "val", runs, {
            "linear probe on random weights": dict.fromkeys(seeds, _PROBE),
            "linear probe on digits": {seed: (*_PROBE, *digits[seed]) for seed in seeds}})
    if "distilled" in parts:
        runs.top1("teacher", 0, 2000, source / "train", source / "val", "--optim.lr", "2e-3")
        teacher = ("--distill.teacher", str(runs.weights("teacher", 0)))
        args = {**_ARGS, "distilled": True}
        kinds = {"soft": ("--distill.temperature", "3"), "hard": (), "token": ("--model.args", json.dumps(args))}
        yield from _part("all images", 300, everything, source / "val", runs, {"plain": scratch, **{
            f"distilled, {kind}": {seed: (*scratch[seed], *teacher, "--distill.kind", kind, *more) for seed in seeds}
            for kind, more in kinds.items()}})


def _part(title: str, steps: int, train: Mapping[int, Path], val: Path, runs: _Runs,
          trainings: Mapping[str, Flags]) -> list[tuple[str, ...]]:
    """Rows of trainings alike but for their flags."""
    found = {kind: [runs.top1(f"{title}, {steps}, {kind}".replace(" ", "_"), seed, steps, folder, val,
                              *flags[seed]) for seed, folder in train.items()] for kind, flags in trainings.items()}
    return compared(f"{title}, {runs.steps(steps)} steps", found)


def compared(title: str, found: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    """A row for each kind of training: its accuracies, their mean, and how much more each has than that of the first
    kind with the same seed."""
    first = next(iter(found.values()))
    rows: list[tuple[str, ...]] = []
    for kind, values in found.items():
        more = [value - before for value, before in zip(values, first)]
        rows.append((title, kind, ", ".join(f"{value:.1f}" for value in values), f"{statistics.mean(values):.1f}",
                     "" if values is first else f"{statistics.mean(more):+.1f} ({min(more):+.1f} to {max(more):+.1f})"))
    return rows


def some_of(folder: Path, per_class: int, seed: int, output: Path) -> Path:
    """A folder with so many images of each class, drawn by the seed."""
    for of_class in sorted(folder.iterdir()):
        images = sorted(of_class.iterdir())
        (output / of_class.name).mkdir(parents=True)
        for image in random.Random(seed).sample(images, min(per_class, len(images))):
            shutil.copy(image, output / of_class.name)
    return output
