"""Accuracy of a classifier over a split, every image once at any world size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vir import distributed
from vir.data.device import normalize
from vir.data.loader import Batches
from vir.models.spec import InputSpec


@dataclass(frozen=True)
class Accuracy:
    """top1 and top5 in percent, loss as mean cross-entropy, over `images` images."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def classify(forward: Callable[[Tensor], Tensor], batches: Batches, model_input: InputSpec,
             device: torch.device, progress: tqdm[Any], stop: Callable[[], bool] | None = None) -> Accuracy | None:
    """Evaluate this rank's batches and sum over all ranks. Collective; every rank must have the same number of batches.

    With fewer than five classes top5 counts the whole list, so it is 100.

    Args:
        forward: from normalised float32 images [B, C, H, W] to logits, of a model in eval mode.
        progress: shown by rank 0 alone: images that all ranks together have done.
        stop: asked before each batch, the same answer on every rank; None is returned when it says yes.
    """
    loss = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # right in 1, right in 5, images
    try:
        for batch in batches:
            if stop is not None and stop():
                return None
            assert batch is not None, "the loader gives up where `stop` says yes, and not without one"
            # The ranks take turns in the order of the samples: where rank 0 goes on, those before are done by all.
            progress.update(int(batch.positions[0]) - progress.n)
            logits, labels, valid = forward(normalize(batch.images, model_input)).float(), batch.labels, batch.valid
            best = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.view(-1, 1)) & valid.view(-1, 1)
            counts += torch.stack([best[:, 0].sum(), best.sum(), valid.sum()])
            losses = nn.functional.cross_entropy(logits, labels, reduction="none").double()
            loss += losses.where(valid, 0).sum()  # a mask, not an index: the host does not wait for the device
    finally:
        batches.close()
    right1, right5, images, total_loss = distributed.sum_over_ranks([*counts.tolist(), loss.item()], device)
    progress.update(int(images) - progress.n)
    return Accuracy(top1=100 * right1 / images, top5=100 * right5 / images, loss=total_loss / images,
                    images=int(images))


if __name__ == "__main__":
    raise SystemExit("vir.evaluation.classify is a part of the library; the program is vir-evaluate")
