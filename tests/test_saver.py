"""Checkpoints during a run: what goes into one, which is the best, how one gives way to the next. The store is real,
the engine writes one file."""

import re
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from support.small_disk import small_disk  # noqa: F401, a fixture
from support.waiting import wait_for
from vir import launcher
from vir.checkpoints import store, writer
from vir.checkpoints.info import read_info
from vir.checkpoints.names import STEPS, newest
from vir.checkpoints.staging import Staging
from vir.checkpoints.store import select
from vir.checkpoints.writer import GivenUp, write_file
from vir.cluster.heartbeat import Heartbeat
from vir.cluster.signals import LauncherGrace
from vir.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ScheduleConfig, to_dict
from vir.distributed import World
from vir.errors import CheckpointError
from vir.evaluation.classify import Accuracy
from vir.launcher import Place
from vir.training import validator
from vir.training.plan import Plan
from vir.training.saver import Saver
from vir.training.validator import Validator
from vir.weights.spec import InputSpec, ModelSpec

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
HEARTBEAT = Heartbeat(Place(0, 1, 0, "", 0), 60.0)
SPEC = ModelSpec(name="test_vit", args={}, classes=("x", "y"), input=InputSpec(
    size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9))
PLAN = Plan(num_samples=40, num_classes=2, global_batch_size=8, accumulation=1, total_steps=100,
            eval_steps=frozenset(), checkpoint_steps=frozenset(range(101)), forward_flops=None, peak_flops=None,
            optim=OptimConfig(), schedule=ScheduleConfig())
FILE = "mp_rank_00_model_states.pt"


class Engine:
    """What a saver asks of an engine."""

    updates, zero_stage, precision, has_ema = 7, 2, "fp16", True
    loss_scale = SimpleNamespace(state=lambda: {"cur_scale": 256.0})
    is_blocked = False

    def __init__(self, numbers=2):
        self.weights = torch.zeros(numbers)

    def save(self, folder, take):
        folder.mkdir()
        if self.is_blocked:
            (folder / FILE).mkdir()
        take({"weights": self.weights}, folder / FILE)


def config_of(run, **checkpoint):
    return RunConfig(deepspeed_config="x", output=str(run), data=DataConfig(train="t", val="v"),
                     checkpoint=CheckpointConfig(**checkpoint))


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def asynchronous(request):
    return request.param


@pytest.fixture
def saver_in(asynchronous):
    return lambda run, **more: saver_of(run, asynchronous=asynchronous, **more)


def saver_of(run, first=0, engine=None, **checkpoint):
    return Saver(config_of(run, **checkpoint), PLAN, engine or Engine(), SPEC, "fingerprint", WORLD, HEARTBEAT, first)


def save(saver, step):
    """Until it is published."""
    saver.save(step)
    saver.finish()


def step_of(run, pointer="latest"):
    path = run / "checkpoints" / pointer
    return int(path.read_text()[5:]) if path.exists() else None


def steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob(STEPS))


def test_a_checkpoint_says_where_the_run_stands(tmp_path, saver_in, asynchronous):
    saver = saver_in(tmp_path, first=3)
    assert saver.last_step == 3
    saver.evaluated(5, {"top1": 10.0, "loss": 2.0})
    save(saver, 5)
    found = read_info(newest(tmp_path))
    assert (found.step, found.samples_seen, found.updates, found.world_size) == (5, 40, 7, 1)
    assert (found.zero_stage, found.precision, found.ema) == (2, "fp16", True)
    assert found.loss_scaler == {"cur_scale": 256.0} and found.metrics == {"top1": 10.0, "loss": 2.0}
    assert found.model == SPEC and (found.data_fingerprint, found.teacher) == ("fingerprint", "")
    assert found.config == to_dict(config_of(tmp_path, asynchronous=asynchronous))
    (made,) = saver.saved
    assert saver.last_step == saver.last_published == made.step == 5 and made.seconds > 0 and made.stalled > 0
    assert made.bytes == (newest(tmp_path) / FILE).stat().st_size


def test_results_belong_to_the_step_at_which_they_were_found(tmp_path, saver_in):
    saver = saver_in(tmp_path)
    saver.evaluated(5, {"top1": 10.0})
    save(saver, 6)
    assert read_info(newest(tmp_path)).metrics == {} and step_of(tmp_path, "best") is None


def test_better_results_ask_for_a_checkpoint_which_becomes_the_best(tmp_path, saver_in):
    saver = saver_in(tmp_path)
    for step, top1, better in ((1, 10.0, True), (2, 9.0, False), (3, 10.0, False), (4, 11.0, True)):
        assert saver.evaluated(step, {"top1": top1}) is better
        save(saver, step)
    assert step_of(tmp_path, "best") == 4 and step_of(tmp_path) == 4


def test_results_that_are_not_numbers_are_not_the_best(tmp_path, saver_in):
    saver = saver_in(tmp_path)
    assert not saver.evaluated(1, {"top1": float("nan")})
    save(saver, 1)
    assert step_of(tmp_path, "best") is None
    assert saver.evaluated(2, {"top1": 0.0})


@pytest.mark.parametrize("metric, best", [("top1", 1), ("ema_top1", 2), (None, None)])
def test_the_metric_is_the_one_of_the_settings(tmp_path, saver_in, metric, best):
    saver = saver_in(tmp_path, best=metric)
    for step, results in ((1, {"top1": 2.0, "ema_top1": 1.0}), (2, {"top1": 1.0, "ema_top1": 2.0})):
        saver.evaluated(step, results)
        save(saver, step)
    assert step_of(tmp_path, "best") == best


def test_a_run_that_goes_on_knows_its_best(tmp_path, saver_in):
    saver = saver_in(tmp_path)
    saver.evaluated(1, {"top1": 10.0})
    save(saver, 1)
    later = saver_in(tmp_path, first=1)
    assert not later.evaluated(2, {"top1": 10.0}) and later.evaluated(3, {"top1": 10.5})


def test_the_best_the_newest_and_one_every_so_many_epochs_are_kept(tmp_path, saver_in):
    saver = saver_in(tmp_path, keep=2, keep_every_epochs=2.0)
    for step in range(1, 25):  # 5 steps are an epoch, so 2 epochs are complete after 10 and 20
        if step == 3:
            saver.evaluated(step, {"top1": 1.0})
        save(saver, step)
    assert steps(tmp_path) == [3, 10, 20, 23, 24]


def test_a_checkpoint_that_cannot_be_written_is_not_counted(tmp_path, saver_in):
    engine = Engine()
    saver = saver_in(tmp_path, engine=engine)
    save(saver, 1)
    engine.is_blocked = True
    with pytest.raises(CheckpointError, match="Is a directory"):
        save(saver, 2)
    assert saver.last_published == 1 and steps(tmp_path) == [1] and step_of(tmp_path) == 1


# ---- one on its way, which a test holds back


class Disk:
    """Writes when it is told to; `is_open` from the beginning on where a test does not set it."""

    def __init__(self):
        self.is_open, self.defect = threading.Event(), None
        self.is_open.set()

    def write(self, state, path, given_up):
        while not self.is_open.wait(0.01):
            if given_up.is_set():
                raise GivenUp("it was given up")
        if self.defect:
            raise self.defect
        return write_file(state, path, given_up)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(writer, "write_file", disk.write)
    yield disk
    disk.is_open.set()


@contextmanager
def opened_later(disk, seconds=0.2):
    disk.is_open.clear()
    later = threading.Timer(seconds, disk.is_open.set)
    later.start()
    yield
    later.join()


def weights_in(run, step):
    return torch.load(run / "checkpoints" / f"step-{step:08d}" / FILE, weights_only=True)["weights"].tolist()


def test_training_goes_on_while_a_copy_of_what_was_is_written(tmp_path, disk):
    disk.is_open.clear()
    saver = saver_of(tmp_path, engine=(engine := Engine()))
    saver.save(5)
    assert (saver.last_step, saver.last_published, saver.is_ready) == (5, 0, False)
    engine.weights += 1
    assert steps(tmp_path) == [] and newest(tmp_path) is None
    disk.is_open.set()
    wait_for(lambda: saver.is_ready, "the writing")
    assert steps(tmp_path) == [] and saver.last_published == 0  # until all ranks have agreed
    saver.advance()
    wait_for(lambda: saver.is_ready, "the publication")
    saver.advance()
    assert saver.last_published == 5 and not saver.is_ready and weights_in(tmp_path, 5) == [0.0, 0.0]


def test_the_next_one_waits_and_the_cadence_that_the_disk_holds_is_said_once(tmp_path, disk, caplog):
    caplog.set_level("INFO", logger="vir")
    saver = saver_of(tmp_path, engine=(engine := Engine()))
    for step in (10, 20, 30):
        with opened_later(disk, 0.4):
            saver.save(step)
            engine.weights += 1
            time.sleep(0.05)
            saver.save(step + 1)  # for which the disk is open
        saver.finish()
    assert saver.waited == 3 and [made.step for made in saver.saved] == [10, 11, 20, 21, 30, 31]
    assert weights_in(tmp_path, 30) == [2.0, 2.0] and weights_in(tmp_path, 31) == [3.0, 3.0]
    waits = [made for made in saver.saved if made.step % 10 == 0]
    assert all(made.stalled > 0.1 and made.seconds > 0.1 for made in waits), waits
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (warning,) = (line for line in said if line.startswith("writing a checkpoint takes"))
    # A step took 0.05 s.
    found = re.fullmatch(r"writing a checkpoint takes \d+\.\d s, longer than the time between two: training has waited "
                         r"\d+\.\d s; this disk holds --checkpoint.every_minutes 0.1 or --checkpoint.every_steps (\d+)",
                         warning)
    assert found and 1 <= int(found[1]) <= 1.25 * waits[0].seconds / 0.05 + 1
    assert sum("has waited" in record.getMessage() for record in caplog.records if record.levelname == "INFO") == 3


def test_a_fast_disk_is_not_warned_of_where_one_is_made_in_each_step(tmp_path, monkeypatch, caplog):
    """The next one waits only because training has not yet come to know that all is written: for the publication."""
    publish = store.publish

    def publish_slowly(*of_checkpoint):
        time.sleep(0.05)
        publish(*of_checkpoint)

    monkeypatch.setattr(store, "publish", publish_slowly)
    saver = saver_of(tmp_path)
    for step in (1, 2, 3):
        saver.save(step)
        time.sleep(1.0)  # a step
    saver.finish()
    assert saver.waited == 2 and all(made.seconds < 0.5 for made in saver.saved), saver.saved
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_by_the_clock_none_is_due_before_the_one_before_is_done(tmp_path, disk, caplog):
    caplog.set_level("INFO", logger="vir")
    disk.is_open.clear()
    saver = saver_of(tmp_path, every_minutes=0.001)
    assert not saver.is_due
    wait_for(lambda: saver.is_due, "the time")
    saver.save(1)
    time.sleep(0.1)
    assert not saver.is_due and saver.waited == 0
    disk.is_open.set()
    saver.finish()
    assert saver.is_due
    disk.is_open.clear()
    saver.save(2)
    threading.Timer(0.2, disk.is_open.set).start()
    while saver.last_published == 1:
        wait_for(lambda: saver.is_ready, "the disk")
        saver.advance()
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "the next one comes later than was asked for; this disk holds --checkpoint.every_minutes 0.1" in said
    assert not any("has waited" in record.getMessage() for record in caplog.records)
    assert saver.waited == 0 and not saver_of(tmp_path, every_minutes=None).is_due


def test_one_on_its_way_is_published_while_the_run_is_evaluated(tmp_path, monkeypatch):
    """By what an evaluation asks the ranks before each batch."""
    saver = saver_of(tmp_path)
    stop = SimpleNamespace(all_ready=False)

    def agree(is_ready):
        stop.all_ready = is_ready  # of the only rank
        return False

    def classify(forward, batches, model_input, device, bar, stops):
        wait_for(lambda: stops() or saver.last_published == 4, "the checkpoint")
        return Accuracy(top1=1.0, top5=2.0, loss=3.0, images=4)

    stop.agree = agree
    monkeypatch.setattr(validator, "eval_batches", lambda *given, **more: None)
    monkeypatch.setattr(validator, "classify", classify)
    engine = SimpleNamespace(has_ema=False, evaluating=lambda averaged: nullcontext())
    saver.save(4)
    found = Validator(config_of(tmp_path), engine, range(4), SPEC.input, WORLD, stop, None, HEARTBEAT, saver)
    assert found.evaluate(4) == {"top1": 1.0, "top5": 2.0, "loss": 3.0}
    assert saver.last_published == 4


def test_a_full_disk_is_told_at_the_next_chance_and_those_before_are_whole(small_disk, saver_in):  # noqa: F811
    saver = saver_in(small_disk, engine=Engine(150_000))  # 600 KB of 1 MB
    save(saver, 1)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: rank 0: \S+/step-00000002.part/"
                       rf"{FILE}: .*No space left on device \(.* MB are free there\); those before it are whole"):
        save(saver, 2)
    assert select(small_disk)[1].step == saver.last_published == 1
    assert not list((small_disk / "checkpoints").glob("*.part"))
    saver.close()


def test_memory_that_does_not_hold_the_copy_is_told_with_the_way_out(tmp_path, monkeypatch):
    saver = saver_of(tmp_path)
    save(saver, 1)

    def copy(*_):
        raise MemoryError

    monkeypatch.setattr(Staging, "copy", copy)
    with pytest.raises(CheckpointError, match="does not fit into host memory .*--checkpoint.asynchronous false"):
        save(saver, 2)
    assert select(tmp_path)[1].step == 1


@pytest.mark.parametrize("where", ["write", "publish"])
def test_a_defect_of_the_thread_is_raised_at_the_next_chance_and_nothing_waits(where, tmp_path, disk, monkeypatch):
    saver = saver_of(tmp_path)
    save(saver, 1)
    if where == "write":
        disk.defect = KeyError("of nobody")
    else:
        monkeypatch.setattr(store, "remove_old", lambda *_: {}["of nobody"])
    saver.save(2)
    with pytest.raises(KeyError, match="of nobody"):
        saver.finish()
    saver.close()
    assert select(tmp_path)[1].step == (1 if where == "write" else 2)


# ---- what is left behind when the run is to stop


class Granted:
    """Of a launcher that has sent a SIGTERM so many seconds before it kills."""

    def __init__(self, seconds):
        self.number, self.asked_for = signal.SIGTERM, launcher.GRACE_S - seconds


@pytest.fixture
def left(monkeypatch):
    """Seconds that a launcher leaves, by what it has granted."""
    monkeypatch.setattr(launcher, "launchers", lambda: [SimpleNamespace(pid=1)])
    return LauncherGrace().left


def test_the_one_of_the_same_step_is_finished(tmp_path, disk, left):
    saver = saver_of(tmp_path)
    with opened_later(disk):
        saver.save(5)
        saver.stop(5, left(Granted(0.0)))
    assert steps(tmp_path) == [5] and len(saver.saved) == 1


def test_an_older_one_is_given_up_for_a_newer_one(tmp_path, disk, left):
    saver = saver_of(tmp_path)
    save(saver, 4)
    disk.is_open.clear()
    saver.save(5)
    given_up = saver._checkpoints._writer._given_up
    threading.Thread(target=lambda: (given_up.wait(5), disk.is_open.set())).start()
    saver.stop(6, left(Granted(20.0)))
    assert given_up.is_set() and steps(tmp_path) == [4, 6] and saver.last_published == 6 and saver.waited == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest", "step-00000004", "step-00000006"]


def test_an_older_one_of_which_all_is_written_is_published_before_the_newer_one(tmp_path, disk, left):
    saver = saver_of(tmp_path)
    save(saver, 4)
    saver.save(5)
    wait_for(lambda: saver.is_ready, "the writing")
    saver.advance()
    saver.stop(6, left(Granted(20.0)))
    assert steps(tmp_path) == [4, 5, 6] and [made.step for made in saver.saved] == [4, 5, 6]


def test_the_first_one_is_finished_and_tells_that_there_is_time_for_a_newer_one(tmp_path, disk, left):
    saver = saver_of(tmp_path)
    with opened_later(disk):
        saver.save(5)
        saver.stop(6, left(Granted(20.0)))
    assert steps(tmp_path) == [5, 6] and [made.step for made in saver.saved] == [5, 6]


def test_an_older_one_is_finished_where_less_is_granted_than_a_newer_takes(tmp_path, disk, left, caplog):
    saver = saver_of(tmp_path)
    with opened_later(disk):
        saver.save(4)
        saver.finish()  # in 0.2 s
    with opened_later(disk):
        saver.save(5)
        saver.stop(6, left(Granted(0.1)))
    assert steps(tmp_path) == [4, 5] and saver.last_published == 5
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert re.search(r"may not be enough for a checkpoint of step 6, which takes \d+\.\d s: the one of step 5, ", said)


def test_the_best_is_not_given_up_for_a_newer_one(tmp_path, disk, left):
    saver = saver_of(tmp_path)
    for step, top1 in ((4, 10.0), (5, 11.0)):
        saver.finish()
        disk.is_open.clear()
        saver.evaluated(step, {"top1": top1})
        threading.Timer(0.2, disk.is_open.set).start()
        saver.save(step)
    saver.stop(6, left(Granted(20.0)))
    assert steps(tmp_path) == [4, 5, 6] and step_of(tmp_path, "best") == 5 and step_of(tmp_path) == 6


def test_where_nobody_kills_a_newer_one_is_made_however_long_it_takes(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(launcher, "launchers", lambda: [])
    saver = saver_of(tmp_path)
    with opened_later(disk):
        save(saver, 4)
    saver.save(5)
    saver.stop(6, LauncherGrace().left(Granted(0.0)))
    assert saver.last_published == 6


def test_closing_writes_no_more_and_leaves_what_a_kill_leaves(tmp_path, disk):
    saver = saver_of(tmp_path)
    save(saver, 4)
    disk.is_open.clear()
    saver.save(5)
    saver.close()
    saver.close()
    assert select(tmp_path)[1].step == 4 and (tmp_path / "checkpoints" / "step-00000005.part").is_dir()
    disk.is_open.set()
    save(saver_of(tmp_path, first=4), 5)
    assert steps(tmp_path) == [4, 5] and not list((tmp_path / "checkpoints").glob("*.part"))
