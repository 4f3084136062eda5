"""Checkpoints during a run: what goes into one, which is the best. The store is real, the engine writes one file."""

from types import SimpleNamespace

import pytest
import torch

from vir.checkpoints.info import read_info
from vir.checkpoints.names import newest
from vir.cluster.heartbeat import Heartbeat
from vir.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ScheduleConfig, to_dict
from vir.distributed import World
from vir.errors import CheckpointError
from vir.launcher import Place
from vir.training.plan import Plan
from vir.training.saver import Saver
from vir.weights.spec import InputSpec, ModelSpec

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
HEARTBEAT = Heartbeat(Place(0, 1, 0, "", 0), 60.0)
SPEC = ModelSpec(name="test_vit", args={}, classes=("x", "y"), input=InputSpec(
    size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9))
PLAN = Plan(num_samples=40, num_classes=2, global_batch_size=8, accumulation=1, total_steps=100,
            eval_steps=frozenset(), checkpoint_steps=frozenset(), forward_flops=None, peak_flops=None,
            optim=OptimConfig(), schedule=ScheduleConfig())


class Engine:
    """What a saver asks of an engine."""

    updates, zero_stage, precision, has_ema = 7, 2, "fp16", True
    loss_scale = SimpleNamespace(state=lambda: {"cur_scale": 256.0})
    to = ""

    def save(self, folder, take):
        folder.mkdir()
        take({"weights": torch.zeros(2)}, folder / self.to / "mp_rank_00_model_states.pt")


def config_of(run, **checkpoint):
    return RunConfig(deepspeed_config="x", output=str(run), data=DataConfig(train="t", val="v"),
                     checkpoint=CheckpointConfig(**checkpoint))


def saver_in(run, first=0, engine=None, **checkpoint):
    return Saver(config_of(run, **checkpoint), PLAN, engine or Engine(), SPEC, "fingerprint", WORLD, HEARTBEAT, first)


def step_of(run, pointer="latest"):
    path = run / "checkpoints" / pointer
    return int(path.read_text()[5:]) if path.exists() else None


def steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_a_checkpoint_says_where_the_run_stands(tmp_path):
    saver = saver_in(tmp_path, first=3)
    assert saver.last_step == 3
    saver.evaluated(5, {"top1": 10.0, "loss": 2.0})
    saver.save(5)
    found = read_info(newest(tmp_path))
    assert (found.step, found.samples_seen, found.updates, found.world_size) == (5, 40, 7, 1)
    assert (found.zero_stage, found.precision, found.ema) == (2, "fp16", True)
    assert found.loss_scaler == {"cur_scale": 256.0} and found.metrics == {"top1": 10.0, "loss": 2.0}
    assert found.model == SPEC and (found.data_fingerprint, found.teacher) == ("fingerprint", "")
    assert found.config == to_dict(config_of(tmp_path))
    assert saver.last_step == 5 and len(saver.seconds) == 1 and saver.seconds[0] >= 0


def test_results_belong_to_the_step_at_which_they_were_found(tmp_path):
    saver = saver_in(tmp_path)
    saver.evaluated(5, {"top1": 10.0})
    saver.save(6)
    assert read_info(newest(tmp_path)).metrics == {} and step_of(tmp_path, "best") is None


def test_better_results_ask_for_a_checkpoint_which_becomes_the_best(tmp_path):
    saver = saver_in(tmp_path)
    for step, top1, better in ((1, 10.0, True), (2, 9.0, False), (3, 10.0, False), (4, 11.0, True)):
        assert saver.evaluated(step, {"top1": top1}) is better
        saver.save(step)
    assert step_of(tmp_path, "best") == 4 and step_of(tmp_path) == 4


def test_results_that_are_not_numbers_are_not_the_best(tmp_path):
    saver = saver_in(tmp_path)
    assert not saver.evaluated(1, {"top1": float("nan")})
    saver.save(1)
    assert step_of(tmp_path, "best") is None
    assert saver.evaluated(2, {"top1": 0.0})


@pytest.mark.parametrize("metric, best", [("top1", 1), ("ema_top1", 2), (None, None)])
def test_the_metric_is_the_one_of_the_settings(tmp_path, metric, best):
    saver = saver_in(tmp_path, best=metric)
    for step, results in ((1, {"top1": 2.0, "ema_top1": 1.0}), (2, {"top1": 1.0, "ema_top1": 2.0})):
        saver.evaluated(step, results)
        saver.save(step)
    assert step_of(tmp_path, "best") == best


def test_a_run_that_goes_on_knows_its_best(tmp_path):
    saver = saver_in(tmp_path)
    saver.evaluated(1, {"top1": 10.0})
    saver.save(1)
    later = saver_in(tmp_path, first=1)
    assert not later.evaluated(2, {"top1": 10.0}) and later.evaluated(3, {"top1": 10.5})


def test_the_best_the_newest_and_one_every_so_many_epochs_are_kept(tmp_path):
    saver = saver_in(tmp_path, keep=2, keep_every_epochs=2.0)
    for step in range(1, 25):  # 5 steps are an epoch, so 2 epochs are complete after 10 and 20
        if step == 3:
            saver.evaluated(step, {"top1": 1.0})
        saver.save(step)
    assert steps(tmp_path) == [3, 10, 20, 23, 24]


def test_a_checkpoint_that_cannot_be_written_is_not_counted(tmp_path):
    engine = Engine()
    saver = saver_in(tmp_path, engine=engine)
    saver.save(1)
    engine.problems = ["No space left on device"]
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.save(2)
    assert saver.last_step == 1 and len(saver.seconds) == 1 and step_of(tmp_path) == 1
