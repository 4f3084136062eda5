"""Accuracy of several models at equal budget on the same images, with several seeds, and paired tests between them.

Each run is `vir.train` in a process of one thread, as many at once as there are cores. What a run came to is kept in a
file of its own, so that the whole can be made in several sittings; a run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch

from vir.benchmarks.launching import call
from vir.benchmarks.plot import plot_learning
from vir.benchmarks.stopwatch import device, machine
from vir.benchmarks.tables import accuracy_table
from vir.errors import DataError, SettingsError
from vir.files import replace_text
from vir.output_folder import check_file, writing

MODELS = {"ViR-tiny, 1-D": "vir_tiny_patch16_224", "ViR-tiny, 2-D": "vir2d_tiny_patch16_224",
          "official formulation": "official_tiny_patch16_224", "ViT-tiny (timm)": "vit_tiny_patch16_224"}
"""The others are compared with the first."""
SETS = {"fashion": ("Fashion-MNIST", 28), "cifar": ("CIFAR-10", 32)}
"""By flag: title, and pixels of a side."""

_ARGS = {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
"""Tiny at half its width and half its depth, so that two cores can train it."""
_BATCH = 64
_EVALUATIONS = 3
"""Of a run, its end among them."""
_ALIKE = (
    "--deepspeed_config", "zero0_fp32", "--model.args", json.dumps(_ARGS), "--model.crop_pct", "1",
    "--data.workers", "1", "--augment.scale", "[.75, 1]", "--augment.hflip", ".5", "--augment.color_jitter", "0",
    "--augment.auto_augment", "null", "--augment.interpolation", "bilinear", "--augment.reprob", "0",
    "--augment.mixup", "0", "--augment.cutmix", "0", "--train.global_batch_size", str(_BATCH),
    "--train.micro_batch_size", str(_BATCH), "--train.smoothing", ".1", "--optim.lr", "1e-3", "--ema.decay", ".99",
    "--eval.batch_size", "64", "--checkpoint.every_epochs", "100000", "--checkpoint.best", "null",
    "--checkpoint.keep", "1")
"""Settings of every run."""
_TRAIN = "import vir.benchmarks.official; from vir.train import command; raise SystemExit(command())"
"""As python -m vir.train, which knows no models beside ours and timm's."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: the flags of tools/benchmark_accuracy.py, whose --help tells each of them."""

    fashion: Path | None
    cifar: Path | None
    folder: Path
    seeds: int
    epochs: float
    json: Path | None
    plot: Path | None


@dataclass(frozen=True)
class Run:
    """One training."""

    data: Path
    title: str
    side: int
    model: str
    seed: int
    epochs: float

    @property
    def name(self) -> str:
        return f"{self.title.lower()}-{MODELS[self.model]}-{self.seed}"

    @property
    def flags(self) -> list[str]:
        warmup, every = self.epochs / 10, self.epochs / _EVALUATIONS
        return [*_ALIKE, "--model.name", MODELS[self.model], "--model.img_size", str(self.side),
                "--data.train", str(self.data / "train"), "--data.val", str(self.data / "val"),
                "--train.seed", str(self.seed), "--train.epochs", f"{self.epochs:g}",
                "--schedule.warmup_epochs", f"{warmup:g}", "--eval.every_epochs", f"{every:g}"]


def benchmark(settings: Settings, command: str) -> str:
    """The table, in Markdown, when all runs are done.

    Raises:
        SettingsError, DataError: numbers that are too small, no such images, a run that failed or was stopped.
    """
    _check(settings)
    here = device()
    torch.set_num_threads(1)  # as each run has
    runs = list(_runs(settings))
    with ThreadPoolExecutor(1 if here.type == "cuda" else len(os.sched_getaffinity(0))) as several:
        ended = Event()
        futures = [several.submit(_done, run, settings.folder, ended) for run in runs]
        try:
            found = [future.result() for future in futures]
        except BaseException:
            several.shutdown(wait=False, cancel_futures=True)
            ended.set()  # they end by a signal, which they go on from
            raise
    result = {"title": f"Accuracy after {settings.epochs:g} epochs, batches of {_BATCH}, {settings.seeds} seeds",
              "command": command, "machine": machine(here), "accuracy": found, "pairs": _pairs(found)}
    if settings.json is not None:
        replace_text(settings.json, json.dumps({**result, "accuracy": [_without_images(one) for one in found]}) + "\n")
    if settings.plot is not None:
        plot_learning(found, settings.plot, str(result["title"]))
    return accuracy_table(result)


def _check(settings: Settings) -> None:
    if settings.seeds < 1 or settings.epochs <= 0:
        raise SettingsError(f"--seeds {settings.seeds} must be at least 1, and --epochs {settings.epochs:g} above 0")
    if settings.fashion is None and settings.cifar is None:
        raise SettingsError("nothing to train on: give --fashion, --cifar, or both")
    for flag in SETS:
        source = getattr(settings, flag)
        if source and (missing := [split for split in ("train", "val") if not (source / split).is_dir()]):
            raise DataError(f"--{flag} {source} has no folder {missing[0]}; the head of tools/benchmark_accuracy.py "
                            "tells how it is made")
    check_file("--json", settings.json)
    check_file("--plot", settings.plot)
    with writing(settings.folder):
        settings.folder.mkdir(parents=True, exist_ok=True)


def _runs(settings: Settings) -> Iterator[Run]:
    """Seed by seed, so that models that are compared run beside each other, and what is cut short can be compared."""
    for (flag, (title, side)), seed, model in itertools.product(SETS.items(), range(settings.seeds), MODELS):
        if source := getattr(settings, flag):
            yield Run(source, title, side, model, seed, settings.epochs)


def _done(run: Run, folder: Path, ended: Event) -> dict[str, Any]:
    """What the run came to; it is trained and evaluated unless that was done before."""
    path, output = folder / f"{run.name}.json", folder / run.name
    if path.exists():
        return _kept(path, run)
    _call(["-c", _TRAIN, *run.flags, "--output", str(output)], run, output, ended)
    judged = output / "judged.json"
    _call(["-m", "vir.benchmarks.accuracy_run", str(output), str(run.data / "val"), str(judged)], run, output, ended)
    found = {"data": run.title, "model": run.model, "seed": run.seed, "flags": run.flags,
             **json.loads(judged.read_text())}
    replace_text(path, json.dumps(found) + "\n")
    print(f"{run.name}: {found['ema']['top1']:.2f} %, {found['images_per_second']:.0f} images/s", file=sys.stderr,
          flush=True)
    return found


def _kept(path: Path, run: Run) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        flags = found["flags"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); remove it, and its run is judged again") from error
    if flags != run.flags:
        raise SettingsError(f"{path} was made with other settings: {shlex.join(flags)}; give another --folder, or "
                            "remove it and the run folder beside it")
    return dict(found)


def _call(words: Sequence[str], run: Run, output: Path, ended: Event) -> None:
    code, said = call([sys.executable, *words], ended)
    if code:
        raise DataError(f"{run.name} ended with code {code}; the same command goes on, or begins this run "
                        f"anew when {output} is removed. It said:\n{said[-2000:]}")


def _pairs(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each two models, by seed: the images that one has right and the other has not, by the average of weights."""
    pairs = []
    for first, second in itertools.combinations(found, 2):
        if (first["data"], first["seed"]) == (second["data"], second["seed"]):
            one, other = (int(run["ema"]["right"], 16) for run in (first, second))
            pairs.append({"data": first["data"], "seed": first["seed"], "first": first["model"],
                          "second": second["model"], "only_first": (one & ~other).bit_count(),
                          "only_second": (other & ~one).bit_count()})
    return pairs


def _without_images(run: dict[str, Any]) -> dict[str, Any]:
    """Ten thousand answers are no table; `pairs` has what follows from them."""
    judged = {name: {key: value for key, value in run[name].items() if key != "right"} for name in ("raw", "ema")}
    return {**run, **judged}
