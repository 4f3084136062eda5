"""The factor by which fp16 multiplies the loss so that small gradients survive; overflow is how it finds its place."""

from __future__ import annotations

import math
from typing import Any

# DeepSpeed's two loss scalers, with ZeRO and without, call the same things by these names.
_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """DeepSpeed's loss scaler, of which it keeps one with ZeRO and another without; 1 in other precisions than fp16.

    DeepSpeed 0.19 raises the scale before it divides the gradient by it, which halves a gradient. So its own raising is
    switched off here, and after_step() does it.
    """

    def __init__(self, deepspeed: Any, zero_stage: int, precision: str) -> None:
        self._scaler: Any = None
        self.is_dynamic = False
        if precision != "fp16":
            return
        wrapper = deepspeed.optimizer
        if zero_stage == 0:
            self._scaler = wrapper.loss_scale_config
            self.is_dynamic, self._floor = bool(self._scaler.dynamic_loss_scale), "min_loss_scale"
        else:
            self._scaler = wrapper.loss_scaler
            self.is_dynamic, self._floor = bool(wrapper.dynamic_loss_scale), "min_scale"
        if self.is_dynamic:
            self._scaler.raise_error_at_min_scale = False  # the engine says it in an error of ours, in every stage
            self._window, self._scaler.scale_window = self._scaler.scale_window, math.inf

    @property
    def value(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.cur_scale)

    @property
    def is_at_floor(self) -> bool:
        """Whether an overflow cannot make it any smaller (fp16.min_loss_scale)."""
        return self.is_dynamic and self.value <= getattr(self._scaler, self._floor)

    def after_step(self, applied: bool) -> None:
        """Raise the scale after each `loss_scale_window` steps without an overflow."""
        scaler = self._scaler
        if not applied or not self.is_dynamic or (scaler.cur_iter - scaler.last_overflow_iter - 1) % self._window:
            return
        scaler.cur_scale *= scaler.scale_factor
        if hasattr(scaler, "cur_hysteresis"):
            scaler.cur_hysteresis = scaler.delayed_shift

    def state(self) -> dict[str, float]:
        """For a checkpoint, by DeepSpeed's names; empty in other precisions than fp16."""
        values = {name: getattr(self._scaler, name, None) for name in _STATE}
        return {name: value for name, value in values.items() if value is not None}

    def restore(self, state: dict[str, float]) -> None:
        """Take up what state() gave, also with ZeRO what it gave without, where DeepSpeed has no hysteresis."""
        for name, value in state.items():
            if self.is_dynamic and hasattr(self._scaler, name):
                setattr(self._scaler, name, value)
