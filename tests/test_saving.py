"""The course of a checkpoint: what is there at each point of it, and what waits for what. Without DeepSpeed.

What is published, kept and found again is in test_store.py; two ranks are in test_distributed.py.
"""

import threading
import time
from dataclasses import replace

import pytest
import torch
from test_store import INFO, WORLD, steps

from support.waiting import HANGS, wait_for
from vir.checkpoints import store, writer
from vir.checkpoints.info import read_info
from vir.checkpoints.names import newest
from vir.checkpoints.saving import Checkpointer
from vir.checkpoints.store import Kept, select
from vir.errors import CheckpointError

NAME = "mp_rank_00_model_states.pt"


class Gate:
    """Holds up one function until it is opened."""

    def __init__(self, monkeypatch, owner, name):
        self.met, self._opened, work = threading.Event(), threading.Event(), getattr(owner, name)

        def held_up(*given):
            self.met.set()
            assert self._opened.wait(HANGS)
            return work(*given)

        monkeypatch.setattr(owner, name, held_up)

    def open(self):
        self._opened.set()


def handing_over(state):
    def hand_over(folder, take):
        folder.mkdir()
        take(state, folder / NAME)

    return hand_over


def checkpointer(run, asynchronous=True, keep=3):
    return Checkpointer(run, WORLD, Kept(keep, None), asynchronous)


def begin(making, step, state=None, best=False):
    making.begin(handing_over({"step": step} if state is None else state), replace(INFO, step=step), best)


def goes_on(making):
    """As training does: at the end of a step, where all are ready."""
    wait_for(lambda: making.is_ready, "what the checkpoint waits for")
    making.advance()


def saved_steps(making):
    return [made.step for made in making.saved]


def test_the_synchronous_way_returns_when_all_is_published(tmp_path):
    making = checkpointer(tmp_path, asynchronous=False)
    begin(making, 4)
    assert making.step is None and not making.is_ready and saved_steps(making) == [4]
    assert newest(tmp_path).name == "step-00000004" and steps(tmp_path) == [4]


def test_the_asynchronous_way_returns_when_the_state_is_copied(tmp_path, monkeypatch):
    """And goes on behind what ranks do by themselves: the writing of the files, and their publication."""
    writes, publishes = (Gate(monkeypatch, *where) for where in ((writer, "write_file"), (store, "publish")))
    making, weight = checkpointer(tmp_path), torch.zeros(3)
    begin(making, 4, {"weight": weight}, best=True)
    weight += 1
    assert making.step == 4 and not making.is_ready and steps(tmp_path) == ["step-00000004.part"]
    writes.open()
    goes_on(making)
    assert making.step == 4 and not making.is_ready and steps(tmp_path) == ["step-00000004.part"]
    assert not making.saved and newest(tmp_path) is None
    publishes.open()
    goes_on(making)
    assert making.step is None and not making.is_ready and saved_steps(making) == [4]
    folder = newest(tmp_path)
    assert select(tmp_path, WORLD) == (folder, read_info(folder)) and steps(tmp_path) == [4]
    assert torch.equal(torch.load(folder / NAME)["weight"], torch.zeros(3))
    assert (folder.parent / "best").read_text() == folder.name


def test_both_ways_leave_the_same_files(tmp_path):
    for way in (True, False):
        run = tmp_path / str(way)
        run.mkdir()
        making = checkpointer(run, way)
        begin(making, 4, {"weight": torch.arange(10.0), "step": 4})
        making.finish()
    one, other = (newest(tmp_path / str(way)) for way in (True, False))
    assert read_info(one) == read_info(other) and (one / NAME).read_bytes() == (other / NAME).read_bytes()


def test_the_one_before_stays_the_newest_until_the_next_is_published(tmp_path, monkeypatch):
    making = checkpointer(tmp_path, keep=1)
    begin(making, 1)
    making.finish()
    with monkeypatch.context() as patch:
        publishes = Gate(patch, store, "publish")
        begin(making, 2)
        goes_on(making)
        assert publishes.met.wait(HANGS) and select(tmp_path, WORLD)[1].step == 1
        publishes.open()
        making.finish()
    assert steps(tmp_path) == [2] and saved_steps(making) == [1, 2]


def test_finish_without_one_does_nothing(tmp_path):
    making = checkpointer(tmp_path)
    making.finish()
    making.give_up()
    making.close()
    assert not making.saved and not making.is_ready


def test_the_time_that_training_waits_is_counted_and_that_of_the_work(tmp_path, monkeypatch):
    writes, pause = Gate(monkeypatch, writer, "write_file"), 0.3
    making = checkpointer(tmp_path)
    begin(making, 1)
    threading.Timer(pause, writes.open).start()
    making.finish()
    began = time.monotonic()
    begin(making, 2)
    wait_for(lambda: making.is_ready, "the files")
    time.sleep(pause)  # training is at its step: neither waits for this nor writes
    making.finish()
    took = time.monotonic() - began
    one, other = making.saved
    assert one.seconds >= pause and one.stalled > 0
    assert 0 < other.seconds <= took - pause and 0 < other.stalled <= took - pause
    assert one.bytes == (tmp_path / "checkpoints" / "step-00000001" / NAME).stat().st_size


def test_in_the_synchronous_way_training_waits_for_all_of_the_work(tmp_path):
    making = checkpointer(tmp_path, asynchronous=False)
    begin(making, 1)
    assert 0 < making.saved[0].seconds <= making.saved[0].stalled


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("fails", ["make_room", "publish"])
def test_what_rank_0_cannot_do_is_told_and_the_next_one_is_made(tmp_path, monkeypatch, fails, asynchronous):
    making = checkpointer(tmp_path, asynchronous)
    begin(making, 1)
    making.finish()

    def failing(*given):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
        patch.setattr(store, fails, failing)
        begin(making, 2)
        making.finish()
    assert f"the checkpoint {tmp_path / 'checkpoints' / 'step-00000002'} could not be written: rank 0: " in str(
        error.value) and "Input/output error" in str(error.value) and "MB are free there" in str(error.value)
    assert making.step is None and steps(tmp_path) == [1] and select(tmp_path, WORLD)[1].step == 1
    begin(making, 3)
    making.finish()
    assert saved_steps(making) == [1, 3]


def test_a_file_that_cannot_be_written_is_told_where_training_goes_on(tmp_path):
    def hand_over(folder, take):
        (folder / NAME).mkdir(parents=True)
        take({}, folder / NAME)

    making = checkpointer(tmp_path)
    making.begin(hand_over, INFO, False)
    assert making.step == INFO.step
    with pytest.raises(CheckpointError, match="could not be written: rank 0: .*Is a directory"):
        goes_on(making)
    assert making.step is None and steps(tmp_path) == []


def test_one_that_is_given_up_leaves_nothing(tmp_path, monkeypatch):
    making = checkpointer(tmp_path)
    begin(making, 1)
    making.finish()
    with monkeypatch.context() as patch:
        writes = Gate(patch, writer, "write_file")
        begin(making, 2)
        assert writes.met.wait(HANGS)
        threading.Timer(0.1, writes.open).start()
        making.give_up()
    assert making.step is None and saved_steps(making) == [1] and steps(tmp_path) == [1]
    begin(making, 3)
    making.finish()
    assert saved_steps(making) == [1, 3]


def test_one_of_which_all_is_written_is_not_given_up(tmp_path, monkeypatch):
    publishes = Gate(monkeypatch, store, "publish")
    making = checkpointer(tmp_path)
    begin(making, 1)
    goes_on(making)
    threading.Timer(0.1, publishes.open).start()
    making.give_up()
    assert saved_steps(making) == [1] and newest(tmp_path).name == "step-00000001"


def test_close_leaves_what_a_kill_would_leave(tmp_path, monkeypatch):
    writes = Gate(monkeypatch, writer, "write_file")
    making = checkpointer(tmp_path)
    begin(making, 1)
    assert writes.met.wait(HANGS)
    threading.Timer(0.1, writes.open).start()
    making.close()
    assert making.step is None and steps(tmp_path) == ["step-00000001.part"]
    with pytest.raises(CheckpointError, match="holds no checkpoint.json"):
        read_info(tmp_path / "checkpoints" / "step-00000001.part")
    begin(checkpointer(tmp_path, asynchronous=False), 1)
    assert steps(tmp_path) == [1]


def test_an_error_of_the_thread_itself_is_raised_and_the_one_before_is_whole(tmp_path, monkeypatch):
    """A fault of the program, unlike a disk that is full."""
    making = checkpointer(tmp_path)
    begin(making, 1)
    making.finish()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(writer, "write_file", lambda *given: 1 / 0)
        begin(making, 2)
        making.finish()
    assert making.step is None and select(tmp_path, WORLD)[1].step == 1


def test_a_second_one_is_not_begun_while_one_is_on_its_way(tmp_path):
    making = checkpointer(tmp_path)
    begin(making, 1)
    with pytest.raises(AssertionError, match="finish"):
        begin(making, 2)
    making.finish()
