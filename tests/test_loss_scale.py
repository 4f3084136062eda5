"""fp16's loss scale, against DeepSpeed's own two scalers at work."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler

from vir.engine.loss_scale import LossScale

WINDOW, FLOOR = 3, 1


@pytest.fixture(autouse=True)
def rank_0(monkeypatch):
    """DeepSpeed asks for the rank before it says that it overflowed."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda group=None: 0)


class Engine:
    """DeepSpeed's scaler of a stage as its optimizer keeps it, and how the optimizer tells it of a step."""

    def __init__(self, stage, dynamic=True, initial=8.0, hysteresis=1):
        arguments = dict(init_scale=initial, scale_window=WINDOW, min_scale=FLOOR, delayed_shift=hysteresis,
                         consecutive_hysteresis=False)
        if stage:
            scaler = DynamicLossScaler(**arguments) if dynamic else LossScaler(initial)
            self.optimizer = SimpleNamespace(loss_scaler=scaler, dynamic_loss_scale=dynamic)
            self.tell = scaler.update_scale
        else:
            config = LossScaleConfig(torch.float16, dynamic, initial, arguments)
            self.optimizer = SimpleNamespace(loss_scale_config=config, verbose=False)
            self.tell = lambda overflow: FP16_Optimizer._update_scale(self.optimizer, overflow)

    @property
    def own_value(self):
        return (self.optimizer.loss_scaler if hasattr(self.optimizer, "loss_scaler")
                else self.optimizer.loss_scale_config).cur_scale


def values(engine, scale, steps):
    """The scale after each step; + is one that was applied, - one that overflowed."""
    found = []
    for step in steps:
        engine.tell(step == "-")
        scale.after_step(step == "+")
        found.append(scale.value)
    return found


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("steps, expected", [
    ("+++", [8, 8, 16]),                        # after each window
    ("++++++", [8, 8, 16, 16, 16, 32]),
    ("-+++", [4, 4, 4, 8]),                     # counted from an overflow on
    ("++-+++", [8, 8, 4, 4, 4, 8]),
    ("+++-", [8, 8, 16, 8]),
    ("-----", [4, 2, 1, 1, 1]),                 # never below the floor
])
def test_the_scale_after_each_step(stage, steps, expected):
    engine = Engine(stage)
    assert values(engine, LossScale(engine, stage, "fp16"), steps) == expected


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_is_scaled_by_what_it_is_divided_by(stage):
    """Where DeepSpeed alone raises the scale, it does so within a step, before it divides. Ours is there before."""
    ours, alone = Engine(stage), Engine(stage)
    scale = LossScale(ours, stage, "fp16")
    for step in range(4 * WINDOW):
        multiplied_by = scale.value
        ours.tell(False)
        assert scale.value == multiplied_by
        alone.tell(False)
        assert alone.own_value == multiplied_by, step
        scale.after_step(True)


@pytest.mark.parametrize("hysteresis, expected", [(1, [4, 2, 1]), (2, [8, 4, 2]), (3, [8, 8, 4])])
def test_overflows_up_to_the_hysteresis_are_forgiven(hysteresis, expected):
    engine = Engine(2, hysteresis=hysteresis)
    assert values(engine, LossScale(engine, 2, "fp16"), "---") == expected


def test_raising_the_scale_fills_the_hysteresis_up_again():
    engine = Engine(2, hysteresis=2)
    assert values(engine, LossScale(engine, 2, "fp16"), "-+++--") == [8, 8, 8, 16, 16, 8]


@pytest.mark.parametrize("stage", [0, 2])
def test_the_floor_is_told_and_is_not_deepspeeds_error(stage):
    engine = Engine(stage, initial=2.0)
    scale = LossScale(engine, stage, "fp16")
    assert not scale.is_at_floor
    values(engine, scale, "-")
    assert scale.is_at_floor
    assert values(engine, scale, "-") == [FLOOR]  # where DeepSpeed alone ends the program
    assert values(engine, scale, "+++") == [1, 1, 2] and not scale.is_at_floor


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("into", [0, 2])
def test_a_restored_scale_goes_on_as_if_there_had_been_no_stop(stage, into):
    before, after = Engine(stage), Engine(into, initial=2.0)
    scale, restored = LossScale(before, stage, "fp16"), LossScale(after, into, "fp16")
    values(before, scale, "+++-+")
    restored.restore(scale.state())
    assert restored.value == scale.value == 8
    assert values(after, restored, "++++-") == values(before, scale, "++++-") == [8, 16, 16, 16, 8]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_constant_scale_stays(stage):
    engine = Engine(stage, dynamic=False, initial=128.0)
    scale = LossScale(engine, stage, "fp16")
    assert values(engine, scale, "+++--") == [128] * 5
    assert not scale.is_at_floor
    scale.restore({"cur_scale": 2.0, "cur_iter": 5})
    assert scale.value == 128  # the settings say it


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_precisions_are_not_scaled(precision):
    scale = LossScale(SimpleNamespace(optimizer=None), 2, precision)
    scale.after_step(True)
    scale.restore({"cur_scale": 2.0})
    assert scale.value == 1.0 and scale.state() == {} and not scale.is_at_floor and not scale.is_dynamic
