"""Where a rank holds weights, float32 masters and optimizer state: one class per layout of DeepSpeed in memory.

Each has the same methods: backward, step, grad_norm, show, pieces and set_frozen.

Facts of DeepSpeed 0.19 that shape them, each seen by running it:
- without ZeRO, bf16 creates the optimizer state by a step on zero gradients, which Adam counts;
- without ZeRO, fp16 divides the gradient by the loss scale but never multiplies the loss by it;
- without ZeRO, fp32 lets a non-finite gradient into the weights; every other mode skips the step;
- without ZeRO and in stages 1 and 2 it looks for numbers that are not finite twice: in every gradient by a dozen
  operators (of which it waits for one, without ZeRO), then in their norm, which none of them leaves finite;
- in stage 3 its stream for gathering weights never waits for the stream that has changed them;
- under ZeRO 1 and 2 a rank may hold nothing but the padding of a group, and steps it all the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Callable, Iterator, NamedTuple

import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn
from torch.optim import Optimizer

from vir.checkpoints.partitions import EMA, WEIGHT
from vir.engine.loss_scale import LossScale


class Piece(NamedTuple):
    """The part of a parameter that this rank holds: numbers [start, stop) of the flattened parameter."""

    name: str
    master: Tensor
    """The tensor that the optimizer steps; it may hold pieces of many parameters."""
    offset: int
    """Of the piece in the flattened master."""
    start: int
    stop: int


class Layout(ABC):
    """What is the same in every layout.

    Args:
        deepspeed: a DeepSpeedEngine.
        optimizer: the one that owns the masters and their state.
    """

    def __init__(self, deepspeed: Any, optimizer: Optimizer, precision: str, loss_scale: LossScale) -> None:
        self.deepspeed, self.optimizer, self.precision, self.loss_scale = deepspeed, optimizer, precision, loss_scale

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a micro-batch's mean loss; DeepSpeed divides by the accumulation itself."""
        self.deepspeed.backward(loss)

    def step(self) -> bool:
        """Apply the gradients of a global batch where they are finite, and tell whether they were. Collective.

        The host waits for the device here, to learn of the norm: in each stage once for the number, in ZeRO 1 and 2 and
        without ZeRO in low precision also for a few constants that DeepSpeed puts on the device for each group of
        parameters. Beside that it waits at the end of a backward pass, in ZeRO 3 and where overlap_comm is set.
        """
        self.deepspeed.step()
        return bool(self.deepspeed.was_step_applied())

    def grad_norm(self) -> float:
        """Norm of the last global batch's gradient before clipping."""
        return float(self.deepspeed.get_global_grad_norm())

    @abstractmethod
    def show(self, key: str) -> None:
        """Let the module compute with the masters (WEIGHT) or their average (EMA), in its own precision. Collective.

        An average that has not begun is the master itself. Calling it again with the same key changes nothing.
        """

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """What this rank holds."""

    @torch.no_grad()
    def set_frozen(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Give the parameters that are not trained their numbers. Collective.

        Args:
            read: from the name of a parameter to its numbers [start, stop), flat.
        """
        for name, parameter in self.frozen().items():
            parameter.copy_(read(name, 0, parameter.numel()).view(parameter.shape))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.deepspeed.module.named_parameters()
                if parameter.requires_grad}

    def frozen(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.deepspeed.module.named_parameters()
                if not parameter.requires_grad}


class Unsharded(Layout):
    """Without ZeRO: every rank holds everything. In fp32 the weights are their own masters."""

    def __init__(self, deepspeed: Any, optimizer: Optimizer, precision: str, loss_scale: LossScale) -> None:
        super().__init__(deepspeed, optimizer, precision, loss_scale)
        self._norm: float | None = None
        self._exchanged = False  # whether weights and average have changed places
        if precision != "fp32":
            optimizer.state.clear()
            deepspeed.optimizer.overflow_checker.check = lambda: False  # the norm tells

    def backward(self, loss: Tensor) -> None:
        super().backward(loss.float() * self.loss_scale.value if self.precision == "fp16" else loss)

    def step(self) -> bool:
        if self.precision == "fp32":
            gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(self._norm):
                self.deepspeed.zero_grad()
                self.deepspeed.micro_steps += 1
                return False
        applied = super().step()
        if self.precision == "fp16":
            self._norm = super().grad_norm() / self.loss_scale.value if applied else math.inf
        return applied

    def grad_norm(self) -> float:
        return super().grad_norm() if self._norm is None else self._norm

    @torch.no_grad()
    def show(self, key: str) -> None:
        state = self.optimizer.state
        exchange = self._exchanged != (key == EMA)
        for parameter, master in self._masters():
            if parameter is not master:
                parameter.copy_(master if key == WEIGHT else state[master].get(key, master))
            elif exchange and EMA in state[master]:  # no average where no gradient has ever come
                average, weight = state[master][EMA], master.clone()
                master.copy_(average)
                average.copy_(weight)
        self._exchanged = key == EMA

    def pieces(self) -> Iterator[Piece]:
        masters = dict(self._masters())
        for name, parameter in self.trainable().items():
            yield Piece(name, masters[parameter], 0, 0, parameter.numel())

    def _masters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its float32 master."""
        if self.precision == "fp32":
            yield from ((parameter, parameter) for parameter in self.trainable().values())
        else:
            wrapper = self.deepspeed.optimizer
            for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups):
                yield from zip(group, masters)


class Partitioned(Layout):
    """ZeRO 1 and 2: the masters of each group are one flat vector, of which a rank holds one partition."""

    def __init__(self, deepspeed: Any, optimizer: Optimizer, precision: str, loss_scale: LossScale) -> None:
        super().__init__(deepspeed, optimizer, precision, loss_scale)
        wrapper = deepspeed.optimizer
        self._device_norm = wrapper.scaled_global_norm
        wrapper.scaled_global_norm = self._host_norm
        wrapper.has_overflow = lambda partition_gradients: False  # the norm tells
        wrapper.update_offload_overflow_tracker = lambda gradient: None

    def _host_norm(self) -> Tensor:
        """Of the scaled gradient, in the host's memory: DeepSpeed reads it again for each group of parameters."""
        wrapper = self.deepspeed.optimizer
        if wrapper.cpu_offload and (norms := wrapper.norm_for_param_grads):  # of which it would read one by one
            wrapper.norm_for_param_grads = dict(zip(norms, torch.stack(list(norms.values())).cpu()))
        return self._device_norm().cpu()

    @torch.no_grad()
    def show(self, key: str) -> None:
        wrapper, rank = self.deepspeed.optimizer, self.deepspeed.global_rank
        for low, flat in zip(wrapper.parallel_partitioned_bit16_groups, wrapper.single_partition_of_fp32_groups):
            low[rank].copy_(flat if key == WEIGHT else self.optimizer.state[flat].get(key, flat))
        all_gather_dp_groups(groups_flat=wrapper.bit16_groups_flat,
                             partitioned_param_groups=wrapper.parallel_partitioned_bit16_groups,
                             dp_process_group=wrapper.real_dp_process_group,
                             start_alignment_factor=wrapper.nccl_start_alignment_factor,
                             allgather_bucket_size=wrapper.allgather_bucket_size)

    def pieces(self) -> Iterator[Piece]:
        """Also an empty piece for each group: a rank whose partition is only padding needs optimizer state as well."""
        flat = self.deepspeed.optimizer.single_partition_of_fp32_groups
        for master, group in zip(flat, self.optimizer.param_groups):
            yield Piece(group["names"][0], master, 0, 0, 0)
        for name, parameter in self.trainable().items():
            if (held := getattr(parameter, "_hp_mapping")) is not None:
                low = held.lp_fragment_address
                yield Piece(name, flat[held.param_group_index], held.hp_fragment_address.start, low.start,
                            low.start + low.numel)


class Sharded(Layout):
    """ZeRO 3: weights and masters of each parameter are cut into one piece per rank."""

    def step(self) -> bool:
        applied = super().step()
        self._order_gathers()
        return applied

    def _order_gathers(self) -> None:
        """Let the next gathers wait for the weights as they were just written. The host waits for nothing."""
        stream = getattr(self.deepspeed.optimizer.parameter_offload, "_DeepSpeedZeRoOffload__allgather_stream")
        if stream is not None:  # on a GPU
            stream.wait_stream(torch.cuda.current_stream())

    @torch.no_grad()
    def show(self, key: str) -> None:
        wrapper = self.deepspeed.optimizer
        wrapper.checkpoint_event_prologue()  # lets go of weights that are still gathered
        for parameter in self.trainable().values():
            group, *_ = wrapper.grad_position[wrapper.get_param_id(parameter)]
            begun = key in self.optimizer.state[wrapper.fp32_partitioned_groups_flat[group]]
            getattr(parameter, "ds_tensor").copy_(safe_get_local_optimizer_state(parameter, key) if begun
                                                  else safe_get_local_fp32_param(parameter))
        self._order_gathers()
        wrapper.checkpoint_event_epilogue()  # gathers the small ones, which stay so

    @torch.no_grad()
    def set_frozen(self, read: Callable[[str, int, int], Tensor]) -> None:
        wrapper = self.deepspeed.optimizer
        wrapper.checkpoint_event_prologue()
        for name, parameter in self.frozen().items():
            held = getattr(parameter, "ds_tensor")
            start = self.deepspeed.global_rank * held.numel()
            stop = max(start, min(start + held.numel(), getattr(parameter, "ds_numel")))
            held[:stop - start].copy_(read(name, start, stop))
        self._order_gathers()
        wrapper.checkpoint_event_epilogue()

    def pieces(self) -> Iterator[Piece]:
        wrapper = self.deepspeed.optimizer
        for name, parameter in self.trainable().items():
            group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = self.deepspeed.global_rank * length
            yield Piece(name, wrapper.fp32_partitioned_groups_flat[group], offset, start,
                        max(start, min(start + length, getattr(parameter, "ds_numel"))))


LAYOUTS: dict[int, type[Layout]] = {0: Unsharded, 1: Partitioned, 2: Partitioned, 3: Sharded}
"""By ZeRO stage."""
