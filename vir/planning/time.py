"""Time of a step: FLOPs of the model with retention as it is performed, bytes between GPUs by ZeRO stage, what hides.

Everything here is an estimate from stated peaks and bandwidths. Units: bytes, seconds, FLOPs at 2 per multiply-add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vir.engine.ds_config import ZeroSettings
from vir.models.block import Retention
from vir.models.forms import retain, taken
from vir.planning.hardware import Cluster, Range
from vir.reports.throughput import count_flops, network_flops
from vir.weights.spec import ModelSpec

FUSED_TILE = 64
"""Tokens of a tile of the fused kernel in half precision, in which alone `auto` takes it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of one image, forward."""

    model: int
    """As MFU counts them: reports.throughput.network_flops."""
    form: str
    """Of retention that is taken there: "fused", "parallel", "chunkwise of 64"; "" for other networks."""
    retention: int
    """Of all retention layers, as MFU counts them: in chunks of 64."""
    performed: int
    """Of all retention layers, in that form."""

    @property
    def total(self) -> int:
        """What the device computes."""
        return self.model - self.retention + self.performed


def count_work(network: nn.Module, spec: ModelSpec, fused: bool, precision: str) -> Work | None:
    """The work of a network on the meta device, which stays as it is; None for one that cannot run without data.

    Args:
        fused: the device has the kernels of retention, which `auto` then takes; see hardware.Gpu.fused.
        precision: fp32, bf16 or fp16.
    """
    layers = [module for module in network.modules() if isinstance(module, Retention)]
    seen: list[tuple[int, tuple[int, int] | None]] = []

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append((inputs[0].shape[1], inputs[1] if layers[0].dims == 2 else None))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers[:1]]
    try:
        model = network_flops(network, spec.input.size)
    finally:
        for hook in hooks:
            hook.remove()
    if model is None:
        return None
    if not layers:
        return Work(model=model, form="", retention=0, performed=0)
    layer, (tokens, grid) = layers[0], seen[0]
    width = layer.qkv.in_features // layer.num_heads
    form, chunk = layer.mode, layer.chunk_size
    if form == "auto":
        form, chunk = taken(tokens, width, layer.dims == 2, precision != "fp32", fused)
    heads = len(layers) * layer.num_heads
    return Work(model=model, form={"chunkwise": f"chunkwise of {chunk}", "fla": f"fla in chunks of {chunk}"}.get(
                    form, form),
                retention=heads * retention_flops("chunkwise", 64, tokens, width, grid),
                performed=heads * retention_flops(form, chunk, tokens, width, grid))


def retention_flops(form: str, chunk: int, tokens: int, width: int, grid: tuple[int, int] | None) -> int:
    """FLOPs of the matrix products of one head's retention of one image, forward.

    torch's counter tells them but for kernels, which it does not see, and for the recurrent form, for which it took 8 s
    of 4,097 tokens. Every score of a query and a key, both of width K, costs 4 K: 2 K to compute it and 2 K to multiply
    a value with it.

    - fused: tiles of 64 x 64 scores on and below the diagonal, of widths padded to a power of 2;
    - fla: C^2 scores of a chunk of C tokens, the state that it adds and the one that it reads, 2 C K^2 each. States are
      carried from chunk to chunk by no product;
    - recurrent: each token reads a state, 2 K^2.

    Args:
        form: one of RETENTION_MODES but "auto", "fused" or "fla".
        grid: rows and columns of patches for decay over both; None for decay along the sequence.
    """
    if form == "fused":
        tiles = math.ceil(tokens / FUSED_TILE)
        return 4 * (1 << (width - 1).bit_length()) * FUSED_TILE ** 2 * (tiles * (tiles + 1) // 2)
    if form == "fla":
        return math.ceil(tokens / chunk) * (4 * width * chunk ** 2 + 4 * chunk * width ** 2)
    if form == "recurrent":
        return 2 * width ** 2 * tokens
    q, decay = torch.empty(1, 1, tokens, width, device="meta"), torch.empty(1, device="meta")
    return count_flops(retain, q, q, q, decay, grid, form, chunk)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of collective of a step."""

    what: str
    """gradients, or weights."""
    payload: float
    """Bytes of the whole vectors, over all micro-batches of the step."""
    within: float
    """Bytes that one GPU sends to others of its node."""
    between: float
    """Bytes that one GPU's share of the network sends."""
    window: float
    """The part of the step's computing behind which it can hide, 0 for none."""

    def seconds(self, cluster: Cluster) -> float:
        """Both links work at the same time; the slower one counts. Latencies are not in it."""
        return max(self.within / cluster.gpu.bandwidth, self.between / cluster.network)


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes of one rank and step."""

    parts: tuple[Part, ...]
    overlapped: bool
    """Gradients are reduced beside the backward pass, as the JSON says."""

    @property
    def within_node(self) -> float:
        """Bytes that one GPU sends over NVLink or PCIe."""
        return sum(part.within for part in self.parts)

    @property
    def between_nodes(self) -> float:
        """Bytes that one GPU's share of the network sends."""
        return sum(part.between for part in self.parts)

    @property
    def sent(self) -> float:
        """Bytes that one GPU sends over all its links."""
        return self.within_node + self.between_nodes

    def seconds(self, cluster: Cluster) -> float:
        """Where nothing else takes the links, and these reach the bandwidth of their data sheets."""
        return sum(part.seconds(cluster) for part in self.parts)

    def exposed(self, cluster: Cluster, compute: float) -> float:
        """Seconds that cannot hide behind `compute` seconds: a lower bound.

        Parts that hide behind a shorter stretch of it lie within the longer ones, and share the links.
        """
        never = sum(part.seconds(cluster) for part in self.parts if not part.window)
        hideable = sorted((part.window, part.seconds(cluster)) for part in self.parts if part.window)
        most = so_far = 0.0
        for window, seconds in hideable:
            so_far += seconds
            most = max(most, so_far - window * compute)
        return never + most


def communicate(parameters: int, trained: int, small: int, zero: ZeroSettings, precision: str, cluster: Cluster,
                accumulation: int, recomputes: bool) -> Communication:
    """What DeepSpeed 0.19.8 sends in a step, read in its source and compared with counted collectives in a test.

    - Stage 0 reduces the gradients of a step to all ranks after the last backward pass.
    - Stage 1 the same in buckets, beside the last backward pass with overlap_comm, then gathers the new weights.
    - Stage 2 does so in every micro-batch. Its buckets too are reduced to all ranks (use_multi_rank_bucket_allreduce,
      its default): twice what a reduce-scatter would send.
    - Stage 3 gathers the weights in the forward pass of every micro-batch and again in its backward pass, recomputing
      or not, and scatters the reduced gradients. The last weights of the forward pass stay gathered for the backward
      pass: as many as stage3_max_reuse_distance, which counts up to the end of the forward pass alone where blocks
      are gathered at once (engine.blocks), or as stage3_prefetch_bucket_size. So by DeepSpeed's defaults a network of
      up to 1e9 numbers is gathered once. Where stage3_max_live_parameters is larger than that distance (by default
      they are equal), prefetching may keep more, up to it: then less is gathered than told here. Weights of at most
      stage3_param_persistence_threshold numbers are gathered once, after the step.
    - ZeRO++: weights in one byte; from the first gathering of a step to the next step in each group of
      zero_hpz_partition_size ranks; between nodes gradients in half a byte, exchanged inside each node and then between
      them. Scales, one for thousands of numbers, are left out, as is padding.

    Gradients and weights are sent in the precision of the run. Ring algorithms send (n - 1) / n of a vector over each
    link to gather or to scatter it, twice that to reduce it for all (NVIDIA nccl-tests, doc/PERFORMANCE.md). Between
    nodes one ring runs through each network card: a GPU's share of the network carries 1 / gpus_per_node of what it
    sends, its link inside the node the rest. For a few nodes NCCL has faster algorithms, so that this is then too much.

    Args:
        parameters: of the network.
        trained: of these; where the first layers are frozen, less is gathered in the backward pass than told here.
        small: of these, numbers in parameters that stay gathered.
        recomputes: blocks are computed again in the backward pass.
    """
    ranks, here = cluster.world, cluster.gpus_per_node
    if ranks == 1:
        return Communication(parts=(), overlapped=False)
    size = 4 if precision == "fp32" else 2
    backward = 3 / 4 if recomputes else 2 / 3
    overlapped = zero.overlap_comm and zero.stage > 0

    def ring(what: str, payload: float, window: float, twice: bool = False, among: int = ranks) -> Part:
        sent = payload * (among - 1) / among * (2 if twice else 1)
        return Part(what=what, payload=payload, window=window if overlapped else 0.0,
                    within=sent * (here - 1) / here if among > here else sent,
                    between=sent / here if among > here else 0.0)

    if zero.stage == 0:
        return Communication(parts=(ring("gradients", trained * size, 0.0, twice=True),), overlapped=False)
    if zero.stage < 3:
        every = accumulation if zero.stage == 2 else 1
        window = backward if zero.stage == 2 else backward / accumulation
        return Communication(overlapped=overlapped, parts=(
            ring("gradients", every * trained * size, window, twice=True), ring("weights", trained * size, 0.0)))

    large = parameters - small
    again = max(0, large - max(zero.stage3_max_reuse_distance, zero.stage3_prefetch_bucket_size))
    of_weight = 1 if zero.zero_quantized_weights else size
    group = min(zero.zero_hpz_partition_size, ranks)
    parts = [ring("weights", small * size, 0.0)]
    if group > 1:
        in_group = accumulation * (large + again) - large
        parts += [ring("weights", large * of_weight, 1.0), ring("weights", in_group * of_weight, 1.0, among=group)]
    else:
        parts.append(ring("weights", accumulation * (large + again) * of_weight, 1.0))
    whole = trained
    if zero.zero_quantized_gradients and cluster.nodes > 1:
        whole = min(small, trained)  # vectors, which are small, are not quantized
        parts.append(_exchanged(accumulation * (trained - whole) / 2, cluster, backward if overlapped else 0.0))
    parts.append(ring("gradients", accumulation * whole * size, backward, twice=not zero.reduce_scatter))
    return Communication(parts=tuple(parts), overlapped=overlapped)


def _exchanged(payload: float, cluster: Cluster, window: float) -> Part:
    """Gradients that are exchanged all-to-all inside each node, and what is left of them between nodes (ZeRO++)."""
    here = cluster.gpus_per_node
    return Part(what="gradients", payload=payload, window=window, within=payload * (here - 1) / here,
                between=payload / here * (cluster.nodes - 1) / cluster.nodes)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of all GPUs; ranges from the best case to the worst."""

    seconds: Range
    compute: Range
    """Seconds of forward and backward passes."""
    communication: float
    """Seconds, hidden or not."""
    exposed: Range
    """Seconds of it that are not hidden behind compute."""
    images_per_second: Range
    """Of all GPUs, the worst case first."""


def step_time(work: Work, mfu: Range, cluster: Cluster, precision: str, *, micro_batch: int, accumulation: int,
              recomputes: bool, communication: Communication, backward: bool = True) -> Step:
    """The best case has the higher MFU and hides all that can be hidden, the worst the lower one and hides nothing.

    A step computes 3 x forward (the backward pass is twice the forward pass), and 4 x with recomputation, of which MFU
    counts 3 (PaLM, arXiv:2204.02311). Retention counts as it is performed: attention counts so in the measured MFUs.
    These include the exposed communication of their own runs, which here comes on top. Not in it: waits for data, the
    update by an optimizer in the machine's memory (offload_optimizer), whose time is not known, and what is copied for
    it.

    Args:
        mfu: parts of the peak, each in (0, 1].
        backward: whether there is more than a forward pass; not in a linear probe, of whose head alone there is one.

    Raises:
        SettingsError: the peak of the GPU in this precision is not known.
    """
    images = micro_batch * accumulation
    passes = (4 if recomputes else 3) if backward else 1
    least = passes * work.total * images / cluster.gpu.peak(precision)
    compute = Range(least / mfu.high, least / mfu.low)
    communication_s = communication.seconds(cluster)
    exposed = Range(communication.exposed(cluster, compute.low), communication_s)
    seconds = Range(compute.low + exposed.low, compute.high + exposed.high)
    return Step(seconds=seconds, compute=compute, communication=communication_s, exposed=exposed,
                images_per_second=Range(images * cluster.world / seconds.high, images * cluster.world / seconds.low))
