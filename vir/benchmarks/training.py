"""What our training loop costs beside bare loops, what checkpoints cost, and what the average of the weights weighs.

Ours is `deepspeed --module vir.train`; the bare loops are vir/benchmarks/peer.py and peer_torch.py. Each runs in
processes of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from vir.benchmarks.checkpoint_size import ema_bytes, folder_bytes, newest
from vir.benchmarks.launching import DEEPSPEED, TORCHRUN, launch
from vir.benchmarks.stopwatch import device, machine
from vir.benchmarks.tables import training_report
from vir.config import plan_accumulation
from vir.data.loader import processes_for
from vir.data.reader import ShardReader
from vir.engine import ds_config
from vir.errors import DataError, SettingsError
from vir.flags import parse
from vir.models.build import architecture
from vir.planning.images import IMAGENET
from vir.reports.metrics import read_metrics

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
STAGES = ("zero0_fp32", "zero1_bf16", "zero2_fp32", "zero3_bf16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: the flags of tools/benchmark_training.py, whose --help tells each of them."""

    data: Path
    model: str | None
    ranks: list[int]
    deepspeed_config: str
    steps: int
    log_every: int
    repeats: int
    adam: str
    loading: bool
    ema: list[str] | None
    json: Path | None
    options: list[str]

    def __post_init__(self) -> None:
        if len(set(self.ranks)) < len(self.ranks):
            raise SettingsError(f"--ranks {' '.join(map(str, self.ranks))} names a number twice; name each once")
        for flag, value, least in (("ranks", min(self.ranks), 1), ("repeats", self.repeats, 1),
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
        of_ranks = [Sides(settings, ranks, Path(scratch)) for ranks in settings.ranks]
        result = {"title": "Our loop beside bare ones", "command": command, "machine": _machine(),
                  "cores": len(os.sched_getaffinity(0)), "runs": [_measure(settings, sides) for sides in of_ranks]}
    text = training_report(result)
    if settings.json:
        try:
            settings.json.write_text(json.dumps(result, indent=1))
        except OSError as error:
            raise DataError(f"cannot write --json {settings.json}: {error.strerror}; choose another path") from error
    return text


def _measure(settings: Settings, sides: Sides) -> dict[str, Any]:
    """All that is asked for on one number of ranks."""
    loops = compare(sides, settings.repeats)
    run = {**sides.facts(), "loops": loops,
           "checkpoints": checkpoint_cost(loops, sides.batch, folder_bytes(newest(sides.run)))}
    if settings.ema is not None:
        run["ema"] = [ema_bytes(sides.short_run(config), config, sides.ranks, sides.parameters)
                      for config in settings.ema or STAGES]
    return run


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What steps of one loop took, after its first interval."""

    seconds: list[float]
    """Of a step, in each interval of `log_every` steps; of our loop, in those that no checkpoint interrupts."""
    trainer_cpu: float
    """CPU seconds of a step in the process that trains, mean over the ranks."""
    loader_cpu: float
    """In the loader processes of a rank. Of ours: in making batches, without handing them over."""
    data_wait: float | None = None
    """The share of our steps spent waiting for data, mean over the ranks."""
    checkpoint_seconds: list[float] = field(default_factory=list)
    logging_seconds: float = 0.0
    """Of writing one line of metrics, which is part of our steps."""


class Sides:
    """Starts each loop with the same settings on so many ranks, each in a folder of its own under `scratch`.

    The micro-batches of a rank's step are as many on each number of ranks as on the first of the settings'.
    """

    def __init__(self, settings: Settings, ranks: int, scratch: Path) -> None:
        self._settings, self.ranks, self._scratch, self._started = settings, ranks, scratch / f"{ranks}", 0
        self._scratch.mkdir(exist_ok=True)
        self.parameters, self.adam, self.run = 0, "", scratch
        network = (["--model.name", settings.model, "--model.args", "{}", "--model.img_size", "null"]
                   if settings.model else [])
        self._flags = ["--config", str(RECIPE), *network, "--augment.mixup", "0.8", "--augment.cutmix", "1.0",
                       "--optim.name", "adamw",  # as the peers have it
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
        batch, micro_batch = self.config.train.global_batch_size, self.config.train.micro_batch_size
        self._accumulation = plan_accumulation(batch, micro_batch, settings.ranks[0])
        self.batch = self._accumulation * micro_batch * ranks

    def facts(self) -> dict[str, Any]:
        """What is measured: model, batch, ranks and the like."""
        config = self.config
        return {"model": config.model.name, "ranks": self.ranks, "zero": Path(self._settings.deepspeed_config).stem,
                "global_batch_size": self.batch, "micro_batch_size": config.train.micro_batch_size,
                "loader_processes_per_rank": processes_for(config.data.workers), "ema_decay": config.ema.decay,
                "steps": self._settings.steps, "log_every": self._settings.log_every}

    @property
    def loops(self) -> dict[str, Callable[[], Steps]]:
        """What takes turns, by name."""
        loading = {"torch_loading": lambda: self._bare_torch(loads=True)} if self._settings.loading else {}
        return {"deepspeed": self._bare_deepspeed, "torch": lambda: self._bare_torch(loads=False), **loading,
                "ours": self.ours}

    def _bare_deepspeed(self) -> Steps:
        optim = self.config.optim
        adam = {**self._adam(), "torch_adam": self._settings.adam == "torch"}
        return self._bare(DEEPSPEED, "vir.benchmarks.peer", {"deepspeed": {
            **self._zero, "train_batch_size": self.batch,
            "train_micro_batch_size_per_gpu": self.config.train.micro_batch_size,
            "gradient_accumulation_steps": self._accumulation, "gradient_clipping": optim.clip_grad,
            "optimizer": {"type": "AdamW", "params": adam}}})

    def _bare_torch(self, loads: bool) -> Steps:
        """Args: loads: it reads the shards, else it has one batch in memory."""
        config, augment = self.config, self.config.augment
        loading = {
            "train": str(self._settings.data / "train"), "workers": processes_for(config.data.workers),
            "transform": {"scale": augment.scale, "ratio": augment.ratio, "hflip": augment.hflip,
                          "color_jitter": augment.color_jitter or None, "auto_augment": augment.auto_augment,
                          "interpolation": augment.interpolation, "re_prob": augment.reprob,
                          "re_mode": augment.remode},
            "mixup": augment.mixes and {
                "mixup_alpha": augment.mixup, "cutmix_alpha": augment.cutmix, "prob": augment.mixup_prob,
                "switch_prob": augment.mixup_switch_prob, "mode": "pair", "label_smoothing": config.train.smoothing}}
        return self._bare(TORCHRUN, "vir.benchmarks.peer_torch", {
            "adam": self._adam(), "clip_grad": config.optim.clip_grad, "accumulation": self._accumulation,
            "micro_batch_size": config.train.micro_batch_size, "precision": ds_config.precision(self._zero),
            "loading": loading if loads else None})

    def _adam(self) -> dict[str, Any]:
        optim = self.config.optim
        return {"lr": optim.peak_lr(self.batch), "betas": optim.betas, "eps": optim.eps,
                "weight_decay": optim.weight_decay}

    def _bare(self, launcher: list[str], module: str, more: dict[str, Any]) -> Steps:
        folder, model, every = self._folder(), self.config.model, self._settings.log_every
        side = model.img_size
        (folder / "settings.json").write_text(json.dumps({
            "model": model.name, "retention_mode": model.retention_mode, "chunk_size": model.chunk_size,
            "model_args": {**architecture(model, self._classes), "drop_path_rate": model.drop_path_rate},
            "input_size": side and (3, side, side), "steps": self._settings.steps, "log_every": every, **more}))
        self._launch(launcher, ["--module", module, str(folder / "settings.json")])
        measured = json.loads((folder / "times.json").read_text())
        self.parameters = measured["parameters"]
        if launcher is DEEPSPEED:
            self.adam = measured["optimizer"]
        seconds, trainer, loader = ([(end - begin) / every for begin, end in zip(measured[name], measured[name][1:])]
                                    for name in ("times", "trainer_cpu", "loader_cpu"))
        return Steps(seconds=seconds, trainer_cpu=statistics.mean(trainer), loader_cpu=statistics.mean(loader))

    def ours(self) -> Steps:
        """Our loop, with a checkpoint after every other interval."""
        every, images = self._settings.log_every, self._settings.log_every * self.batch
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
        trainer, loader = (statistics.mean(event[name] / every for _, event in timed)
                           for name in ("trainer_cpu_seconds", "loader_cpu_seconds"))
        return Steps(seconds=[seconds / every for seconds, _ in timed], trainer_cpu=trainer, loader_cpu=loader,
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
        epochs = (steps - 0.5) * self.batch / self._images  # a run ends with the step that reaches them
        self._launch(DEEPSPEED, [
            "--module", "vir.train", *self._flags, "--deepspeed_config", config, "--train.global_batch_size",
            str(self.batch), "--train.epochs", repr(epochs), "--train.log_every", str(log_every), "--output",
            str(folder), *more])
        return folder

    def _folder(self) -> Path:
        self._started += 1
        folder = self._scratch / f"{self._started:02d}"
        folder.mkdir()
        return folder

    def _launch(self, launcher: list[str], words: list[str]) -> None:
        launch(launcher, self.ranks, words, "change its settings after `--`")


def compare(sides: Sides, repeats: int) -> dict[str, Any]:
    """All loops in turns, each turn beginning with another one; what a turn compares the machine did within a minute or
    so."""
    turns: list[dict[str, Any]] = []
    loops = list(sides.loops.items())
    for repeat in range(repeats):
        others, first = _busy_cores(), repeat % len(loops)
        steps = {name: measure() for name, measure in [*loops[first:], *loops[:first]]}
        turns.append({"others_cores": max(others, _busy_cores()),
                      "loops": {name: {"ms": 1e3 * statistics.median(steps[name].seconds), **asdict(steps[name])}
                                for name, _ in loops}})
        said = ", ".join(f"{name} {loop['ms']:.4g} ms" for name, loop in turns[-1]["loops"].items())
        print(f"turn {repeat + 1} of {repeats} on {sides.ranks} ranks: {said}; others kept "
              f"{turns[-1]['others_cores']:.1f} cores busy", file=sys.stderr, flush=True)
    return {"parameters": sides.parameters, "peer_optimizer": sides.adam, "turns": turns}


def checkpoint_cost(loops: dict[str, Any], global_batch_size: int, size: int) -> dict[str, Any]:
    """Seconds and bytes of a checkpoint, and its share of the time when saved after each epoch of ImageNet-1k."""
    ours = [turn["loops"]["ours"] for turn in loops["turns"]]
    seconds = [one for loop in ours for one in loop["checkpoint_seconds"]]
    took, rate = statistics.median(seconds), global_batch_size * 1e3 / statistics.median(loop["ms"] for loop in ours)
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
    return machine(device())
