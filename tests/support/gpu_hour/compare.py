"""Whether two runs of the same settings came to the same losses and weights, bit for bit.

usage: python -m support.gpu_hour.compare UNINTERRUPTED RESUMED FILE.json     (exit code 1 where they did not)
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vir.checkpoints.consolidate import consolidate
from vir.reports.metrics import read_metrics


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(run) if event["kind"] == "train"]


def weights(run: Path, ema: bool) -> dict[str, torch.Tensor]:
    consolidate(run, run / "w.safetensors", ema=ema, force=True)
    return load_file(run / "w.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


if __name__ == "__main__":
    one, other, file = map(Path, sys.argv[1:])
    apart = [step for step, pair in enumerate(zip(losses(one), losses(other), strict=True), 1) if pair[0] != pair[1]]
    found = {"steps": len(losses(one)), "steps with other losses": apart,
             "other weights": differing(weights(one, False), weights(other, False)),
             "other averages": differing(weights(one, True), weights(other, True))}
    file.write_text(json.dumps(found, indent=1))
    sys.exit(any(found[name] for name in list(found)[1:]))
