"""Features of a linear probe's training images: computed once where nothing is drawn, and batches of them."""

# Dimension key: N images, B micro-batch, F numbers that the classifier takes of one image, K classes.

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vir import distributed
from vir.cluster.heartbeat import Heartbeat
from vir.cluster.signals import StopRequest
from vir.config import AugmentConfig, RunConfig
from vir.data.device import normalize, soft_targets
from vir.data.loader import Patience, eval_batches, requests_between
from vir.data.order import SampleOrder
from vir.data.reader import Reader
from vir.data.stages import Spent
from vir.distributed import World
from vir.engine.engine import Engine
from vir.evaluation.classify import in_turn
from vir.log import log, shows_bars
from vir.models.linear_probe import classifier_inputs, feature_width
from vir.training.guard import check_bad_samples
from vir.training.plan import Plan
from vir.weights.spec import InputSpec

_MORE_THAN_LINEAR = "the model makes its logits by more than linear layers on one vector"
_TOLERANCE = 1e-2
"""Of logits computed in two ways in low precision, of the largest one. Other arithmetic than of the classifiers' is far
from it."""


@dataclass(frozen=True)
class Features:
    """What the classifier takes of each training image, the same on all ranks, in CPU memory."""

    samples: np.ndarray  # [N] int64, ascending
    table: Tensor  # [N, F] of these samples, or of substitutes in their places
    labels: Tensor  # [N] int64 of the images that the features are of

    def of(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features [B, F] and labels [B] of some samples [B]."""
        places = torch.from_numpy(np.searchsorted(self.samples, samples))
        return self.table[places], self.labels[places]


@dataclass
class FeatureBatch:
    """A micro-batch of features; the rest as in a Batch of the loader."""

    features: Tensor  # [B, F]
    labels: Tensor  # [B] int64
    positions: Tensor  # [B] int64, on the CPU
    bad: list[str] = field(default_factory=list)
    """Empty: what could not be decoded was told when the features were computed."""
    spent: Spent = field(default_factory=Spent)


class FeatureBatches:
    """This rank's micro-batches of steps [first_step, plan.total_steps), in the order in which the loader gives
    images."""

    def __init__(self, features: Features, order: SampleOrder, plan: Plan, micro_batch_size: int, first_step: int,
                 world: World) -> None:
        self._features, self._device = features, world.device
        self._requests = requests_between(order, first_step, plan.total_steps, plan.global_batch_size,
                                          micro_batch_size, world.rank, world.size)

    def __next__(self) -> FeatureBatch:
        positions, samples = next(self._requests)
        features, labels = self._features.of(samples)
        if self._device.type == "cuda":
            features, labels = features.pin_memory(), labels.pin_memory()
        return FeatureBatch(features.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True),
                            torch.from_numpy(positions))

    def close(self) -> None:
        """Nothing comes after it."""
        self._requests = iter(())

    def awaited(self) -> str:
        return "features in memory"


class FeaturePreparation:
    """From a batch of features to what the engine takes, and targets; as Preparation does with images."""

    def __init__(self, smoothing: float, num_classes: int) -> None:
        self._smoothing, self._num_classes = smoothing, num_classes

    def __call__(self, batch: FeatureBatch) -> tuple[Tensor, Tensor]:
        """Features [B, F] and soft targets [B, K]."""
        whole = torch.ones(len(batch.labels), device=batch.labels.device)
        return batch.features, soft_targets(batch.labels, whole, self._num_classes, self._smoothing)


def describe(augment: AugmentConfig, plan: Plan, engine: Engine) -> str:
    """What features take where they are kept, or why they are not, in words."""
    if reason := _reason(augment, engine):
        return f"linear probe: each step runs the whole model, because {reason}"
    width, images = feature_width(engine.module) or 0, min(plan.num_samples, plan.samples(plan.total_steps))
    return (f"linear probe: {width} features in {str(engine.dtype).removeprefix('torch.')} of each of {images} images "
            f"take {width * images * engine.dtype.itemsize / 1e9:.3g} GB of CPU memory on each rank")


def can_be_kept(config: RunConfig, engine: Engine, model_input: InputSpec, world: World) -> bool:
    """Whether steps can do with features: nothing is drawn, and the classifier makes the same logits of them.

    The log tells why not, where describe has not. Collective.
    """
    if _reason(config.augment, engine):
        return False
    reason = next(filter(None, distributed.gather(_difference(engine, model_input, world.device))), "")
    if reason:
        log.info("linear probe: each step runs the whole model, because %s", reason)
    return not reason


def _reason(augment: AugmentConfig, engine: Engine) -> str:
    """Why features cannot be kept, as far as it is seen without computing; empty where they may be."""
    if augment.draws:
        return "--augment draws other images in each epoch"
    return "" if feature_width(engine.module) else _MORE_THAN_LINEAR


def _difference(engine: Engine, model_input: InputSpec, device: torch.device) -> str:
    """Why the classifiers do not make the model's logits of features, or cannot be seen to; empty where they do. Tried
    with two images of noise."""
    noise = torch.rand(2, *model_input.size, generator=torch.Generator().manual_seed(0))
    with engine.evaluating(averaged=False) as forward:
        with classifier_inputs(engine.module) as found:
            expected = forward(noise.to(device))
        features = torch.cat([found[number] for number in sorted(found)], dim=1)
        if features.shape[1] != feature_width(engine.module):
            return _MORE_THAN_LINEAR
        logits = forward(features)
    if not expected.isfinite().all():
        return "its logits of noise are not finite, so that nothing can be compared"
    if not expected.any():
        return "its logits are all zero at the start, so that nothing can be compared"
    return "" if (logits - expected).abs().max() <= _TOLERANCE * expected.abs().max() else _MORE_THAN_LINEAR


def compute(config: RunConfig, plan: Plan, engine: Engine, reader: Reader, order: SampleOrder, model_input: InputSpec,
            world: World, patience: Patience, stop: StopRequest, heartbeat: Heartbeat) -> Features | None:
    """Features of all images that the run takes; None where a signal came before the end. Collective.

    The ranks share the images and exchange what they have. The same images are in the same batches when the run goes
    on on as many ranks, so that it computes the same bits.

    Raises:
        DataError: too many images that cannot be decoded, or one that cannot be read.
    """
    began, end = time.monotonic(), plan.samples(plan.total_steps)
    # Two epochs' length from the start holds a whole one, and with it every sample that is not excluded.
    samples = np.unique(order.samples(np.arange(min(end, 2 * order.num_samples))))
    size, width = config.train.micro_batch_size, feature_width(engine.module)
    assert width is not None, "can_be_kept has asked"
    table, used = torch.empty(len(samples), width, dtype=engine.dtype), torch.empty(len(samples), dtype=torch.long)
    batches = eval_batches(reader, model_input, batch_size=size, rank=world.rank, world_size=world.size,
                           workers=config.data.workers, device=world.device, patience=patience, chosen=samples,
                           exclusion=order.exclusion)
    bad: list[str] = []
    first = 0

    def stops() -> bool:
        heartbeat.at(f"computing features, {first} of {len(samples)}")
        return stop.agree()

    with tqdm(total=len(samples), desc="features", leave=False, unit="image",
              disable=not (world.is_main and shows_bars())) as bar, \
            engine.evaluating(averaged=False) as forward, classifier_inputs(engine.module) as found:
        for batch in in_turn(batches, bar, stops):
            if batch is None:
                return None
            forward(normalize(batch.images, model_input))
            mine = torch.cat([found[number] for number in sorted(found)], dim=1).to(engine.dtype)
            bad += batch.bad if batch.valid[0] else []  # a rank beyond the last image takes one a second time
            # All batches but the last ones are full, so these are the next samples in order, and what is beyond them.
            here = slice(first, min(first + size * world.size, len(samples)))
            table[here] = _exchanged(mine, size)[:here.stop - first].cpu()
            used[here] = _exchanged(torch.tensor(batch.samples, device=world.device), size)[:here.stop - first].cpu()
            first = here.stop
    _tell_of_bad([line for lines in distributed.gather(bad) for line in lines], len(samples),
                 config.data.max_bad_fraction)
    log.info("linear probe: features of %d images computed in %.0f s", len(samples), time.monotonic() - began)
    return Features(samples, table, torch.from_numpy(reader.labels[used.numpy()].astype(np.int64)))


def _exchanged(rows: Tensor, size: int) -> Tensor:
    """The rows of all ranks in order, each filled up to `size` rows."""
    whole = rows.new_zeros(size, *rows.shape[1:])
    whole[:len(rows)] = rows
    return distributed.gather_rows(whole)


def _tell_of_bad(bad: list[str], images: int, limit: float) -> None:
    for said in bad:
        log.warning("bad sample replaced: %s", said)
    check_bad_samples(len(bad), images, limit)
