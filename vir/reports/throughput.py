"""How well a run uses its devices: model FLOPs, their utilisation (MFU), memory, the time of each rank."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Iterator, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from vir.log import log
from vir.models.block import Retention
from vir.models.build import NotBuiltError, create
from vir.models.vision_retention import VisionRetention
from vir.weights.spec import ModelSpec

# Dense peak of bf16 and fp16 matrix products in 1e12 FLOP/s, without sparsity, summed in float32, from the vendor's
# data sheets and architecture papers. Whole names, as torch.cuda.get_device_name gives them: a part of one also fits
# its MIG slices and laptop versions.
PEAK_TFLOPS = {
    "NVIDIA GB200": 2500.0, "NVIDIA B200": 2250.0, "NVIDIA GH200 480GB": 989.0, "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.5, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 NVL": 835.5, "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0, "NVIDIA A30": 165.0, "NVIDIA A40": 149.7, "NVIDIA A10": 125.0, "NVIDIA A10G": 70.0,
    "NVIDIA L40S": 362.0, "NVIDIA L40": 181.05, "NVIDIA L4": 121.0,
    "NVIDIA RTX 6000 Ada Generation": 364.2, "NVIDIA RTX A6000": 154.8, "NVIDIA RTX A5000": 111.1,
    "NVIDIA RTX A4000": 76.7,
    "NVIDIA GeForce RTX 5090": 209.5, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 3090": 71.0,
}
FP16_TFLOPS = {
    "Tesla V100-SXM2-16GB": 125.0, "Tesla V100-SXM2-32GB": 125.0, "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0, "Tesla T4": 65.0,
}
"""Of those before Ampere, which emulate bf16."""


def forward_flops(spec: ModelSpec) -> int | None:
    """See network_flops; None also for a model that is not built without data."""
    try:
        with torch.device("meta"):
            network = create(spec.name, spec.args)
    except (RuntimeError, NotBuiltError):
        return None
    return network_flops(network, spec.input.size)


def network_flops(network: nn.Module, size: tuple[int, int, int]) -> int | None:
    """FLOPs (2 per multiply-add) of the matrix products and convolutions of one image's forward pass.

    Retention is counted in its chunkwise form of 64 tokens, the one with the fewest; masks, norms and softmax are not.
    None for a model that cannot run without data.

    Args:
        network: on the meta device; it is left as it was.
        size: of the image, (channels, height, width).
    """
    try:
        with _in_chunks_of_64(network):
            if not isinstance(network, VisionRetention):
                return _of_image(network, size)
            # Its blocks are alike but for what acts in training alone. All 50 of a ViR of 10 billion took 1.1 s, two of
            # them 0.06 s (2 CPU cores): a plan has to be told at once.
            every, depth = network.blocks, len(network.blocks)
            try:
                network.blocks = every[:1]
                one = _of_image(network, size)
                network.blocks = every[:2]
                return one + (depth - 1) * (_of_image(network, size) - one)
            finally:
                network.blocks = every
    except RuntimeError:
        return None


def _of_image(network: nn.Module, size: tuple[int, int, int]) -> int:
    with torch.device("meta"):
        return count_flops(network, torch.empty(1, *size))


def count_flops(function: Callable[..., object], *args: object) -> int:
    """FLOPs of the matrix products and convolutions of a call, forward; on the meta device nothing is computed."""
    # torch 2.15 has no formula for baddbmm_, by which chunkwise retention adds a product to a sum in place.
    def in_place(total: Sequence[int], a: Sequence[int], b: Sequence[int], *args: Any, **options: Any) -> int:
        return int(bmm_flop(a, b))

    counting = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place})
    with torch.no_grad(), counting as counter:
        function(*args)
    return int(counter.get_total_flops())


@contextmanager
def _in_chunks_of_64(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, with retention in that form, for the block."""
    were = [(module, module.training) for module in network.modules()]
    layers = [module for module in network.modules() if isinstance(module, Retention)]
    forms = [(layer.mode, layer.chunk_size) for layer in layers]
    network.eval()
    for layer in layers:
        layer.set_mode("chunkwise", 64)
    try:
        yield
    finally:
        for module, training in were:
            module.training = training
        for layer, form in zip(layers, forms):
            layer.set_mode(*form)


def peak_flops(device: torch.device, precision: str, given: float | None) -> float | None:
    """FLOP/s of one device: `given` in 1e12, else from the table; None where unknown (fp32, CPUs, other GPUs).

    Of a GPU whose peak is unknown it is logged, with the flag that tells it.
    """
    if given is not None:
        return given * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    listed = {"bf16": PEAK_TFLOPS, "fp16": PEAK_TFLOPS | FP16_TFLOPS}.get(precision, {}).get(name)
    if listed is None:
        log.info("no MFU is shown: the peak of %s in %s is not known here; --train.peak_tflops tells it", name,
                 precision)
    return None if listed is None else listed * 1e12


def utilisation(images_per_second: float, flops: int | None, devices: int, peak: float | None) -> float | None:
    """MFU: 3 x forward FLOPs (forward and twice that backward, PaLM arXiv:2204.02311) x images/s / (devices x peak)."""
    return None if peak is None or flops is None else 3 * flops * images_per_second / (devices * peak)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors on this GPU, or this process on a CPU, have taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Adds up the time of blocks of work on a device; read without waiting for the device until `total`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._events.append((begin, end))
        else:
            self._began = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def total(self) -> float:
        """Seconds since the last call. Waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


_FAR_S = 0.05
"""A word between machines of one room takes a thousandth of a second."""


def stragglers(waits: Sequence[float], forwards: Sequence[float], hosts: Sequence[str], seconds: float) -> list[str]:
    """Which ranks hold the others up in an interval of `seconds`, and by what.

    Every step ends for all at once, so the slow rank shows in what it does alone: waiting for its loader, and the
    forward pass. One is named whose time there is a quarter above the median, and more by a tenth of the interval and
    by half a second.
    """
    slow = []
    for rank, (wait, forward) in enumerate(zip(waits, forwards)):
        for what, own, others in (("waits for data", wait, waits), ("computes forward", forward, forwards)):
            usual = statistics.median(others)
            if own > 1.25 * usual and own - usual > max(0.1 * seconds, 0.5):
                slow.append(f"rank {rank} ({hosts[rank]}) {what} {100 * own / seconds:.0f} % of the time, the median "
                            f"rank {100 * usual / seconds:.0f} %")
    return slow


def latecomers(meets: Sequence[float], waits: Sequence[float], hosts: Sequence[str], steps: int,
               seconds: float) -> list[str]:
    """Which ranks the others wait for once a step, in an interval of `seconds`, where `stragglers` finds no cause.

    All ranks meet before each step, and who comes last waits least. That may be a slow machine, or a slow link to it.

    Args:
        meets: seconds that each rank has waited there.
        waits: seconds that each rank has waited for its loader, right before: who is late for that is told elsewhere.
    """
    late, shares = [], [meet + own for meet, own in zip(meets, waits)]
    for rank, share in enumerate(shares):
        others = [*shares[:rank], *shares[rank + 1:]]
        by = statistics.median(others) - share if others else 0.0
        if by > max(0.1 * seconds, 0.5):
            late.append(f"rank {rank} ({hosts[rank]}) begins each step {by / steps:.2f} s after the median rank, "
                        f"{100 * by / seconds:.0f} % of the time; its machine or its link is slow")
    return late


def far_away(round_trips: Sequence[float], hosts: Sequence[str]) -> list[str]:
    """Which ranks are behind a slow link, by the seconds that a word to rank 0 and back has lately taken each of them.

    A step ends for all at once, also where one link is slow, but a word waits behind all that is sent over it.
    """
    told = []
    for rank, own in enumerate(round_trips):
        usual = statistics.median([*round_trips[:rank], *round_trips[rank + 1:]] or [own])
        if own > max(10 * usual, _FAR_S):
            told.append(f"rank {rank} ({hosts[rank]}) is far away: a word to rank 0 and back takes {1000 * own:.0f} "
                        f"ms, {1000 * usual:.1f} ms for the median rank; the link of its machine is slow or full")
    return told
