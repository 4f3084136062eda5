"""What a run of tools/benchmark_accuracy.py came to, in a process of its own.

usage: python -m vir.benchmarks.accuracy_run RUN VAL RESULT.json

Writes the curves of the run, and how its weights and their average do on the images in VAL.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vir.benchmarks.official  # noqa: F401  one of the models
from vir import cli
from vir.benchmarks.evaluation import HOW, no_bar
from vir.checkpoints.consolidate import consolidate
from vir.config import DataConfig
from vir.data.opening import open_reader, places
from vir.distributed import World
from vir.errors import VirError
from vir.evaluation.run import evaluate
from vir.files import replace_text
from vir.reports.metrics import read_metrics


def main(argv: list[str]) -> int:
    run, val, result = argv
    try:
        replace_text(Path(result), json.dumps(judged(Path(run), val)))
    except VirError as error:
        return cli.tell(error, "error")
    return 0


def judged(run: Path, val: str) -> dict[str, Any]:
    """All that is kept of a run; `right` has a hexadecimal digit for each four images, in the order of the split."""
    events = read_metrics(run)
    steps = [event for event in events if event["kind"] == "train"]
    found: dict[str, Any] = {
        "loss": [(event["epoch"], event["loss"]) for event in steps],
        "top1": [(event["epoch"], event["ema_top1"]) for event in events if event["kind"] == "eval"],
        "images_per_second": statistics.median(event["images_per_second"] for event in steps)}
    for name, ema in (("raw", False), ("ema", True)):
        weights = run / f"{name}.safetensors"
        consolidate(run, weights, ema=ema, force=True)
        reader = open_reader(val, places(DataConfig()), first=True)
        how = replace(HOW, batch_size=64, workers=1)
        evaluation = evaluate(weights, reader, how, World(rank=0, size=1, device=torch.device("cpu")), no_bar)
        predictions = evaluation.first.predictions
        right = predictions.top[:, 0] == predictions.labels
        found[name] = {"top1": 100 * float(right.mean()), "loss": evaluation.fields["loss"], "images": len(right),
                       "right": np.packbits(right).tobytes().hex()}
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
