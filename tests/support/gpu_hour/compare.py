"""Whether two runs of the same settings, one resumed after step FIRST, came to the same losses and weights.

usage: python -m support.gpu_hour.compare UNINTERRUPTED RESUMED FIRST FILE.json     (exit code 1 where they did not)
"""

import json
import sys
from pathlib import Path

import torch

from support.tiny_runs import train_events, weights


def losses(run: Path, first: int) -> dict[int, float]:
    """Of the steps after `first`: those before it are the same by copying."""
    return {event["step"]: event["loss"] for event in train_events(run) if event["step"] > first}


def differing(runs: list[Path], step: int, ema: bool) -> list[str]:
    """The weights, or their averages, that two runs do not both have after a step, bit for bit."""
    one, other = (weights(run, step, run, ema=ema) for run in runs)
    return [name for name in one if not torch.equal(one[name], other[name])]


if __name__ == "__main__":
    *runs, file = (Path(sys.argv[place]) for place in (1, 2, 4))
    whole, again = (losses(run, int(sys.argv[3])) for run in runs)
    apart = [step for step in sorted(whole.keys() | again.keys()) if whole.get(step) != again.get(step)]
    found = {"steps after the resume": len(whole), "steps with other losses": apart,
             "other weights": differing(runs, max(whole), ema=False),
             "other averages": differing(runs, max(whole), ema=True)}
    file.write_text(json.dumps(found, indent=1))
    sys.exit(any(found[name] for name in list(found)[1:]))
