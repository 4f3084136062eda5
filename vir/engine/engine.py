"""The model under DeepSpeed: forward, backward, a step that says whether it was applied, evaluation, its whole state.

Facts of DeepSpeed 0.19 that shape this room, each seen by running it:
- backward() divides by the accumulation itself, so the loss is never divided here;
- without ZeRO, bf16 creates the optimizer state by a step on zero gradients, which Adam counts;
- without ZeRO, fp16 divides the gradient by the loss scale but never multiplies the loss by it;
- fp16 raises the loss scale before it divides the gradient by it;
- without ZeRO, fp32 lets a non-finite gradient into the weights; every other mode skips the step;
- its load_checkpoint wants the same world and stage, brings back old rates, and with some arguments loads nothing;
- buffers keep their dtype and differ between ranks, inputs are not cast.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state, set_z3_leaf_modules
from pydantic import ValidationError
from torch import Tensor, nn

from vir.checkpoints.info import CheckpointInfo
from vir.checkpoints.partitions import EMA_BUFFERS, WEIGHT, Partitions
from vir.config import RunConfig
from vir.distributed import World
from vir.engine import ds_config as ds
from vir.engine import ema
from vir.engine.batch_norm import RunningStatistics, batch_norms, compute_in_float32
from vir.engine.optimizer import build, parameter_groups, set_rates
from vir.errors import LossScaleError, SettingsError

deepspeed.utils.logger.setLevel("WARNING")

# DeepSpeed's two loss scalers, with ZeRO and without, call the same things by these names.
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """One data-parallel training engine.

    Args:
        model: built and initialised the same on every rank.
        config: the run; its ema and optim sections are used here.
        ds_config: the checked JSON (ds_config.read), without batch sizes.
        accumulation: micro-batches per step.

    Raises:
        SettingsError: a precision that this machine does not have, or what DeepSpeed or the model refuses.
    """

    def __init__(self, model: nn.Module, config: RunConfig, ds_config: dict[str, Any], accumulation: int,
                 world: World) -> None:
        self.zero_stage: int = ds.zero_stage(ds_config)
        self.precision = ds.precision(ds_config)
        self.has_ema = config.ema.decay > 0
        self.updates = 0
        self._config, self._accumulation, self._world = config, accumulation, world
        if self.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise SettingsError(f"--deepspeed_config {config.deepspeed_config} enables fp16, which this machine's "
                                f"{deepspeed.accelerator.get_accelerator().device_name()} does not support; take a "
                                "bf16 or fp32 one, such as ds_configs/zero2_bf16.json")
        if "activation_checkpointing" in ds_config:
            _recompute(model)
        if self.precision != "fp32":
            compute_in_float32(model)
        if config.model.compile:
            _compile_blocks(model, self.zero_stage)
        self.groups = parameter_groups(model, config.optim)
        self._check_groups(model)
        offloads = ds.offloads(ds_config)
        # lr is written before each step; 0 until then keeps DeepSpeed's own set-up step from moving a weight.
        optimizer = (DeepSpeedCPUAdam(self.groups, lr=0.0, betas=config.optim.betas, eps=config.optim.eps,
                                      adamw_mode=config.optim.name == "adamw")
                     if offloads and config.optim.name in ("adam", "adamw") else build(self.groups, config.optim))
        settings = {**ds.complete(ds_config, config, accumulation), "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False}  # which optimizer is right where, check_name() says
        try:
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings,
                                                      dist_init_required=False)
        except (DeepSpeedConfigError, ValidationError, ZeRORuntimeException, NotImplementedError) as error:
            raise SettingsError(f"DeepSpeed refuses {config.deepspeed_config}: {error}") from error
        self.module: nn.Module = self.deepspeed.module
        self.dtype: torch.dtype = self.deepspeed.get_data_types()[0]
        self._optimizer = optimizer
        self._guards_itself = self.zero_stage > 0 or self.precision != "fp32"
        self._forgets_scale = self.zero_stage == 0 and self.precision == "fp16"
        self._norm: float | None = None
        if self.zero_stage == 0 and self.precision != "fp32":
            optimizer.state.clear()
        self._buffers = RunningStatistics(self.module, averages=self.has_ema)
        if self.has_ema:
            ema.attach(optimizer, self._decay)
        if self.has_dynamic_scale:
            self._scaler.raise_error_at_min_scale = False  # step() says it in an error of ours, in every stage
            # DeepSpeed would raise the scale before it divides by it, which halves a gradient; we do so after the step.
            self._scale_window, self._scaler.scale_window = self._scaler.scale_window, math.inf
        self.deepspeed._copy_recovery_script = lambda folder: None  # data should hold no programs

    def _check_groups(self, model: nn.Module) -> None:
        grouped = [name for group in self.groups for name in group["names"]]
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert sorted(grouped) == sorted(trainable), "a parameter outside the groups would never train"
        if scalars := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
            raise SettingsError(f"{type(model).__name__} has parameters without a dimension ({scalars[0]}), which "
                                "DeepSpeed cannot shard; take another --model.name")

    def _decay(self) -> float:
        """Of the average, at the update that follows."""
        return ema.decay_at(self.updates + 1, self._config.ema.decay, self._config.ema.warmup)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a micro-batch [B, C, H, W] of any float dtype."""
        return self.deepspeed(images.to(self.dtype))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the mean loss of one micro-batch."""
        if self._forgets_scale:
            loss = loss.float() * self.loss_scale()
        self.deepspeed.backward(loss)

    def step(self, lr: float, weight_decay: float) -> bool | None:
        """To be called after each backward. None inside an accumulation; at its end, whether the update was applied.

        An update is not applied where the gradient of the global batch is not finite; every rank gets the same answer.

        Raises:
            LossScaleError: the fp16 gradient is not finite although the loss scale is at its floor.
        """
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return None
        set_rates(self._optimizer.param_groups, lr, weight_decay)
        scale = self.loss_scale()
        applied = self._step()
        self._buffers.after_step(applied, self._decay())
        self.updates += applied
        if not applied and self.has_dynamic_scale and scale <= self._floor:
            raise LossScaleError(f"the gradient is not finite at loss scale {scale:g}, the floor (fp16.min_loss_scale)")
        return applied

    def _step(self) -> bool:
        if not self._guards_itself:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(self._norm):
                self.deepspeed.zero_grad()
                self.deepspeed.micro_steps += 1
                return False
        self.deepspeed.step()
        applied = bool(self.deepspeed.was_step_applied())
        if self._forgets_scale:
            self._norm = float(self.deepspeed.get_global_grad_norm()) / self.loss_scale() if applied else math.inf
        if applied and self.has_dynamic_scale:
            self._raise_scale()
        return applied

    def _raise_scale(self) -> None:
        """After each `loss_scale_window` steps without an overflow."""
        scaler = self._scaler
        if (scaler.cur_iter - scaler.last_overflow_iter - 1) % self._scale_window == 0:
            scaler.cur_scale *= scaler.scale_factor
            if hasattr(scaler, "cur_hysteresis"):
                scaler.cur_hysteresis = scaler.delayed_shift

    def grad_norm(self) -> float:
        """Norm of the last global batch's gradient before clipping."""
        return float(self._norm if self._norm is not None else self.deepspeed.get_global_grad_norm())

    @property
    def _scaler(self) -> Any:
        wrapper = self.deepspeed.optimizer
        return wrapper.loss_scale_config if self.zero_stage == 0 else wrapper.loss_scaler

    @property
    def has_dynamic_scale(self) -> bool:
        """Whether overflow is how fp16's loss scale finds its place."""
        return self.precision == "fp16" and bool(self.deepspeed.optimizer.dynamic_loss_scale
                                                 if self.zero_stage else self._scaler.dynamic_loss_scale)

    @property
    def _floor(self) -> float:
        return self._scaler.min_loss_scale if self.zero_stage == 0 else self._scaler.min_scale

    def loss_scale(self) -> float:
        """By which fp16 multiplies the loss; 1 in other precisions."""
        return float(self._scaler.cur_scale) if self.precision == "fp16" else 1.0

    def loss_scaler_state(self) -> dict[str, float]:
        if self.precision != "fp16":
            return {}
        return {name: getattr(self._scaler, name) for name in _SCALER_STATE
                if getattr(self._scaler, name, None) is not None}

    @contextmanager
    def evaluating(self, averaged: bool) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from images [B, C, H, W] to logits by the weights, or by their average, in evaluation mode.

        The average takes the weights' place, sharded as they are, so that no second model is held; after the block
        the weights are back, bit for bit. Collective, and under ZeRO 3 so is each call of the function. An error in the
        block is the end of the engine: other ranks may not have met it, so nothing that needs them is done then.
        """
        averaged = averaged and self.updates > 0
        if averaged:
            self._show(ema.KEY)
            self._buffers.swap()
        self.deepspeed.eval()
        with torch.no_grad():
            yield self.__call__
        self.deepspeed.train()
        if averaged:
            self._buffers.swap()
            self._show(WEIGHT)

    @torch.no_grad()
    def _show(self, key: str) -> None:
        """Make the module compute with the float32 masters, or with their average, in its own precision. Collective."""
        wrapper, state = self.deepspeed.optimizer, self._optimizer.state
        if self.zero_stage == 0:
            for parameter, master in self._masters():
                if parameter is master:  # the weights have no second home: they change places with the average
                    if ema.KEY in state[master]:  # not where no gradient has ever come
                        average, values = state[master][ema.KEY], master.clone()
                        master.copy_(average)
                        average.copy_(values)
                else:
                    parameter.copy_(master if key == WEIGHT else state[master].get(key, master))
        elif self.zero_stage < 3:
            rank = self._world.rank
            for low, flat in zip(wrapper.parallel_partitioned_bit16_groups, wrapper.single_partition_of_fp32_groups):
                low[rank].copy_(flat if key == WEIGHT else state[flat][key])
            all_gather_dp_groups(groups_flat=wrapper.bit16_groups_flat,
                                 partitioned_param_groups=wrapper.parallel_partitioned_bit16_groups,
                                 dp_process_group=wrapper.real_dp_process_group,
                                 start_alignment_factor=wrapper.nccl_start_alignment_factor,
                                 allgather_bucket_size=wrapper.allgather_bucket_size)
        else:
            wrapper.checkpoint_event_prologue()  # lets go of weights that are still gathered
            for parameter in self._trainable().values():
                parameter.ds_tensor.copy_(safe_get_local_fp32_param(parameter) if key == WEIGHT
                                          else safe_get_local_optimizer_state(parameter, key))
            wrapper.checkpoint_event_epilogue()  # gathers the small ones, which stay so

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def _masters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Without ZeRO: each parameter with its float32 master, in fp32 itself."""
        wrapper = self.deepspeed.optimizer
        if self.precision == "fp32":
            yield from ((parameter, parameter) for parameter in self._trainable().values())
        else:
            for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups):
                yield from zip(group, masters)

    def _pieces(self) -> Iterator[tuple[str, Tensor, int, int, int]]:
        """What this rank holds of each parameter: (name, flat master that holds it, place in that, start, stop).

        [start, stop) counts in the flattened parameter.
        """
        wrapper = self.deepspeed.optimizer
        masters = dict(self._masters()) if self.zero_stage == 0 else {}
        for name, parameter in self._trainable().items():
            if self.zero_stage == 0:
                yield name, masters[parameter], 0, 0, parameter.numel()
            elif self.zero_stage < 3:
                if (piece := parameter._hp_mapping) is not None:
                    flat, low = wrapper.single_partition_of_fp32_groups, piece.lp_fragment_address
                    yield (name, flat[piece.param_group_index], piece.hp_fragment_address.start, low.start,
                           low.start + low.numel)
            else:
                group, place, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
                start = self._world.rank * length
                yield (name, wrapper.fp32_partitioned_groups_flat[group], place, start,
                       max(start, min(start + length, parameter.ds_numel)))

    def save(self, root: Path, name: str) -> list[str]:
        """Write DeepSpeed's files to root/name and tell what went wrong on this rank. Collective."""
        wrong: list[str] = []
        write = self.deepspeed.checkpoint_engine.save

        def note(state_dict: Any, path: str) -> None:
            try:
                write(state_dict, path)
            except (OSError, RuntimeError) as error:  # the other ranks wait for this one further on
                wrong.append(f"{path}: {error}")

        self.deepspeed.checkpoint_engine.save = note
        try:
            self.deepspeed.save_checkpoint(str(root), tag=name, save_latest=False,
                                           client_state={EMA_BUFFERS: self._buffers.average})
        finally:
            self.deepspeed.checkpoint_engine.save = write
        return wrong

    @torch.no_grad()
    def restore(self, found: Partitions, info: CheckpointInfo) -> None:
        """Take up weights, average, optimizer state and counters from any world size, ZeRO stage and precision.

        Each rank reads its own share of each parameter. Collective.

        Raises:
            SettingsError: the checkpoint has other parameters.
        """
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self._trainable().items()}
        if wrong := sorted(name for name in shapes.keys() | found.shapes.keys()
                           if shapes.get(name) != found.shapes.get(name)):
            raise SettingsError(f"the checkpoint and the model differ in {len(wrong)} parameters: "
                                f"{', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}; resume with the model that "
                                "it was saved from")
        if self.zero_stage in (1, 2):  # a rank may hold nothing but the padding of a group, and steps it all the same
            for flat, group in zip(self.deepspeed.optimizer.single_partition_of_fp32_groups, self.groups):
                self._begin_state(flat, group["names"][0], found)
        for name, flat, place, start, stop in self._pieces():
            here = slice(place, place + stop - start)
            flat.data.view(-1)[here].copy_(found.read(name, WEIGHT, start, stop))
            for key in self._begin_state(flat, name, found):
                self._optimizer.state[flat][key].view(-1)[here].copy_(found.read(name, key, start, stop))
        for group in self._optimizer.param_groups:
            group.update(found.counters(group["names"][0]))
        if not (self.zero_stage == 0 and self.precision == "fp32"):
            self._show(WEIGHT)
        self._buffers.restore(found.buffers, found.ema_buffers)
        if self.has_dynamic_scale:
            for name, value in info.loss_scaler.items():
                setattr(self._scaler, name, value)
        self.updates = info.updates
        self.deepspeed.global_steps = info.step
        self.deepspeed.skipped_steps = info.step - info.updates
        self.deepspeed.global_samples = info.samples_seen
        self.deepspeed.micro_steps = info.step * self._accumulation

    def _begin_state(self, flat: Tensor, name: str, found: Partitions) -> list[str]:
        """Make room for the optimizer's state of a master, as `found` has it of a parameter; the keys to be read."""
        keys = found.keys(name)
        if not keys and not found.scalars(name):
            return []  # never stepped: an optimizer fills only a state that is empty
        # An average that was not kept before reads as the weights.
        keys = [key for key in keys if key != ema.KEY] + ([ema.KEY] if self.has_ema else [])
        state = self._optimizer.state[flat]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(flat, dtype=torch.float32)
        state.update({key: self._scalar(value, flat) for key, value in found.scalars(name).items()})
        return keys

    def _scalar(self, value: Any, flat: Tensor) -> Any:
        """A number of the optimizer's state; the step is an int in DeepSpeed's Adam and a tensor in torch's."""
        if isinstance(self._optimizer, DeepSpeedCPUAdam):
            return int(value)
        if isinstance(self._optimizer, torch.optim.Adam):
            return torch.tensor(float(value), device=flat.device)  # where the fused kernel wants it
        return value.clone() if isinstance(value, Tensor) else value

    def close(self) -> None:
        self.deepspeed.destroy()


def _compile_blocks(model: nn.Module, zero_stage: int) -> None:
    """Compile the forward of each repeated block (regional compilation): one graph serves all blocks of a kind.

    Under ZeRO 3 a block's weights are then gathered at once, before its graph: hooks within would cut it to pieces.
    """
    for owner in model.modules():
        blocks = list(owner.children())
        kinds = {type(block) for block in blocks}
        if isinstance(owner, (nn.Sequential, nn.ModuleList)) and len(kinds) == 1:
            if zero_stage == 3:
                set_z3_leaf_modules(model, list(kinds))
            for block in blocks:
                block.forward = torch.compile(block.forward)


def _recompute(model: nn.Module) -> None:
    """Have every block compute its activations again in the backward pass instead of keeping them.

    Raises:
        SettingsError: a model that cannot, or whose batch norms would count each batch twice.
    """
    kind = type(model).__name__
    if batch_norms(model):
        raise SettingsError(f"activation_checkpointing: {kind} has batch norms, whose running statistics recomputation "
                            "would update twice; take a --deepspeed_config without it")
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise SettingsError(f"activation_checkpointing: {kind} does not support it; take a --deepspeed_config without "
                            "it") from error
