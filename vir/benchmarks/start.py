"""From a command to the first step of training, new and resumed, beside a bare DeepSpeed script."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import timm

from vir.benchmarks.launching import DEEPSPEED, launch
from vir.benchmarks.stopwatch import device, machine
from vir.benchmarks.tables import start_table
from vir.benchmarks.training import RECIPE
from vir.data.reader import ShardReader
from vir.engine import ds_config
from vir.errors import SettingsError
from vir.files import replace_text
from vir.flags import parse
from vir.models.build import architecture
from vir.output_folder import check_file
from vir.reports.metrics import read_metrics


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: the flags of tools/benchmark_start.py, whose --help tells each of them."""

    data: Path
    model: str
    micro_batch_size: int
    ranks: int
    deepspeed_config: str
    repeats: int
    json: Path | None

    def __post_init__(self) -> None:
        for flag in ("micro_batch_size", "ranks", "repeats"):
            if (value := getattr(self, flag)) < 1:
                raise SettingsError(f"--{flag} is {value}; it must be at least 1")


def benchmark(settings: Settings, command: str) -> str:
    """Measure in turns, and write the raw numbers where the settings ask for them; returns the report."""
    if not timm.is_model(settings.model):
        raise SettingsError(f"--model is {settings.model!r}; timm.list_models() tells all names, vir_* are ours")
    check_file("--json", settings.json)
    with tempfile.TemporaryDirectory(prefix="benchmark_start_") as scratch:
        sides = Sides(settings, Path(scratch))
        sides.bare()  # compiles what is compiled once, and brings the libraries into memory
        turns = [sides.turn(number) for number in range(settings.repeats)]
    start = {"model": settings.model, "ranks": settings.ranks, "zero": Path(settings.deepspeed_config).stem,
             "turns": turns}
    here = machine(device())
    result = {"title": "From a command to the first step", "command": command, "machine": here, "start": start}
    if settings.json is not None:
        replace_text(settings.json, json.dumps(result, indent=1) + "\n")
    return f"{here}\n\n{start_table(start)}"


class Sides:
    """Starts each side in a folder of its own under `scratch`."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self._settings, self._scratch, self._started = settings, scratch, 0
        batch = settings.micro_batch_size * settings.ranks
        self._flags = ["--config", str(RECIPE), "--model.name", settings.model, "--model.args", "{}",
                       "--model.img_size", "null", "--optim.name", "adamw", "--train.global_batch_size", str(batch),
                       "--train.micro_batch_size", str(settings.micro_batch_size), "--train.log_every", "1",
                       "--schedule.warmup_epochs", "0", "--eval.every_epochs", "1e6",
                       "--checkpoint.every_minutes", "null", "--data.train", str(settings.data / "train"),
                       "--deepspeed_config", settings.deepspeed_config]
        self.config = parse([*self._flags, "--output", str(scratch)])
        self._classes = len(ShardReader(settings.data / "train").classes)

    def turn(self, number: int) -> dict[str, dict[str, float]]:
        """Seconds of the phases of each side; they begin in another order each time, a resume after a new run."""
        if number % 2:
            turn = {**self.ours(), "bare": self.bare()}
        else:
            turn = {"bare": self.bare(), **self.ours()}
        said = ", ".join(f"{side} {sum(seconds.values()):.2f} s" for side, seconds in turn.items())
        print(f"turn {number + 1} of {self._settings.repeats}: {said}", file=sys.stderr, flush=True)
        return turn

    def bare(self) -> dict[str, float]:
        """Of the bare DeepSpeed script."""
        folder, config = self._folder(), self.config
        batch = config.train.global_batch_size
        settings = {
            "model": config.model.name, "model_args": architecture(config.model, self._classes), "steps": 1,
            "retention_mode": config.model.retention_mode, "chunk_size": config.model.chunk_size, "input_size": None,
            "log_every": 1, "deepspeed": {
                **ds_config.read(self._settings.deepspeed_config), "train_batch_size": batch,
                "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
                "optimizer": {"type": "AdamW", "params": {"lr": config.optim.peak_lr(batch), "torch_adam": True}}}}
        (folder / "settings.json").write_text(json.dumps(settings))
        began = self._launch(["--module", "vir.benchmarks.peer", str(folder / "settings.json")])
        measured = json.loads((folder / "times.json").read_text())["startup"]
        return {"launcher": measured["process_began"] - began, **measured["seconds"]}

    def ours(self) -> dict[str, dict[str, float]]:
        """Of a new run of one step, and of the same that goes on for a second one."""
        folder, found = self._folder(), {}
        for steps, side in enumerate(("new", "resumed"), start=1):
            began = self._launch(["--module", "vir.train", *self._flags, "--train.steps", str(steps), "--output",
                                  str(folder), "--accept_config_change", "true"])
            event = [event for event in read_metrics(folder) if event["kind"] == "start"][-1]
            seconds = {name.removesuffix("_seconds").replace("_", " "): value for name, value in event.items()
                       if name.endswith("_seconds")}
            found[side] = {"launcher": event["time"] - sum(seconds.values()) - began, **seconds}
        return found

    def _folder(self) -> Path:
        self._started += 1
        folder = self._scratch / f"{self._started:02d}"
        folder.mkdir()
        return folder

    def _launch(self, words: list[str]) -> float:
        """Run words under the deepspeed launcher; when that began."""
        began = time.time()
        launch(DEEPSPEED, self._settings.ranks, words, "see what it says")
        return began
