"""What a run takes of each GPU's memory, of its machine's where it offloads or copies checkpoints, and of the disk.

Which tensors DeepSpeed 0.19 holds was found by counting those of runs on two processes, as tests/test_memory.py does;
its own estimators know weights, gradients and optimizer alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from vir.config import OptimConfig, RunConfig
from vir.engine.ds_config import ZeroSettings, precision, zero_settings, zero_stage
from vir.engine.optimizer import FUSED, parameter_groups, states_per_number
from vir.engine.stacks import repeated_blocks
from vir.errors import SettingsError
from vir.planning.activations import Activations, measure
from vir.weights.metadata import DTYPES
from vir.weights.spec import ModelSpec

CONTEXT = 1_500_000_000
"""Bytes of a GPU that CUDA, NCCL, cuBLAS and their like take: an assumption, at the upper end of what is usual."""
FRAGMENTATION = 0.05
"""Share of activations and of what is temporary that PyTorch's allocator holds beyond it: an assumption."""
_REDUCED_AT_ONCE = 500_000_000
"""Gradients that DeepSpeed copies into one buffer to reduce them without ZeRO."""
_ALIGNED = 2
"""Numbers to which DeepSpeed pads the parts of ranks in stages 1 and 2."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of a network: numbers (not bytes) of its parameters."""

    groups: tuple[tuple[int, ...], ...]
    """Of each trained parameter, by groups of the optimizer."""
    frozen: tuple[int, ...]
    """Of each parameter that is not trained."""
    units: tuple[tuple[int, ...], ...] = ()
    """Of the parameters that are whole together in stage 3: of a repeated block, or of a layer outside of them, and
    those of the model itself."""

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def all(self) -> int:
        return self.trained + sum(self.frozen)

    @property
    def each(self) -> list[int]:
        return [size for group in (*self.groups, self.frozen) for size in group]

    def shares(self, stage: int, ranks: int) -> list[int]:
        """Numbers of each group of which a rank holds masters and optimizer state, with padding."""
        if stage == 0:
            return [sum(group) for group in self.groups]
        if stage == 3:
            return [sum(-(-size // ranks) for size in group) for group in self.groups]
        return [-(-sum(group) // (_ALIGNED * ranks)) * _ALIGNED for group in self.groups]


def count_numbers(network: nn.Module, groups: Sequence[Mapping[str, Any]]) -> Numbers:
    """Of a network, also of one that ZeRO 3 has cut to pieces.

    Args:
        groups: as engine.optimizer.parameter_groups gives them.
    """
    sizes = {name: int(getattr(p, "ds_numel", p.numel())) for name, p in network.named_parameters()}
    trained = tuple(tuple(sizes[name] for name in group["names"]) for group in groups)
    frozen = tuple(sizes[name] for name, p in network.named_parameters() if not p.requires_grad)
    blocks = repeated_blocks(network)
    inside = {id(module) for block in blocks for module in block.modules()}
    own = list(network.parameters(recurse=False))
    layers = [module.parameters(recurse=False) for module in network.modules() if id(module) not in inside]
    units = [tuple(int(getattr(p, "ds_numel", p.numel())) for p in (*unit, *own))
             for unit in (*(block.parameters() for block in blocks), *layers[1:])]
    return Numbers(groups=trained, frozen=frozen, units=tuple(units))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank; on its GPU but for host. Not all of them are there at the same time, see total."""

    weights: int
    """In the precision of training, with those that ZeRO++ keeps a second time on each node."""
    gradients: int
    """Of all micro-batches of a step."""
    masters: int
    """Weights in float32; 0 where the weights themselves are."""
    optimizer: int
    average: int
    """Of the weights, in float32."""
    buckets: int
    """In which gradients are reduced; where the optimizer is offloaded also those through which they go to the host."""
    gathered: int = 0
    """Stage 3: the most weights that are whole at a time."""
    update: int
    """Gradients in float32 in the optimizer's step, at another time than activations; without ZeRO in fp32 the buffer
    in which they are reduced after the backward pass."""
    activations: int = 0
    """Kept for the backward pass, with the inputs, of one micro-batch."""
    temporary: int = 0
    """Beyond them at the peak, with gradients that are not yet in a bucket."""
    teacher: int = 0
    reserved: int = 0
    """By CUDA, its libraries and fragmentation: assumed, not measured."""
    host: int = 0
    """In the memory of the machine, where the JSON offloads."""

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer + self.average

    @property
    def total(self) -> int:
        """What the GPU must have: what is always there, and more of what passes need and what the update needs.

        Gradients and activations count whole, although gradients come as activations go: an upper bound where there is
        one micro-batch a step.
        """
        passes = self.gathered + self.activations + self.temporary
        return self.states + self.buckets + self.teacher + self.reserved + max(passes, self.update)


def plan_states(numbers: Numbers, ds_json: dict[str, Any], ranks: int, optim: OptimConfig, averages: bool,
                accumulation: int) -> Memory:
    """All but activations, and buffers of the network.

    Weights are sharded in stage 3, gradients from stage 2 on, the rest from stage 1 on (ZeRO, arXiv:1910.02054, table
    1). Stage 1 cuts gradients to a share after the last backward pass of a step, and holds both for a moment; where it
    overlaps the only one, it needs no more than stage 2. Stage 2 adds the share of each further micro-batch to that of
    those before it.

    Args:
        averages: whether an average of the weights is kept.
        accumulation: micro-batches of a rank in a step.
    """
    zero, itemsize = zero_settings(ds_json), DTYPES[precision(ds_json)].itemsize
    summed = DTYPES[ds_json.get("data_types", {}).get("grad_accum_dtype") or precision(ds_json)].itemsize
    share, masters = sum(numbers.shares(zero.stage, ranks)), 4 * (zero.stage > 0 or itemsize < 4)
    pieces = sum(-(-size // ranks) for size in numbers.each)
    weights = itemsize * (pieces if zero.stage == 3 else numbers.all)
    largest = itemsize * max((max(group) for group in numbers.groups), default=0)
    gathered, on_the_way = _gathered(numbers, zero)
    found = dict(weights=weights, gradients=_gradients(numbers, zero, itemsize, summed, share, ranks, accumulation),
                 masters=masters * share, optimizer=4 * states_per_number(optim) * share,
                 average=4 * averages * share, buckets=bucket_bytes(zero, itemsize, ranks),
                 gathered=itemsize * gathered, temporary=itemsize * on_the_way if zero.stage == 3 else largest,
                 update=_update(numbers, zero, itemsize, summed, optim, ranks))
    if zero.offload_optimizer:
        found["host"] = sum(found[key] for key in ("masters", "optimizer", "average")) + 4 * share
        found |= dict(masters=0, optimizer=0, average=0, update=0)
        if zero.stage == 3:
            found["host"] += summed * share
        else:
            found["host"] += itemsize * share * (1 + (accumulation > 1)) + largest
            found["buckets"] += largest
    if zero.offload_param:
        found["host"] = found.get("host", 0) + weights
        found["weights"] = 0
    if zero.stage == 3 and (part := min(zero.zero_hpz_partition_size, ranks)) > 1:
        found["weights"] += itemsize * sum(-(-size // part) for size in numbers.each)
    return Memory(**found)


def _gradients(numbers: Numbers, zero: ZeroSettings, itemsize: int, summed: int, share: int, ranks: int,
               accumulation: int) -> int:
    """Of one step, in bytes, on the device.

    Args:
        summed: bytes of a number of the accumulated gradient.
    """
    if zero.stage == 0 or zero.stage == 1 and (accumulation > 1 or not _overlaps(zero, ranks)):
        part = share if zero.stage and not zero.offload_optimizer else 0
        return itemsize * (numbers.trained + part)
    if zero.offload_optimizer:
        return 0
    again = zero.stage < 3 and accumulation > 1 and summed == itemsize
    return summed * share * (2 if again else 1)


def _update(numbers: Numbers, zero: ZeroSettings, itemsize: int, summed: int, optim: OptimConfig, ranks: int) -> int:
    """Of what the step makes of gradients: a flat copy and one in float32, group by group, in bytes.

    Stage 3 goes by parts of a group. What stage 2 sums in float32 is flat already. Optimizers that are not fused make a
    tensor as large as that in float32 of their own, when the flat copy is gone. Before, the norm takes a copy in
    float64 of one gradient after the other.
    """
    own = 0 if optim.name in FUSED else 4
    if zero.stage == 0:
        reduced = 4 * min(numbers.trained, _REDUCED_AT_ONCE) * (ranks > 1)
        return (4 + own) * numbers.trained if itemsize < 4 else max(reduced, own * numbers.trained)
    largest = max(numbers.shares(zero.stage, ranks), default=0)
    if zero.stage == 3:
        largest = min(largest, zero.sub_group_size + max(numbers.each, default=0) // ranks)
    norm = 8 * min(largest, max(map(max, numbers.groups), default=0)) * (zero.stage < 3)
    if summed > itemsize and zero.stage == 2:
        return max(norm, largest * own)
    return max(norm, largest * (4 + max(own, summed if summed < 4 else 0)))


def _gathered(numbers: Numbers, zero: ZeroSettings) -> tuple[int, int]:
    """Numbers of the weights that are whole at a time in stage 3, and those of what is on the way.

    Small parameters stay whole. Of the others those of a block, or of a layer outside of the blocks, are gathered at
    once. The fetching ahead goes on from layer to layer and is bounded by stage3_max_live_parameters alone, not by
    stage3_prefetch_bucket_size; what comes again within stage3_max_reuse_distance is kept.
    On the way are weights as they are gathered, and gradients of one unit with the flat copy that is reduced.
    """
    if zero.stage < 3:
        return 0, 0
    threshold = zero.stage3_param_persistence_threshold
    small = sum(size for size in numbers.each if size <= threshold)
    unit = max((sum(size for size in unit if size > threshold) for unit in numbers.units), default=0)
    ahead = max(zero.stage3_max_live_parameters if zero.stage3_prefetch_bucket_size else 0,
                zero.stage3_max_reuse_distance)
    return small + min(numbers.all - small, ahead + unit), unit + 2 * max(map(sum, numbers.units), default=0)


def _overlaps(zero: ZeroSettings, ranks: int) -> bool:
    """Whether gradients are reduced in the backward pass; engine.ds_config.complete switches it off for one rank."""
    return zero.overlap_comm and (ranks > 1 or zero.stage == 3)


def bucket_bytes(zero: ZeroSettings, itemsize: int, ranks: int) -> int:
    """Of the buffers in which ZeRO reduces gradients: two where that overlaps the backward pass of stage 1 or 2."""
    if not zero.stage or not zero.contiguous_gradients:
        return 0
    return itemsize * zero.reduce_bucket_size * (2 if zero.stage < 3 and _overlaps(zero, ranks) else 1)


class MemoryPlanner:
    """What ranks of a run take with one DeepSpeed JSON or another; without torch.compile, with which they take less.

    Its methods take a checked JSON (engine.ds_config.read) and raise
        SettingsError: what the optimizer refuses, or recomputation of a model that has none.
        NotMeasuredError: activations cannot be measured; plan_states tells the rest.

    Args:
        network, spec: of models.build.sketch.
        on_gpu: CUDA takes its share.
        teacher: bytes of the model that teaches, with what it takes in a forward pass.
        fused: the GPU has the fused kernel of retention; without it the form is the one of CPUs.
    """

    def __init__(self, network: nn.Module, spec: ModelSpec, config: RunConfig, ranks: int, on_gpu: bool,
                 teacher: int = 0, *, fused: bool = True) -> None:
        self.numbers = count_numbers(network, parameter_groups(network, config.optim))
        self._config, self._ranks, self._on_gpu, self._teacher = config, ranks, on_gpu, teacher
        self._buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())
        self._measured = cache(lambda micro_batch, precision, recomputes: measure(
            network, spec, config, micro_batch, precision, recomputes, on_gpu and fused))

    def plan(self, ds_json: dict[str, Any], micro_batch: int | None = None) -> Memory:
        """Of one rank.

        Args:
            micro_batch: images; those of config.train.micro_batch_size when None.
        """
        batch = self._config.train.micro_batch_size if micro_batch is None else micro_batch
        return self._with(ds_json, batch, self._activations(ds_json, batch))

    def largest_micro_batch(self, ds_json: dict[str, Any], capacity: int) -> int:
        """Images of the largest micro-batch found to fit into `capacity` bytes, however large the global batch; 0 where
        none fits. It is even where samples are mixed in pairs.

        Activations are measured at two micro-batches, for each further one takes time with all shipped JSONs. The peak
        is the largest of several lines, so between two micro-batches it is at or below the line through them: what is
        found does fit, and hardly more does.
        """
        step = 2 if self._config.augment.mixes else 1

        def measured(batch: int) -> Activations:
            return self._activations(ds_json, batch)

        def fits(batch: int, found: Activations) -> bool:
            return self._with(ds_json, batch, found).total <= capacity

        low = max(step, self._config.train.micro_batch_size // step * step)
        if not fits(low, Activations(saved=0, peak=0)):
            return 0  # with smaller ones the rest takes as much
        if fits(low, measured(low)):
            high = step * math.ceil(2 * capacity / measured(low).peak * low / step)
            while fits(high, measured(high)):
                low, high = high, 2 * high
        elif low > step and fits(step, measured(step)):
            low, high = step, low
        else:
            return 0
        ends = measured(low), measured(high)
        return _last(low, high - step, step, lambda batch: fits(batch, _between(*ends, (batch - low) / (high - low))))

    def _activations(self, ds_json: dict[str, Any], micro_batch: int) -> Activations:
        return self._measured(micro_batch, precision(ds_json), "activation_checkpointing" in ds_json)

    def _with(self, ds_json: dict[str, Any], micro_batch: int, found: Activations) -> Memory:
        """What a rank takes where its activations are those that were found."""
        accumulation = max(1, self._config.train.global_batch_size // (micro_batch * self._ranks))
        states = plan_states(self.numbers, ds_json, self._ranks, self._config.optim, self._config.ema.decay > 0,
                             accumulation)
        temporary = states.temporary + found.peak - found.saved
        reserved = CONTEXT + int(FRAGMENTATION * (found.saved + temporary)) if self._on_gpu else 0
        return dataclasses.replace(states, weights=states.weights + self._buffers, activations=found.saved,
                                   temporary=temporary, teacher=self._teacher, reserved=reserved)


def _between(low: Activations, high: Activations, part: float) -> Activations:
    return Activations(saved=math.ceil((1 - part) * low.saved + part * high.saved),
                       peak=math.ceil((1 - part) * low.peak + part * high.peak))


def _last(first: int, last: int, step: int, holds: Callable[[int], bool]) -> int:
    """The last of first, first + step, ..., last for which it holds, from the first one on."""
    low, high = 0, (last - first) // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(first + middle * step) else (low, middle - 1)
    return first + low * step


@dataclass(frozen=True, kw_only=True)
class CheckpointBytes:
    """Of the files that ranks write of a checkpoint, without what is as small as their names."""

    ranks: int
    first: int
    """Of rank 0."""
    other: int
    """Of each other rank."""

    @property
    def total(self) -> int:
        return self.of(range(self.ranks))

    def of(self, ranks: Collection[int]) -> int:
        """Of these ranks together; where checkpoints are asynchronous, also of the host memory of their copies."""
        return self.other * len(ranks) + (self.first - self.other) * (0 in ranks)


def checkpoint_bytes(numbers: Numbers, ds_json: dict[str, Any], ranks: int, optim: OptimConfig,
                     averages: bool) -> CheckpointBytes:
    """Each rank writes the masters, optimizer state and average of its share, and rank 0 the weights as they compute.

    Without ZeRO rank 0 writes all. In stage 3 no weights but masters are written, and of frozen ones each rank's piece.
    """
    stage, itemsize = zero_stage(ds_json), DTYPES[precision(ds_json)].itemsize
    masters = stage > 0 or itemsize < 4
    share = 4 * (masters + states_per_number(optim) + averages) * sum(numbers.shares(stage, ranks))
    if stage == 3:
        share += itemsize * sum(-(-size // ranks) for size in numbers.frozen)
        return CheckpointBytes(ranks=ranks, first=share, other=share)
    return CheckpointBytes(ranks=ranks, first=share + itemsize * numbers.all, other=share if stage else 0)


def check_host_memory(copies: int, available: float, ranks: int, stage: int, node: str = "this node") -> None:
    """Raises SettingsError where the copies of a checkpoint do not fit into a node.

    What the run takes there later is not counted: loader processes, and in the first step what is offloaded.

    Args:
        copies: bytes of all ranks of the node; see CheckpointBytes.of.
        available: bytes; see control_groups.available_memory.
        ranks: of the node.
        stage: of ZeRO.
    """
    if copies <= available:
        return
    fewer = ", or start fewer ranks on each node" if stage and ranks > 1 else ""
    raise SettingsError(
        f"the copies of a checkpoint in host memory need {copies / 1e9:.3g} GB for the {ranks} rank{'s' * (ranks > 1)} "
        f"of {node}, where {available / 1e9:.3g} GB are available; give --checkpoint.asynchronous false, with which "
        f"training waits for the disk and nothing is copied{fewer}")
