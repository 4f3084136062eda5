"""Model FLOPs utilisation (MFU) that others have measured and published, and which of it a plan rests on.

None is of ViR: no training of one on a GPU is published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby, product

from vir.planning.hardware import GPUS, Gpu, Range
from vir.reports.throughput import utilisation


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One published training speed, in bf16 or fp16.

    `mfu` is of 3 x forward FLOPs, of matrix products and convolutions (PaLM, arXiv:2204.02311).
    """

    model: str
    parameters: float
    gpu: str
    """One of hardware.GPUS."""
    gpus: int
    compiled: bool
    """By torch.compile."""
    source: str
    images_per_second: float | None = None
    """Of all GPUs."""
    gmacs: float | None = None
    """1e9 multiply-adds of one image's forward pass, as timm publishes them (results/benchmark-infer-*.csv)."""
    stated: float | None = None
    """The MFU that the source states, where its FLOPs are not published."""

    @property
    def mfu(self) -> float:
        if self.stated is not None:
            return self.stated
        assert self.images_per_second and self.gmacs
        found = utilisation(self.images_per_second, int(2e9 * self.gmacs), self.gpus, GPUS[self.gpu].peak("bf16"))
        assert found
        return found


_NEMO = "docs.nvidia.com/nemo-framework/user-guide, Vision Transformer"
_VIT5 = "nvidia-bionemo.github.io/nvSubquadratic/benchmarks.html"
_TIMM = "github.com/huggingface/pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv"


def _giant(gpu: str, gpus: int, images_per_second: float) -> Measurement:
    return Measurement(model="ViT-g/14", parameters=1.0126e9, gpu=gpu, gpus=gpus, compiled=False, source=_NEMO,
                       images_per_second=images_per_second, gmacs=267.18)


def _vit5(compiled: bool, stated: float, images_per_second: float) -> Measurement:
    return Measurement(model="ViT-5-Small", parameters=22e6, gpu="h100-80gb", gpus=1, compiled=compiled, source=_VIT5,
                       images_per_second=images_per_second, stated=stated)


def _timm(model: str, parameters: float, images_per_second: float, gmacs: float) -> Measurement:
    return Measurement(model=model, parameters=parameters, gpu="rtx3090-24gb", gpus=1, compiled=False, source=_TIMM,
                       images_per_second=images_per_second, gmacs=gmacs)


# Not here: runs whose time is that of the loader too (ViT-5-Small on 8 GPUs, CLIP), inference, and language models.
MEASURED: tuple[Measurement, ...] = (
    _giant("a100-80gb", 8, 693), _giant("a100-80gb", 128, 10_644),
    _giant("h100-80gb", 8, 1428), _giant("h100-80gb", 128, 21_561),
    _vit5(False, 0.046, 1608), _vit5(True, 0.220, 7716), _vit5(True, 0.229, 8003),
    _timm("ViT-S/16", 22.05e6, 1058, 4.61), _timm("ViT-B/16", 86.57e6, 393, 17.58),
    _timm("ViT-L/16", 304.33e6, 117, 61.6),
)


@dataclass(frozen=True, kw_only=True)
class Mfu:
    """What part of the peak a run is expected to reach."""

    range: Range
    basis: str
    """Which measurements that rests on, in words."""


def mfu_range(gpu: Gpu, precision: str, parameters: int, compiled: bool) -> Mfu:
    """The least and the most of what was measured nearest to this: at least two measurements, or all there are.

    Nearest is a size within a factor of 8, on the same chip (H100 and H200 share one), then on any; then a size within
    a factor of 64 on the same chip; then all; and of each of these compiled or not.
    """
    chip = [measured for measured in MEASURED if _chip(measured.gpu) == _chip(gpu.name)]
    for (pool, factor), same_mode in product(
            ((chip, 8), (MEASURED, 8), (chip, 64), (MEASURED, math.inf)), (True, False)):
        found = [measured for measured in pool
                 if 1 / factor <= parameters / measured.parameters <= factor and (
                     not same_mode or measured.compiled == compiled)]
        if len(found) >= 2:
            break
    modes = sorted({_mode(measured.compiled) for measured in found})
    told = "; ".join(", ".join(f"{measured.model} {100 * measured.mfu:.1f} % on {measured.gpus} x {measured.gpu}"
                               for measured in of_source) + f" ({source})"
                     for source, of_source in groupby(found, lambda measured: measured.source))
    others = ["a ViR", *([] if _mode(compiled) in modes else [_mode(compiled)]),
              *(["in fp32"] if precision == "fp32" else [])]
    values = [measured.mfu for measured in found]
    return Mfu(range=Range(min(values), max(values)), basis=(
        f"{'measured' if pool is chip else f'nothing near is known of {gpu.name}; elsewhere'} {' and '.join(modes)}, "
        f"of {'any size' if factor == math.inf else f'a size within a factor of {factor}'}: {told}; none of them is "
        f"{' or '.join(others)}"))


def _mode(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def _chip(name: str) -> str:
    return name.split("-")[0].replace("h200", "h100")
