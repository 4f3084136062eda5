"""Whether two runs of the same settings, one resumed after step FIRST, came to the same losses and weights.

usage: python -m support.gpu_hour.compare UNINTERRUPTED RESUMED FIRST FILE.json     (exit code 1 where they did not)
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vir.checkpoints.consolidate import consolidate
from vir.reports.metrics import read_metrics


def losses(run: Path, first: int) -> dict[int, float]:
    """Of the steps after `first`: those before it are the same by copying."""
    return {event["step"]: event["loss"] for event in read_metrics(run)
            if event["kind"] == "train" and event["step"] > first}


def weights(run: Path, ema: bool) -> dict[str, torch.Tensor]:
    consolidate(run, run / "w.safetensors", ema=ema, force=True)
    return load_file(run / "w.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


if __name__ == "__main__":
    one, other, file = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[4])
    whole, again = (losses(run, int(sys.argv[3])) for run in (one, other))
    apart = [step for step in sorted(whole.keys() | again.keys()) if whole.get(step) != again.get(step)]
    found = {"steps after the resume": len(whole), "steps with other losses": apart,
             "other weights": differing(weights(one, False), weights(other, False)),
             "other averages": differing(weights(one, True), weights(other, True))}
    file.write_text(json.dumps(found, indent=1))
    sys.exit(any(found[name] for name in list(found)[1:]))
