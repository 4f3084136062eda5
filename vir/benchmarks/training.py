"""What our training loop costs beside a bare DeepSpeed loop, what checkpoints cost, and what the average weighs.

Ours is `deepspeed --module vir.train`, the bare loop is vir/benchmarks/peer.py. Each runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from vir.benchmarks.checkpoint_size import ema_bytes, folder_bytes, newest
from vir.benchmarks.launching import DEEPSPEED, ROOT, launch
from vir.benchmarks.stopwatch import machine
from vir.benchmarks.tables import training_report
from vir.config import plan_accumulation
from vir.data.reader import ShardReader
from vir.engine import ds_config
from vir.errors import DataError, SettingsError
from vir.flags import parse
from vir.models.build import architecture
from vir.planning.images import IMAGENET
from vir.reports.metrics import read_metrics

RECIPE = ROOT / "vir" / "recipes" / "quickstart.yaml"
STAGES = ("zero0_fp32", "zero1_bf16", "zero2_fp32", "zero3_bf16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: the flags of tools/benchmark_training.py, whose --help tells each of them."""

    data: Path
    model: str | None
    ranks: int
    deepspeed_config: str
    steps: int
    log_every: int
    repeats: int
    adam: str
    ema: list[str] | None
    json: Path | None
    options: list[str]

    def __post_init__(self) -> None:
        for flag, value, least in (("ranks", self.ranks, 1), ("repeats", self.repeats, 1),
                                   ("log_every", self.log_every, 1), ("steps", self.steps, 3 * self.log_every)):
            if value < least:
                raise SettingsError(f"--{flag} is {value}; it must be at least {least}" +
                                    (", three intervals of --log_every: warm-up, timed, after a checkpoint"
                                     if flag == "steps" else ""))


def benchmark(settings: Settings, command: str) -> str:
    """Measure, and write the raw numbers where the settings ask for them; returns the report with its tables."""
    for config in settings.ema or ():
        ds_config.read(config)
    with tempfile.TemporaryDirectory(prefix="benchmark_training_") as scratch:
        sides = Sides(settings, Path(scratch))
        result: dict[str, Any] = {"command": command, "machine": _machine(), **sides.facts()}
        result["loops"] = compare(sides, settings.repeats)
        result["checkpoints"] = checkpoint_cost(result["loops"], result["global_batch_size"],
                                                folder_bytes(newest(sides.run)))
        if settings.ema is not None:
            result["ema"] = [ema_bytes(sides.short_run(config), config, settings.ranks, sides.parameters)
                             for config in settings.ema or STAGES]
    text = training_report(result)
    if settings.json:
        try:
            settings.json.write_text(json.dumps(result, indent=1))
        except OSError as error:
            raise DataError(f"cannot write --json {settings.json}: {error.strerror}; choose another path") from error
    return text


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One run of our loop, after its first interval."""

    step_seconds: list[float]
    """In each interval of `log_every` steps that no checkpoint interrupts."""
    data_wait: float
    """The share of them spent waiting for data, mean over the ranks."""
    checkpoint_seconds: list[float]
    logging_seconds: float
    """Of writing one line of metrics, which is part of the steps."""


class Sides:
    """Starts our loop and the bare one with the same settings, each in a folder of its own under `scratch`."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self._settings, self._scratch, self._started = settings, scratch, 0
        self.parameters, self.adam, self.run = 0, "", scratch
        network = (["--model.name", settings.model, "--model.args", "{}", "--model.img_size", "null"]
                   if settings.model else [])
        self._flags = ["--config", str(RECIPE), *network, "--augment.mixup", "0.8", "--augment.cutmix", "1.0",
                       "--schedule.warmup_epochs", "0", "--eval.every_epochs", "1e6",
                       # Written beside training a checkpoint would be in the steps that are timed.
                       "--checkpoint.asynchronous", "false", "--checkpoint.every_minutes", "null", *settings.options,
                       "--data.train", str(settings.data / "train"), "--data.val", str(settings.data / "val")]
        self.config = parse([*self._flags, "--deepspeed_config", settings.deepspeed_config, "--output", str(scratch)])
        self._zero = ds_config.read(settings.deepspeed_config)
        if not timm.is_model(name := self.config.model.name):
            raise SettingsError(f"--model is {name!r}; timm.list_models() tells all names, vir_* are ours")
        train = ShardReader(settings.data / "train")
        self._images, self._classes = len(train), len(train.classes)
        self._batch = self.config.train.global_batch_size
        self._accumulation = plan_accumulation(self._batch, self.config.train.micro_batch_size, settings.ranks)

    def facts(self) -> dict[str, Any]:
        """What is measured: model, batch, ranks and the like."""
        config = self.config
        return {"model": config.model.name, "ranks": self._settings.ranks,
                "zero": Path(self._settings.deepspeed_config).stem,
                "global_batch_size": self._batch, "micro_batch_size": config.train.micro_batch_size,
                "loader_processes_per_rank": config.data.workers, "ema_decay": config.ema.decay,
                "steps": self._settings.steps, "log_every": self._settings.log_every,
                "cores": len(os.sched_getaffinity(0))}

    def bare(self) -> list[float]:
        """Seconds of a step of the bare loop, in each interval after the first."""
        folder, config, optim = self._folder(), self.config, self.config.optim
        model_args = {**architecture(config.model, self._classes), "drop_path_rate": config.model.drop_path_rate}
        side = config.model.img_size
        adam = {"lr": optim.peak_lr(self._batch), "betas": optim.betas, "eps": optim.eps,
                "weight_decay": optim.weight_decay, "torch_adam": self._settings.adam == "torch"}
        settings = {
            "model": config.model.name, "model_args": model_args, "retention_mode": config.model.retention_mode,
            "chunk_size": config.model.chunk_size, "input_size": side and (3, side, side),
            "steps": self._settings.steps, "log_every": self._settings.log_every, "deepspeed": {
                **self._zero, "train_batch_size": self._batch,
                "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
                "gradient_accumulation_steps": self._accumulation, "gradient_clipping": optim.clip_grad,
                "optimizer": {"type": "AdamW", "params": adam}}}
        (folder / "settings.json").write_text(json.dumps(settings))
        self._launch(["--module", "vir.benchmarks.peer", str(folder / "settings.json")])
        measured = json.loads((folder / "times.json").read_text())
        self.parameters, self.adam, times = measured["parameters"], measured["optimizer"], measured["times"]
        return [(end - begin) / self._settings.log_every for begin, end in zip(times, times[1:])]

    def ours(self) -> Ours:
        """Our loop, with a checkpoint after every other interval."""
        every, images = self._settings.log_every, self._settings.log_every * self._batch
        folder = self.run = self._train(self._settings.deepspeed_config, self._settings.steps, every,
                                        "--checkpoint.every_epochs", repr(2 * images / self._images))
        timed: list[tuple[float, dict[str, Any]]] = []
        paused: list[tuple[float, dict[str, Any]]] = []
        events = [event for event in train_events(folder) if event["step"] % every == 0]
        for before, after in zip(events, events[1:]):
            saved_between = before["step"] % (2 * every) == 0
            (paused if saved_between else timed).append((after["time"] - before["time"], after))
        # images_per_second leaves what happens between two intervals out, their distance in time does not.
        logging = statistics.median(seconds - images / event["images_per_second"] for seconds, event in timed)
        waited = sum(seconds * event["data_wait"] for seconds, event in timed)
        return Ours(step_seconds=[seconds / every for seconds, _ in timed],
                    data_wait=waited / sum(seconds for seconds, _ in timed), logging_seconds=logging,
                    checkpoint_seconds=[seconds - images / event["images_per_second"] - logging
                                        for seconds, event in paused])

    def short_run(self, config: str) -> Path:
        """The folder of two steps under another DeepSpeed config, with an average of the weights."""
        same = ds_config.locate(config).resolve() == ds_config.locate(self._settings.deepspeed_config).resolve()
        if self.config.ema.decay and same:
            return self.run
        return self._train(config, 2, 1, *([] if self.config.ema.decay else ["--ema.decay", "0.99"]))

    def _train(self, config: str, steps: int, log_every: int, *more: str) -> Path:
        folder = self._folder()
        epochs = (steps - 0.5) * self._batch / self._images  # a run ends with the step that reaches them
        self._launch(["--module", "vir.train", *self._flags, "--deepspeed_config", config, "--train.epochs",
                      repr(epochs), "--train.log_every", str(log_every), "--output", str(folder), *more])
        return folder

    def _folder(self) -> Path:
        self._started += 1
        folder = self._scratch / f"{self._started:02d}"
        folder.mkdir()
        return folder

    def _launch(self, words: list[str]) -> None:
        """Run words under the deepspeed launcher on the ranks of the command line."""
        launch(DEEPSPEED, self._settings.ranks, words, "change its settings after `--`")


def compare(sides: Sides, repeats: int) -> dict[str, Any]:
    """Both loops in turns; a turn's ratio compares what the machine did within a minute or so."""
    turns: list[dict[str, Any]] = []
    for repeat in range(repeats):
        others = _busy_cores()
        if repeat % 2:
            ours, bare = sides.ours(), sides.bare()
        else:
            bare, ours = sides.bare(), sides.ours()
        waited = ours.data_wait
        bare_ms, ours_ms = 1e3 * statistics.median(bare), 1e3 * statistics.median(ours.step_seconds)
        turns.append({"bare_ms": bare_ms, "ours_ms": ours_ms, "data_wait": waited, "overhead": ours_ms / bare_ms - 1,
                      "others_cores": max(others, _busy_cores()),
                      "overhead_without_wait": ours_ms * (1 - waited) / bare_ms - 1,
                      "bare_intervals_ms": [1e3 * one for one in bare],
                      "ours_intervals_ms": [1e3 * one for one in ours.step_seconds],
                      "logging_seconds": ours.logging_seconds, "checkpoint_seconds": ours.checkpoint_seconds})
        print(f"turn {repeat + 1} of {repeats}: bare {bare_ms:.4g} ms, ours {ours_ms:.4g} ms, of which waiting for "
              f"data {100 * waited:.1f} %; others kept {turns[-1]['others_cores']:.1f} cores busy",
              file=sys.stderr, flush=True)
    medians = {name: statistics.median(turn[name] for turn in turns)
               for name in ("bare_ms", "ours_ms", "data_wait", "overhead", "overhead_without_wait")}
    return {**medians, "parameters": sides.parameters, "peer_optimizer": sides.adam, "turns": turns}


def checkpoint_cost(loops: dict[str, Any], global_batch_size: int, size: int) -> dict[str, Any]:
    """Seconds and bytes of a checkpoint, and its share of the time when saved after each epoch of ImageNet-1k."""
    seconds = [one for turn in loops["turns"] for one in turn["checkpoint_seconds"]]
    took, rate = statistics.median(seconds), global_batch_size * 1e3 / loops["ours_ms"]
    return {"seconds": seconds, "median_seconds": took, "bytes": size, "images_per_second": rate,
            "epoch_seconds": IMAGENET / rate, "share": took / (took + IMAGENET / rate)}


def train_events(run: Path) -> list[dict[str, Any]]:
    """What a run has logged about its training steps."""
    return [event for event in read_metrics(run) if event["kind"] == "train"]


def _busy_cores(seconds: float = 1.0) -> float:
    """How many cores are at work now, when this tool is not: a turn beside other programs tells little."""
    def ticks() -> list[int]:
        return [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]

    before = ticks()
    time.sleep(seconds)
    user, nice, system, idle, waiting, *rest = (after - one for one, after in zip(before, ticks()))
    return (user + nice + system + sum(rest)) / (seconds * os.sysconf("SC_CLK_TCK"))


def _machine() -> str:
    torch.set_num_threads(1)  # as each rank has
    return machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
