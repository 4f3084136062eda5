"""The model under DeepSpeed: forward, backward, a step that says whether it was applied, full weights on demand.

Facts of DeepSpeed 0.19 that shape this room, each seen by running it:
- backward() divides by the accumulation itself, so the loss is never divided here;
- without ZeRO, bf16 creates the optimizer state by a step on zero gradients, which Adam counts;
- without ZeRO, fp32 lets a non-finite gradient into the weights; every other mode skips the step;
- buffers keep their dtype, inputs are not cast.
"""

from __future__ import annotations

import math
from typing import Any, Iterator

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from pydantic import ValidationError
from torch import Tensor, nn

from vir.config import RunConfig
from vir.errors import SettingsError
from vir.training import ds_config as ds
from vir.training import ema
from vir.training.optimizer import parameter_groups

deepspeed.utils.logger.setLevel("WARNING")


class Engine:
    """One data-parallel training engine.

    Args:
        model: built and initialised the same on every rank.
        config: the run; its ema and optim sections are used here.
        ds_config: the checked JSON (ds_config.read), without batch sizes.
        accumulation: micro-batches per step.

    Raises:
        SettingsError: a precision that this machine does not have.
    """

    def __init__(self, model: nn.Module, config: RunConfig, ds_config: dict[str, Any], accumulation: int) -> None:
        self.zero_stage: int = ds.zero_stage(ds_config)
        self.precision = ds.precision(ds_config)
        if self.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise SettingsError(f"--deepspeed_config {config.deepspeed_config} enables fp16, which this machine's "
                                f"{deepspeed.accelerator.get_accelerator().device_name()} does not support; take a "
                                "bf16 or fp32 one, such as ds_configs/zero2_bf16.json")
        if "activation_checkpointing" in ds_config:
            model.set_grad_checkpointing(True)
        groups = parameter_groups(model, config.optim.weight_decay)
        self._check_groups(model, groups)
        # lr is written before each step; 0 until then keeps DeepSpeed's own set-up step from moving a weight.
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas, eps=config.optim.eps)
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds.complete(ds_config, config, accumulation),
                dist_init_required=False)
        except (DeepSpeedConfigError, ValidationError, ZeRORuntimeException, NotImplementedError) as error:
            raise SettingsError(f"DeepSpeed refuses {config.deepspeed_config}: {error}") from error
        self.module: nn.Module = self.deepspeed.module
        self.dtype: torch.dtype = self.deepspeed.get_data_types()[0]
        self._optimizer = optimizer
        self._guards_itself = self.zero_stage > 0 or self.precision != "fp32"
        self._norm: float | None = None
        if self.zero_stage == 0 and self.precision != "fp32":
            optimizer.state.clear()
        self.has_ema = config.ema.decay > 0
        if self.has_ema:
            ema.attach(optimizer, config.ema.decay, config.ema.warmup)

    @staticmethod
    def _check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
        grouped = [name for group in groups for name in group["names"]]
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert sorted(grouped) == sorted(trainable), "a parameter outside the groups would never train"

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a micro-batch [B, C, H, W] of any float dtype."""
        return self.deepspeed(images.to(self.dtype))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the mean loss of one micro-batch."""
        self.deepspeed.backward(loss)

    def step(self, lr: float) -> bool | None:
        """To be called after each backward. None inside an accumulation; at its end, whether the update was applied.

        An update is not applied where the gradient of the global batch is not finite; every rank gets the same answer.
        """
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return None
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if not self._guards_itself:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(self._norm):
                self.deepspeed.zero_grad()
                self.deepspeed.micro_steps += 1
                return False
        self.deepspeed.step()
        return bool(self.deepspeed.was_step_applied())

    def grad_norm(self) -> float:
        """Norm of the last global batch's gradient before clipping."""
        return float(self._norm if self._norm is not None else self.deepspeed.get_global_grad_norm())

    def full_weights(self, averaged: bool) -> Iterator[tuple[str, Tensor]]:
        """Each trainable parameter whole, in float32, on every rank: the master weight, or its EMA.

        Collective under ZeRO: every rank must exhaust it. An average that no update has touched is the weight itself.
        """
        masters = self._unsharded_masters()
        averaged = averaged and any(ema.KEY in state for state in self._optimizer.state.values())
        if averaged and self.zero_stage in (1, 2):
            # DeepSpeed links parameters to their optimizer state once, after the first group's first step, when the
            # second group has none yet; and never again after a load.
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.module.named_parameters():
            if self.zero_stage > 0:
                yield name, (safe_get_full_optimizer_state(parameter, ema.KEY) if averaged
                             else safe_get_full_fp32_param(parameter))
            else:
                master = masters.get(parameter, parameter)
                yield name, (self._optimizer.state[master][ema.KEY] if averaged else master.detach())

    def _unsharded_masters(self) -> dict[nn.Parameter, Tensor]:
        """Model parameter to float32 master, where DeepSpeed keeps one without ZeRO."""
        wrapper = self.deepspeed.optimizer
        if self.zero_stage > 0 or self.precision == "fp32":
            return {}
        return {parameter: master for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups)
                for parameter, master in zip(group, masters)}

    def close(self) -> None:
        self.deepspeed.destroy()
