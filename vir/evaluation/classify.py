"""Accuracy of a classifier over a split, every image once at any world size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable

import torch
from torch import nn
from tqdm import tqdm

from vir import distributed
from vir.data.loader import Batch
from vir.data.transforms import InputConfig, normalize


@dataclass(frozen=True)
class Accuracy:
    """top1 and top5 in percent, loss as mean cross-entropy, over `images` images."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def classify(model: nn.Module, batches: Iterable[Batch], model_input: InputConfig, device: torch.device,
             progress: tqdm | None = None) -> Accuracy:
    """Evaluate `model`, in its own dtype, on this rank's batches and sum over all ranks. Collective.

    With fewer than five classes top5 counts the whole list, so it is 100.
    """
    dtype = next(model.parameters()).dtype
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # right in 1, right in 5, images
    for batch in batches:
        logits = model(normalize(batch.images, model_input).to(dtype)).float()[batch.valid]
        labels = batch.labels[batch.valid]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.view(-1, 1)
        counts += torch.stack([best[:, 0].sum(), best.sum(), best.new_tensor(len(labels), dtype=torch.int64)])
        loss += nn.functional.cross_entropy(logits, labels, reduction="none").double().sum()
        if progress is not None:
            progress.update(len(labels))
    model.train(was_training)
    right1, right5, images, total_loss = distributed.sum_over_ranks([*counts.tolist(), loss.item()], device)
    return Accuracy(top1=100 * right1 / images, top5=100 * right5 / images, loss=total_loss / images,
                    images=int(images))
