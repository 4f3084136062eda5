"""Accuracy of a classifier over a split, every image once at any world size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Generator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vir import distributed
from vir.data.batch import Batch
from vir.data.device import normalize
from vir.data.loader import Batches
from vir.weights.spec import InputSpec


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
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in in_turn(batches, progress, stop):
        if batch is None:
            return None
        total += tally(forward(normalize(batch.images, model_input)), batch.labels, batch.valid)
    # The only wait of the host for the device, once for all batches.
    right1, right5, images, loss = distributed.sum_over_ranks(total.tolist(), device)
    progress.update(int(images) - progress.n)
    return Accuracy(top1=100 * right1 / images, top5=100 * right5 / images, loss=loss / images, images=int(images))


def in_turn(batches: Batches, progress: tqdm[Any],
            stop: Callable[[], bool] | None = None) -> Generator[Batch | None, None, None]:
    """The batches of this rank, with the progress of all ranks; None, and nothing more, where `stop` says yes. The
    loader is closed at the end."""
    try:
        for batch in batches:
            if stop is not None and stop():
                yield None
                return
            assert batch is not None, "the loader gives up where `stop` says yes, and not without one"
            # The ranks take turns in the order of the samples: where rank 0 goes on, those before are done by all.
            progress.update(int(batch.positions.numpy()[0]) - progress.n)
            yield batch
    finally:
        batches.close()


def tally(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """[4] float64, on the device, of the samples of a batch that are `valid` ([B] bool): how many the model has right
    in 1 and in 5, how many there are, and the sum of their cross-entropies."""
    logits = logits.float()
    right = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.view(-1, 1)) & valid.view(-1, 1)
    # A mask, not an index: the host would wait to know how many there are.
    losses = nn.functional.cross_entropy(logits, labels, reduction="none").double().where(valid, 0)
    return torch.stack([right[:, 0].sum(), right.sum(), valid.sum(), losses.sum()])


if __name__ == "__main__":
    raise SystemExit("vir.evaluation.classify is a part of the library; the program is vir-evaluate")
