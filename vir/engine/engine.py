"""The model under DeepSpeed: forward, backward, a step that says whether it was applied, evaluation, its whole state.

Facts of DeepSpeed 0.19 that shape this file, each seen by running it (those of its layouts are in zero.py):
- backward() divides by the accumulation itself, so the loss is never divided here;
- its load_checkpoint wants the same world and stage, brings back old rates, and with some arguments loads nothing;
- buffers keep their dtype and differ between ranks, inputs are not cast.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import AbstractSet, Any, Callable, Iterator

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from pydantic import ValidationError
from torch import Tensor, nn

from vir.checkpoints.info import CheckpointInfo
from vir.checkpoints.partitions import EMA, EMA_BUFFERS, FROZEN, WEIGHT, Partitions
from vir.config import RunConfig
from vir.engine import builds
from vir.engine import ds_config as ds
from vir.engine import ema, half_precision
from vir.engine.batch_norm import RunningStatistics, compute_in_float32
from vir.engine.blocks import compile_blocks, gather_by_block
from vir.engine.builds import warn_of_killed_builds
from vir.engine.loss_scale import LossScale
from vir.engine.optimizer import build, copied, parameter_groups, set_rates
from vir.engine.stacks import recompute
from vir.engine.zero import LAYOUTS
from vir.errors import LossScaleError, SettingsError
from vir.log import log

deepspeed.utils.logger.setLevel("WARNING")


class Update(Enum):
    """What became of a step."""

    ACCUMULATING = "more micro-batches of this global batch follow"
    APPLIED = "the weights have moved"
    SKIPPED = "the gradient of the global batch was not finite: the weights are as before"


class Engine:
    """One data-parallel training engine.

    Args:
        model: built and initialised the same on every rank.
        config: the run; its ema and optim sections are used here.
        ds_config: the checked JSON (ds_config.read), without batch sizes.
        accumulation: micro-batches per step.

    Raises:
        SettingsError: what this device, this number of ranks, DeepSpeed or the model does not have or refuses.
    """

    def __init__(self, model: nn.Module, config: RunConfig, ds_config: dict[str, Any], accumulation: int) -> None:
        self.zero_stage: int = ds.zero_stage(ds_config)
        self.precision = ds.precision(ds_config)
        self.has_ema = config.ema.decay > 0
        self.updates = 0
        self._accumulation = accumulation
        self._decay_at = partial(ema.decay_at, decay=config.ema.decay, warmup=config.ema.warmup)
        _check_device(config, ds_config)
        if "activation_checkpointing" in ds_config:
            recompute(model)
        if self.precision != "fp32":
            compute_in_float32(model)
        if self.zero_stage == 3:
            gather_by_block(model)
        if config.model.compile:
            compile_blocks(model)
        warn_of_killed_builds(torch.__version__)
        builds.load(builds.needed(ds_config, config.optim.name))
        self.groups = parameter_groups(model, config.optim)
        _check_groups(model, self.groups)
        self._optimizer = _optimizer(self.groups, config, ds_config)
        self.deepspeed = _initialize(model, self._optimizer, config, ds_config, accumulation)
        self.module: nn.Module = self.deepspeed.module
        self.dtype: torch.dtype = self.deepspeed.get_data_types()[0]
        self.loss_scale = LossScale(self.deepspeed, self.zero_stage, self.precision)
        self._layout = LAYOUTS[self.zero_stage](self.deepspeed, self._optimizer, self.precision, self.loss_scale)
        self._buffers = RunningStatistics(self.module, averages=self.has_ema)
        self._shows_average = False
        if self.has_ema:
            ema.attach(self._optimizer, self._decay)

    def _decay(self) -> float:
        """Of the average, at the update that follows."""
        return self._decay_at(self.updates + 1)

    def __call__(self, images: Tensor) -> Any:
        """Logits of a micro-batch of any float dtype: images [B, C, H, W], or features that a linear probe takes; in
        training a pair of them where the model has two heads that are taught apart."""
        return self.deepspeed(images.to(self.dtype))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the mean loss of one micro-batch."""
        assert not self._shows_average, "use_weights() first: this would train the average"
        self._layout.backward(loss)

    def step(self, lr: float, weight_decay: float) -> Update:
        """To be called after each backward; the last micro-batch of a global batch brings the update.

        It is skipped where the gradient of the global batch is not finite; every rank gets the same answer. Collective.

        Raises:
            LossScaleError: the fp16 gradient is not finite although the loss scale is at its floor.
        """
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return Update.ACCUMULATING
        set_rates(self._optimizer.param_groups, lr, weight_decay)
        scale, at_floor = self.loss_scale.value, self.loss_scale.is_at_floor
        applied = self._layout.step()
        self.loss_scale.after_step(applied)
        self._buffers.after_step(applied, self._decay())
        self.updates += applied
        if not applied and at_floor:
            raise LossScaleError(f"the gradient is not finite at loss scale {scale:g}, the floor (fp16.min_loss_scale)")
        return Update.APPLIED if applied else Update.SKIPPED

    def grad_norm(self) -> float:
        """Norm of the last global batch's gradient before clipping."""
        return self._layout.grad_norm()

    def use_average(self) -> None:
        """Compute with the average of the weights, until use_weights(). Collective.

        The average takes the weights' place, sharded as they are, so that no second model is held. Before the first
        update the weights are their own average. A second call changes nothing.
        """
        if self.updates and not self._shows_average:
            self._layout.show(EMA)
            self._buffers.show(averaged=True)
            self._shows_average = True

    def use_weights(self) -> None:
        """Compute with the weights again, which are as they were, bit for bit. A second call changes nothing."""
        if self._shows_average:
            self._buffers.show(averaged=False)
            self._layout.show(WEIGHT)
            self._shows_average = False

    @contextmanager
    def evaluating(self, averaged: bool) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from images [B, C, H, W] to logits by the weights, or by their average, in evaluation mode.

        Collective, and under ZeRO 3 so is each call of the function. An error in the block is the end of the engine:
        other ranks may not have met it, so nothing that needs them is done then.
        """
        if averaged:
            self.use_average()
        else:
            self.use_weights()
        self.deepspeed.eval()
        with torch.no_grad():
            yield self.__call__
        self.deepspeed.train()
        self.use_weights()

    def save(self, folder: Path, take: Callable[[Any, Path], None]) -> None:
        """Hand over the content of each of DeepSpeed's files that this rank would write into a folder. Collective.

        Args:
            take: must not raise, for the other ranks wait for this one further on; the state that it is given is the
                engine's own, which the next step changes.
        """
        assert not self._shows_average, "use_weights() first: this would save the average as the weights"
        assert self.deepspeed.micro_steps % self._accumulation == 0, (
            "finish the global batch first: the gradients accumulated so far would not be saved")
        self.deepspeed.checkpoint_engine.take = take
        self.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False,
                                       client_state={EMA_BUFFERS: self._buffers.average,
                                                     FROZEN: list(self._layout.frozen())})

    @torch.no_grad()
    def restore(self, saved: Partitions, info: CheckpointInfo) -> None:
        """Take up weights, average, optimizer state and counters from any world size, ZeRO stage and precision.

        Each rank reads its own share of each parameter. Collective.

        Raises:
            SettingsError: the checkpoint has other parameters, or others of them are frozen.
        """
        assert not self._shows_average, "use_weights() first"
        _check_shapes(saved, dict(self.module.named_parameters()))
        _check_frozen(saved.frozen, self._layout.frozen().keys())
        self._layout.set_frozen(lambda name, start, stop: saved.read(name, WEIGHT, start, stop))
        for name, master, offset, start, stop in self._layout.pieces():
            here = slice(offset, offset + stop - start)
            master.data.view(-1)[here].copy_(saved.read(name, WEIGHT, start, stop))
            for key in self._begin_state(master, name, saved):
                self._optimizer.state[master][key].view(-1)[here].copy_(saved.read(name, key, start, stop))
        for group in self._optimizer.param_groups:
            group.update(saved.counters(group["names"][0]))
        self._layout.show(WEIGHT)
        self._buffers.restore(saved.buffers, saved.ema_buffers)
        self.loss_scale.restore(info.loss_scaler)
        self.updates = info.updates
        self.deepspeed.global_steps = info.step
        self.deepspeed.skipped_steps = info.step - info.updates
        self.deepspeed.global_samples = info.samples_seen
        self.deepspeed.micro_steps = info.step * self._accumulation

    def _begin_state(self, master: Tensor, name: str, saved: Partitions) -> list[str]:
        """Make room for the optimizer's state of a master, as it was saved of a parameter; the keys to be read."""
        keys = saved.keys(name)
        if not keys and not saved.scalars(name):
            return []  # never stepped: an optimizer fills only a state that is empty
        # An average that was not kept before reads as the weights.
        keys = [key for key in keys if key != EMA] + ([EMA] if self.has_ema else [])
        state = self._optimizer.state[master]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(master, dtype=torch.float32)
        state.update({key: self._scalar(key, value, master) for key, value in saved.scalars(name).items()})
        return keys

    def _scalar(self, key: str, value: Any, master: Tensor) -> Any:
        """What an optimizer keeps once for a parameter; the step is an int in DeepSpeed's Adam, a tensor in torch's."""
        if isinstance(self._optimizer, DeepSpeedCPUAdam):
            return int(value)
        if isinstance(self._optimizer, torch.optim.Adam):
            return torch.tensor(float(value), device=master.device)  # where the fused kernel wants it
        return copied(value, torch.device("cpu") if key == "step" else master.device)  # as torch's load_state_dict

    def close(self) -> None:
        self.deepspeed.destroy()


class _HandOver(TorchCheckpointEngine):
    """Hands what DeepSpeed saves over to another writer."""

    take: Callable[[Any, Path], None]

    def save(self, state_dict: Any, path: str) -> None:
        self.take(state_dict, Path(path))


def _check_device(config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Refuse what this device or this number of ranks does not have, and warn of what it has, but slowly."""
    accelerator, named = deepspeed.accelerator.get_accelerator(), f"--deepspeed_config {config.deepspeed_config}"
    on_cpu, precision = accelerator.device_name() == "cpu", ds.precision(ds_config)
    if precision == "fp16" and not accelerator.is_fp16_supported():
        bf16 = half_precision.measure("bf16") if on_cpu else None
        raise SettingsError(f"{named} enables fp16, which this machine's {accelerator.device_name()} does not "
                            "support; take " + (
                                f"an fp32 one, such as {ds.shipped_in_fp32(ds_config)} (bf16 is "
                                f"{bf16.times_slower:.1f} times slower than fp32 on this processor)"
                                if bf16 and bf16.is_slow else "a bf16 or fp32 one, such as zero2_bf16"))
    ds.check_zero3(named, ds_config, on_cpu, dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized() and dist.get_rank():
        return  # rank 0 warns
    if accelerator.device_name() == "cuda" and (
            other := half_precision.instead_of_emulation(ds_config, torch.cuda.get_device_capability())):
        log.warning("bf16 is emulated on %s, a GPU before Ampere; take --deepspeed_config %s",
                    torch.cuda.get_device_name(), other)
    if on_cpu and precision != "fp32":
        speed = half_precision.measure(precision)
        if speed.is_slow:
            log.warning("%s is %.1f times slower than fp32 on this processor (measured: a linear layer takes %.1f ms "
                        "instead of %.1f ms); take --deepspeed_config %s", precision, speed.times_slower, speed.half,
                        speed.fp32, ds.shipped_in_fp32(ds_config))


def _check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    grouped = [name for group in groups for name in group["names"]]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable), "a parameter outside the groups would never train"
    if scalars := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
        raise SettingsError(f"{type(model).__name__} has parameters without a dimension ({scalars[0]}), which "
                            "DeepSpeed cannot shard; take another --model.name")


def _check_frozen(before: AbstractSet[str], now: AbstractSet[str]) -> None:
    if differing := sorted(before ^ now):
        raise SettingsError(f"the checkpoint was trained with other parameters frozen ({len(differing)} differ: "
                            f"{', '.join(differing[:3])}{', …' if len(differing) > 3 else ''}), for which an optimizer "
                            "keeps no state; resume with the --model.freeze that it was saved with (and with "
                            "--train.linear_probe where that was on), or consolidate it and give the weights as "
                            "--model.init_from")


def _check_shapes(saved: Partitions, parameters: dict[str, nn.Parameter]) -> None:
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
    if differing := sorted(name for name in shapes.keys() | saved.shapes.keys()
                           if shapes.get(name) != saved.shapes.get(name)):
        raise SettingsError(f"the checkpoint and the model differ in {len(differing)} parameters: "
                            f"{', '.join(differing[:3])}{', …' if len(differing) > 3 else ''}; resume with the model "
                            "that it was saved from")


def _optimizer(groups: list[dict[str, Any]], config: RunConfig, ds_config: dict[str, Any]) -> torch.optim.Optimizer:
    """The one named in the settings; DeepSpeed's Adam where it is to work in the CPU's memory.

    Its rate is written before each step. Until then it is 0, so that DeepSpeed's own set-up step moves no weight.
    """
    if ds.takes_cpu_adam(ds_config, config.optim.name):
        return DeepSpeedCPUAdam(groups, lr=0.0, betas=config.optim.betas, eps=config.optim.eps,
                                adamw_mode=config.optim.name == "adamw")
    return build(groups, config.optim)


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, ds_config: dict[str, Any],
                accumulation: int) -> Any:
    """A DeepSpeedEngine."""
    _import_muon()
    settings = {**ds.complete(ds_config, config, accumulation), "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # optimizer.check_name() knows which one is right where
                "checkpoint": {"tag_validation": "Ignore"}}  # the name is of the step, about which the ranks agree
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    except (DeepSpeedConfigError, ValidationError, ZeRORuntimeException, NotImplementedError, ImportError) as error:
        raise SettingsError(f"DeepSpeed refuses {config.deepspeed_config}: {error}") from error
    engine.checkpoint_engine = _HandOver(engine._config)
    engine._copy_recovery_script = lambda folder: None  # data should hold no programs
    if ds.zero_stage(ds_config) == 3:
        _save_in_place(engine)
    return engine


def _save_in_place(engine: Any) -> None:
    """Let a checkpoint of stage 3 gather nothing: DeepSpeed lets go of the small parameters, which stay whole, so that
    the module's state holds empty ones, and gathers each of them anew. It gets empty ones at once."""
    def without_weights(exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        weights = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
        return {name: value.new_empty(0) if name in weights else value
                for name, value in engine.module.state_dict().items()}

    engine.module_state_dict = without_weights
    engine._optimizer_has_ckpt_event_prologue = engine._optimizer_has_ckpt_event_epilogue = lambda: False


def _import_muon() -> None:
    """deepspeed.initialize() imports DeepSpeed's Muon, whose functions torch.compile takes as they are defined: that
    loads inductor, over a second in every rank. No run here uses that optimizer, and --model.compile does not go
    through DeepSpeed's `compile`; so it is imported here first, with that replaced by one that leaves functions alone.
    """
    with suppress(ImportError):  # of a DeepSpeed that has it elsewhere
        from deepspeed.runtime import compiler

        theirs, compiler.compile = compiler.compile, lambda: lambda function: function
        try:
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
        finally:
            compiler.compile = theirs
