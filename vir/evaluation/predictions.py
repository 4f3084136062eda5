"""What a model says of each image of a split, the same on any number of processes.

Everything that an evaluation tells follows from these records, in one process and in the order of the split: no number
depends on how many processes there were.
"""

# Dimension key: B batch, C channels, H height, W width, K classes, N images of the evaluation.

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vir import distributed
from vir.data.device import normalize
from vir.data.loader import Batches
from vir.evaluation.classes import Shared
from vir.evaluation.classify import in_turn
from vir.weights.spec import InputSpec

Forward = Callable[[Tensor], Tensor]
TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Of the images of an evaluation, in the order of the split. Labels are indices in the classes evaluated."""

    labels: np.ndarray
    """[N] int64."""
    top: np.ndarray
    """[N, min(5, K)] int64, the labels that the model thinks most of, the best first."""
    probabilities: np.ndarray
    """[N, min(5, K)] float32, of these."""
    losses: np.ndarray
    """[N] float32, cross-entropy."""


@dataclass(frozen=True)
class Measured:
    """What one way of computing gave."""

    predictions: Predictions
    seconds: float
    """That it computed, by the slowest process; 0, for nobody waited to know, where it is the only way."""
    difference: float
    """The largest absolute difference of a logit from that of the first way, over all images."""


@torch.inference_mode()
def predict(forwards: Mapping[str, Forward], batches: Batches, model_input: InputSpec, shared: Shared,
            device: torch.device, progress: tqdm[Any], *, dtype: torch.dtype = torch.float32) -> dict[str, Measured]:
    """Compute each batch in each of these ways, and bring the records of all ranks together. Collective.

    Args:
        forwards: from normalised images [B, C, H, W] to the logits of the shared classes.
        dtype: of the images that `forwards` take.
    """
    records: dict[str, list[list[Tensor]]] = {name: [] for name in forwards}
    seconds = dict.fromkeys(forwards, 0.0)
    differences = {name: torch.zeros((), dtype=torch.float64, device=device) for name in forwards}
    labels, is_compared = torch.from_numpy(shared.labels).to(device), len(forwards) > 1
    for batch in in_turn(batches, progress):
        assert batch is not None, "only a stop cuts it short, and none was given"
        images = normalize(batch.images, model_input).to(dtype)
        if is_compared and not any(seconds.values()):  # the first pass of a form compiles, or reserves memory
            for forward in forwards.values():
                forward(images)
        first: Tensor | None = None
        for name, forward in forwards.items():
            start = _now(device) if is_compared else 0.0
            logits = forward(images).float()
            seconds[name] += _now(device) - start if is_compared else 0.0
            records[name].append(_records(logits, labels[batch.labels], batch.positions, batch.valid))
            if first is None:
                first = logits
            else:
                differences[name] = torch.maximum(differences[name], (logits - first).abs().max())
    whole = {name: _gathered(of_form) for name, of_form in records.items()}  # waits for the device
    progress.update(len(next(iter(whole.values())).labels) - progress.n)
    found = {}
    for name in forwards:
        of_ranks = np.array(distributed.gather((seconds[name], float(differences[name]))))
        found[name] = Measured(whole[name], *of_ranks.max(axis=0).tolist())  # which is NaN where one is
    return found


def _now(device: torch.device) -> float:
    """The time at which the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.monotonic()


def _records(logits: Tensor, labels: Tensor, positions: Tensor, valid: Tensor) -> list[Tensor]:
    """For a batch: places in the split, the fields of Predictions, which samples are valid. Waits for no device."""
    probabilities = logits.softmax(dim=1)
    top = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return [positions, labels, top, probabilities.gather(1, top), losses, valid]


def _gathered(batches: list[list[Tensor]]) -> Predictions:
    """The records of all ranks in the order of the split. Collective."""
    columns = [torch.cat(column).cpu().numpy() for column in zip(*batches)]
    valid = columns.pop()
    everyone = distributed.gather([column[valid] for column in columns])
    whole = [np.concatenate(column) for column in zip(*everyone)]
    order = np.argsort(whole.pop(0))
    return Predictions(*(column[order] for column in whole))


def of_shared(forward: Forward, shared: Shared, device: torch.device) -> Forward:
    """The same with the logits of the shared classes alone."""
    if shared.columns is None:
        return forward
    columns = torch.from_numpy(shared.columns).to(device)
    return lambda images: forward(images).index_select(1, columns)


def with_mirror_images(forward: Forward) -> Forward:
    """The logarithm of the mean of the probabilities of each image and of its mirror image."""
    def both(images: Tensor) -> Tensor:
        seen = [forward(each).float().log_softmax(dim=1) for each in (images, images.flip(3))]
        return torch.logaddexp(*seen) - np.log(2)

    return both
