"""Tiny runs for the end-to-end tests: their command lines, how to start several at once, and what they leave."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.forked import forked
from support.launchers import ROOT, TINY
from vir.checkpoints.consolidate import consolidate
from vir.checkpoints.names import newest, step_of
from vir.reports.metrics import read_metrics
from vir.run_folder import METRICS

EMA_DECAY = 0.9
BATCH, IMAGES = 48, 400


def epochs(steps: int) -> str:
    return str(steps * BATCH / IMAGES)


def command(shards: Path, output: Path, config: str | Path = "zero0_fp32", *more: str, steps: int = 8,
            every: int = 4) -> list[str]:
    """Steps of 48 samples in micro-batches of 12, or 8 for three ranks, with every kind of randomness on."""
    json_file = config if isinstance(config, Path) else ROOT / "ds_configs" / f"{config}.json"
    return [*TINY, "--data.train", str(shards / "train"), "--data.val", str(shards / "val"), "--output", str(output),
            "--deepspeed_config", str(json_file), "--model.drop_path_rate", "0.1",
            "--train.epochs", epochs(steps), "--train.global_batch_size", str(BATCH),
            "--train.micro_batch_size", "12", "--train.log_every", "1", "--schedule.warmup_epochs", "0.2",
            "--optim.lr", "1e-3", "--augment.scale", "[0.8, 1.0]", "--augment.hflip", "0",
            "--augment.auto_augment", "rand-m1", "--augment.mixup_prob", "0.3",
            "--ema.decay", str(EMA_DECAY), "--eval.every_epochs", "100", "--checkpoint.every_epochs", epochs(every),
            "--checkpoint.keep", "100", *more]


def launch(tmp: Path, commands: list[list[str]], ranks: int = 2, launcher=forked) -> tuple[list[int], str]:
    """Run the commands one after another in one launch; their exit codes, the same on all ranks, and what was said."""
    tmp.mkdir(exist_ok=True)
    (tmp / "commands.json").write_text(json.dumps(commands))
    done = launcher(ROOT / "tests" / "support" / "several_runs.py", tmp / "commands.json", ranks=ranks)
    assert done.returncode == 0, done.stdout[-6000:]
    codes = [json.loads((tmp / f"codes{rank}.json").read_text()) for rank in range(ranks)]
    assert codes == [codes[0]] * ranks, done.stdout[-6000:]
    return codes[0], done.stdout


def alone(*arguments: str):
    """vir.train in one process."""
    return forked("-m", "vir.train", *arguments, ranks=1)


def train_events(run: Path) -> list[dict]:
    return [event for event in read_metrics(run) if event["kind"] == "train"]


def steps_done(run: Path, since: float = 0.0) -> list[int]:
    """Numbers of the steps that the log tells of, from a time on."""
    return [event["step"] for event in train_events(run) if event["time"] > since] if (run / METRICS).is_file() else []


def saved_step(run: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    saved = newest(run)
    return step_of(saved) if saved else 0


def weights(run: Path, step: int, tmp: Path, **options) -> dict[str, torch.Tensor]:
    consolidate(run / "checkpoints" / f"step-{step:08d}", tmp / "w.safetensors", force=True, **options)
    return load_file(tmp / "w.safetensors")
