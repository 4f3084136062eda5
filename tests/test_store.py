"""Checkpoints are published whole, or not at all; which are kept, and which one a folder means. Without DeepSpeed."""

import hashlib
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vir.checkpoints import store
from vir.checkpoints.info import CheckpointInfo, read_info
from vir.checkpoints.names import newest
from vir.checkpoints.saving import Checkpointer
from vir.checkpoints.store import Kept, best_so_far, select
from vir.distributed import World
from vir.errors import CheckpointError, SettingsError
from vir.weights.spec import InputSpec, ModelSpec

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
FILES = ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"]
INFO = CheckpointInfo(
    samples_seen=0, step=0, updates=0, world_size=1, zero_stage=2, precision="bf16", ema=False, loss_scaler={},
    metrics={}, config={"a": [1, 2]}, data_fingerprint="f",
    model=ModelSpec(name="test_vit", args={}, classes=("x", "y"), input=InputSpec(
        size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)))


@pytest.fixture(autouse=True)
def warnings_alone(caplog):
    """A run within pytest may have switched the lines for people on."""
    caplog.set_level(logging.WARNING, "vir")


def writing(content="weights", files=FILES):
    def hand_over(folder, take):
        folder.mkdir()
        for name in files:
            take(f"{name} {content}", folder / name)

    return hand_over


def save(hand_over, run, info, world, kept, best):
    """In the synchronous way."""
    Checkpointer(run, world, kept, asynchronous=False).begin(hand_over, info, best)


def holds(path, content):
    return content.encode() in path.read_bytes()


def checkpoint(run, step, write=None, *, samples=None, kept=Kept(100, None), best=False, **said):
    described = replace(INFO, step=step, samples_seen=10 * step if samples is None else samples, **said)
    save(write or writing(f"of step {step}"), run, described, WORLD, kept, best)
    return run / "checkpoints" / f"step-{step:08d}"


class Killed(BaseException):
    """Stands for SIGKILL: nobody cleans up after it."""


def steps(run):
    """What is in the folder, apart from the pointers: numbers of checkpoints, and names of what is none."""
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.name not in ("latest", "best"))
    return [int(name[5:]) if name[5:].isdigit() else name for name in names]


def contents(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- publishing


def test_a_checkpoint_lists_its_files_as_they_are_and_latest_names_it(tmp_path):
    folder = checkpoint(tmp_path, 3, metrics={"top1": 1.5})
    found = read_info(folder)
    assert replace(found, files={}) == replace(INFO, step=3, samples_seen=30, metrics={"top1": 1.5})
    assert sorted(found.files) == FILES
    for name, file in found.files.items():
        content = (folder / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert newest(tmp_path) == folder and steps(tmp_path) == [3]
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_it_takes_its_name_when_it_is_whole(tmp_path):
    def write(folder, take):
        assert folder.name == "step-00000003.part" and not newest(tmp_path)
        writing()(folder, take)

    checkpoint(tmp_path, 3, write)


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    checkpoint(tmp_path, 3, writing("old"))
    folder = checkpoint(tmp_path, 3, writing("new"))
    assert all(holds(path, "new") for path in folder.glob("*.pt"))
    assert steps(tmp_path) == [3]


def test_what_a_kill_left_behind_is_removed_by_the_next_save(tmp_path):
    for name in ("step-00000002.part", "step-00000001.replaced.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / FILES[0]).write_text("half")
    checkpoint(tmp_path, 2)
    assert steps(tmp_path) == [2]
    assert not holds(newest(tmp_path) / FILES[0], "half")


def test_a_checkpoint_that_was_being_replaced_stays_until_a_newer_one_is_whole(tmp_path):
    folder = checkpoint(tmp_path, 1)
    kept = folder.rename(folder.with_name("step-00000001.replaced.part"))  # latest names what is not there

    def killed(folder, take):
        writing("half")(folder, take)
        raise Killed

    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint(tmp_path, 2, writing(files=["no/a.pt"]))
    assert select(tmp_path, WORLD) == (kept, read_info(kept))
    with pytest.raises(Killed):
        checkpoint(tmp_path, 2, killed)
    assert select(tmp_path, WORLD) == (kept, read_info(kept))
    checkpoint(tmp_path, 2)
    assert steps(tmp_path) == [2]


def test_a_step_whose_replacement_was_not_cleaned_up_is_saved_again(tmp_path):
    folder = checkpoint(tmp_path, 1)
    shutil.copytree(folder, folder.with_name("step-00000001.replaced.part"))
    checkpoint(tmp_path, 1, writing("new"))
    assert steps(tmp_path) == [1] and all(holds(path, "new") for path in folder.glob("*.pt"))


# ---- what is kept


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 5):
        checkpoint(tmp_path, step, kept=Kept(2, None))
        assert steps(tmp_path) == list(range(max(1, step - 1), step + 1))


def test_the_newest_is_the_one_written_last_whatever_its_number(tmp_path):
    checkpoint(tmp_path, 8)
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 4, kept=Kept(1, None))  # of a run that went back
    assert steps(tmp_path) == [4]


def test_file_times_decide_nothing(tmp_path):
    """Copying a run sets them anew, in any order."""
    for step in (2, 4, 1, 3):  # written in the wrong order, and dated backwards
        os.utime(checkpoint(tmp_path, step), (1000 - step, 1000 - step))
    (tmp_path / "checkpoints" / "latest").unlink()
    assert select(tmp_path)[1].step == 4
    os.utime(checkpoint(tmp_path, 5), (0, 0))
    checkpoint(tmp_path, 6, kept=Kept(3, None))
    assert steps(tmp_path) == [4, 5, 6]


def test_later_steps_of_a_run_that_went_back_go_first(tmp_path):
    for step in (3, 8, 9):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, kept=Kept(3, None))
    assert steps(tmp_path) == [3, 4, 9]
    checkpoint(tmp_path, 5, kept=Kept(3, None))
    assert steps(tmp_path) == [3, 4, 5]


def test_a_kill_within_a_removal_leaves_no_half_checkpoint_under_its_name(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1)

    def killed(folder, *_, **__):
        (folder / FILES[0]).unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store.shutil, "rmtree", killed)
        checkpoint(tmp_path, 2, kept=Kept(1, None))
    assert steps(tmp_path) == ["step-00000001.removed.part", 2] and select(tmp_path, WORLD)[1].step == 2
    shutil.rmtree(newest(tmp_path))
    with pytest.raises(CheckpointError) as error:
        select(tmp_path, WORLD)
    assert "step-00000001" not in str(error.value)  # the half one is not even tried
    checkpoint(tmp_path, 3)
    assert steps(tmp_path) == [3]


@pytest.mark.parametrize("fails, left", [("rmtree", "step-00000001.removed.part"), ("rename", "step-00000001")])
def test_a_checkpoint_that_cannot_be_removed_is_told_and_ends_nothing(tmp_path, monkeypatch, caplog, fails, left):
    for step in (1, 2):
        checkpoint(tmp_path, step)

    def there():
        return {path.name for path in (tmp_path / "checkpoints").glob("step-*")}

    def failing(work):
        def attempt(path, *others, **more):
            if path.name.startswith("step-00000001"):
                raise PermissionError(13, "Permission denied")
            return work(path, *others, **more)

        return attempt

    with monkeypatch.context() as patch:
        owner = shutil if fails == "rmtree" else type(tmp_path)
        patch.setattr(owner, fails, failing(getattr(owner, fails)))
        checkpoint(tmp_path, 3, kept=Kept(1, None))
        assert caplog.messages == [
            f"{tmp_path / 'checkpoints' / left} could not be removed: [Errno 13] Permission denied"]
        assert there() == {left, "step-00000003"} and select(tmp_path, WORLD)[1].step == 3
        checkpoint(tmp_path, 4, kept=Kept(1, None))  # nor does it hinder the next
        assert there() == {left, "step-00000004"}
    checkpoint(tmp_path, 5, kept=Kept(1, None))
    assert steps(tmp_path) == [5]


def test_where_the_best_is_not_known_nothing_is_removed(tmp_path, caplog):
    checkpoint(tmp_path, 1, best=True)
    (tmp_path / "checkpoints" / "best").unlink()
    (tmp_path / "checkpoints" / "best").symlink_to("/proc/self/mem")  # is a file, and cannot be read
    checkpoint(tmp_path, 2, kept=Kept(1, None))
    assert steps(tmp_path) == [1, 2]
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("no old checkpoint was removed: [Errno ")


@pytest.mark.parametrize("per_step, left", [(500, [2, 4, 6]), (700, [2, 3, 5, 6]), (2500, [1, 2, 3, 4, 5, 6]),
                                            (100, [6])])
def test_the_first_after_each_so_many_samples_is_kept_for_good(tmp_path, per_step, left):
    """Every 1000 samples: of 700, 1400, 2100, ... these are steps 2, 3 and 5, and step 6 at 4200."""
    for step in range(1, 7):
        checkpoint(tmp_path, step, samples=step * per_step, kept=Kept(1, 1000.0))
    assert steps(tmp_path) == left


def test_a_damaged_checkpoint_is_not_kept_for_its_samples(tmp_path):
    (checkpoint(tmp_path, 1, samples=1000) / FILES[0]).unlink()
    checkpoint(tmp_path, 2, samples=1500)
    checkpoint(tmp_path, 3, samples=1800, kept=Kept(1, 1000.0))
    assert steps(tmp_path) == [2, 3]


def test_the_best_is_kept_until_another_is_better(tmp_path):
    for step, best in ((1, False), (2, True), (3, False), (4, False)):
        checkpoint(tmp_path, step, kept=Kept(1, None), best=best)
    assert steps(tmp_path) == [2, 4]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000002"
    checkpoint(tmp_path, 5, kept=Kept(1, None), best=True)
    assert steps(tmp_path) == [5]


def test_those_by_the_clock_go_before_those_that_were_planned(tmp_path):
    planned = {10, 20, 30}.__contains__
    for step in (10, 13, 16, 20, 23, 26):
        checkpoint(tmp_path, step, kept=Kept(3, None, planned))
    assert steps(tmp_path) == [10, 20, 23, 26]
    checkpoint(tmp_path, 30, kept=Kept(3, None, planned))
    assert steps(tmp_path) == [10, 20, 26, 30]
    checkpoint(tmp_path, 33, kept=Kept(1, None, planned))
    assert steps(tmp_path) == [30, 33]


# ---- what cannot be written


def given_up(run, write, said, **more):
    before = contents(run)
    with pytest.raises(CheckpointError, match=said) as error:
        checkpoint(run, 2, write, **more)
    assert str(error.value).startswith(f"the checkpoint {run / 'checkpoints' / 'step-00000002'} could not be written: ")
    assert str(error.value).endswith("those before it are whole: free some space and run the same command again")
    assert contents(run) == before and steps(run) == [1]
    assert select(run, WORLD)[1].step == 1


def test_a_problem_of_the_writer_gives_the_checkpoint_up_and_no_other(tmp_path):
    checkpoint(tmp_path, 1)
    given_up(tmp_path, writing(files=[FILES[0], "no/a.pt"]), "rank 0: .*/no/a.pt: .*No such file",
             kept=Kept(1, None), best=True)
    checkpoint(tmp_path, 2)  # and the next one can be written
    assert steps(tmp_path) == [1, 2]


def test_a_writer_that_breaks_off_half_way_costs_no_other_checkpoint(tmp_path):
    def write(folder, take):
        writing("half")(folder, take)
        raise OSError(28, "No space left on device")

    checkpoint(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises((CheckpointError, OSError), match="No space left on device"):
        checkpoint(tmp_path, 2, write, kept=Kept(1, None), best=True)
    assert before.items() <= contents(tmp_path).items()
    assert select(tmp_path, WORLD)[1].step == 1
    checkpoint(tmp_path, 2)  # what it left is gone
    assert steps(tmp_path) == [1, 2] and not holds(newest(tmp_path) / FILES[0], "half")


def test_a_writer_that_wrote_nothing_is_told(tmp_path):
    checkpoint(tmp_path, 1)
    given_up(tmp_path, lambda folder, take: None, "No such file or directory.*step-00000002.part")


def test_a_pointer_that_cannot_be_moved_is_told_and_the_one_before_stays(tmp_path):
    checkpoint(tmp_path, 1)
    (tmp_path / "checkpoints" / "best" / "in-the-way").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="could not be written: rank 0: .*best"):
        checkpoint(tmp_path, 2, best=True, kept=Kept(1, None))
    assert select(tmp_path, WORLD)[1].step == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="step-00000002 could not be written: rank 0: .*File exists"):
        checkpoint(tmp_path, 2, lambda folder: pytest.fail("there is no folder to write into"))
    assert (tmp_path / "checkpoints").read_text() == "a file"


def test_what_is_in_the_way_of_the_files_is_told(tmp_path):
    checkpoint(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000002.part").write_text("a file")
    with pytest.raises(CheckpointError, match="step-00000002 could not be written: rank 0: .*Not a directory"):
        checkpoint(tmp_path, 2, lambda folder: pytest.fail("there is no folder to write into"))
    assert select(tmp_path, WORLD)[1].step == 1


# ---- which one a folder means


def damage(folder):
    path = folder / FILES[0]
    path.write_bytes(bytes(path.stat().st_size))


def test_a_run_folder_means_its_newest_and_a_checkpoint_folder_itself(tmp_path):
    first, last = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert select(tmp_path, WORLD) == (last, read_info(last))
    assert select(first, WORLD) == (first, read_info(first))
    assert select(tmp_path) == (last, read_info(last))  # by one process alone


def test_a_folder_without_any_means_none(tmp_path):
    assert select(tmp_path, WORLD) is None
    assert select(tmp_path / "nowhere", WORLD) is None
    (tmp_path / "checkpoints" / "step-00000001.part").mkdir(parents=True)
    assert select(tmp_path, WORLD) is None


def test_a_damaged_newest_is_passed_over_loudly(tmp_path, caplog):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    damage(tmp_path / "checkpoints" / "step-00000003")
    (tmp_path / "checkpoints" / "step-00000002" / FILES[1]).unlink()
    folder, found = select(tmp_path, WORLD)
    assert (folder.name, found.step) == ("step-00000001", 1)
    changed, missing, taken = caplog.messages
    assert "DAMAGED CHECKPOINT PASSED OVER" in changed and f"{FILES[0]} has changed" in changed
    assert "DAMAGED CHECKPOINT PASSED OVER" in missing and f"{FILES[1]} is missing" in missing
    assert taken == f"continuing from the one before: {folder}"


def test_where_all_are_damaged_each_is_told_and_none_is_taken(tmp_path, caplog):
    for step in (1, 2):
        damage(checkpoint(tmp_path, step))
    with pytest.raises(CheckpointError, match=f"no checkpoint of {tmp_path} is whole: .*step-00000002/.*; .*"
                                              "step-00000001/.*; restore one, or give another folder"):
        select(tmp_path, WORLD)
    assert not caplog.messages


def test_a_damaged_checkpoint_that_is_named_is_not_replaced_by_another(tmp_path):
    checkpoint(tmp_path, 1)
    damage(checkpoint(tmp_path, 2))
    with pytest.raises(CheckpointError, match="step-00000002 is whole: .* has changed"):
        select(tmp_path / "checkpoints" / "step-00000002", WORLD)


@pytest.fixture
def run(tmp_path):
    """Steps 500, 1000 (the best) and 1500."""
    (tmp_path / "run").mkdir()
    for step in (500, 1000, 1500):
        checkpoint(tmp_path / "run", step, best=step == 1000)
    return tmp_path / "run"


THERE = "there are the steps 500, 1000 (best), 1500; --which latest takes the newest that is whole"


@pytest.mark.parametrize("which, step", [("latest", 1500), ("best", 1000), ("500", 500), ("00001000", 1000)])
@pytest.mark.parametrize("world", [WORLD, None], ids=["all ranks", "alone"])
def test_another_than_the_newest_can_be_chosen(run, which, step, world):
    folder = run / "checkpoints" / f"step-{step:08d}"
    assert select(run, world, which) == (folder, read_info(folder))


def test_the_pointers_of_a_run_mean_what_they_name(run, monkeypatch):
    root = run / "checkpoints"
    assert select(root / "best")[1].step == 1000 == select(root / "best", which="best")[1].step
    assert select(root / "latest")[1].step == 1500
    monkeypatch.chdir(root)
    assert select(Path("best"))[1].step == 1000
    monkeypatch.chdir(run)
    assert select(Path("checkpoints/best")) == (folder := Path("checkpoints/step-00001000"), read_info(folder))
    damage(root / "step-00001500")
    assert select(root / "latest")[1].step == 1000  # as that of the run folder: the newest that is whole


def test_a_folder_that_is_called_like_a_pointer_is_a_run(tmp_path):
    run = tmp_path / "checkpoints" / "best"
    run.mkdir(parents=True)
    checkpoint(run, 3)
    assert select(run)[1].step == 3


@pytest.mark.parametrize("which", ["latest", "best", "1000"])
def test_where_there_are_no_checkpoints_none_is_meant_whichever_is_asked_for(tmp_path, which):
    assert select(tmp_path, WORLD, which) is None and select(tmp_path / "checkpoints" / "best") is None


@pytest.mark.parametrize("which", ["best", "1000"])
def test_for_a_chosen_one_that_is_damaged_no_other_is_taken(run, which, caplog):
    damage(run / "checkpoints" / "step-00001000")
    called = "the best checkpoint" if which == "best" else "the checkpoint of step 1000"
    with pytest.raises(CheckpointError) as error:
        select(run, WORLD, which)
    assert str(error.value) == (
        f"{called} of {run} is not whole: {run}/checkpoints/step-00001000/{FILES[0]} has changed since it was written "
        f"(sha256 differs); take another checkpoint; restore it, or take another: {THERE}")
    assert not caplog.messages


def test_a_step_that_is_not_there_is_told_with_those_that_are(run):
    (run / "checkpoints" / "latest").write_text("step-00002000")  # names what is not there
    for step in ("1", "2000"):
        with pytest.raises(CheckpointError) as error:
            select(run, WORLD, step)
        assert str(error.value) == (f"the checkpoint of step {step} of {run} is not there: no folder "
                                    f"{run}/checkpoints/step-{int(step):08d}; {THERE}")


def test_of_many_steps_the_last_are_told(tmp_path):
    for step in range(20):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="there are the steps …, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19;"):
        select(tmp_path, which="30")


def test_a_best_that_was_never_saved_is_told(tmp_path):
    checkpoint(tmp_path, 1)
    for source, which in ((tmp_path, "best"), (tmp_path / "checkpoints" / "best", "latest")):
        with pytest.raises(CheckpointError, match=f"{tmp_path} has no best checkpoint: none was saved after a "
                                                  "validation; there are the steps 1; --which latest"):
            select(source, WORLD, which)


def test_a_best_whose_folder_is_gone_is_told(run):
    shutil.rmtree(run / "checkpoints" / "step-00001000")
    with pytest.raises(CheckpointError, match=f"the best checkpoint of {run} is not there: no folder .*/step-00001000; "
                                              "there are the steps 500, 1500; "):
        select(run, WORLD, "best")


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_pointer_that_is_no_text_is_told(run, pointer):
    (run / "checkpoints" / pointer).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=f"checkpoints/{pointer} cannot be read: .*codec.*; remove it, or write "
                                              "the name of a checkpoint into it, such as step-00001000"):
        select(run, WORLD, pointer)


def test_what_cannot_choose_is_refused(run):
    for which in ("newest", "-1", "1.5", "", "step-00001000"):
        with pytest.raises(SettingsError, match=f"--which {which} is not latest, best or the number of a step"):
            select(run, WORLD, which)
    folder = run / "checkpoints" / "step-00000500"
    with pytest.raises(SettingsError, match="step-00000500 is one checkpoint, of which --which best cannot choose"):
        select(folder, WORLD, "best")
    with pytest.raises(SettingsError, match=f"checkpoints/best and --which 500 contradict each other; give the run "
                                            f"folder {run} with --which"):
        select(run / "checkpoints" / "best", WORLD, "500")


def test_a_best_that_was_being_replaced_is_still_the_best(run):
    folder = run / "checkpoints" / "step-00001000"
    kept = folder.rename(folder.with_name(folder.name + ".replaced.part"))
    assert select(run, which="best") == select(run, which="1000") == (kept, read_info(kept))


def test_a_kill_while_a_step_was_replaced_loses_nothing(tmp_path):
    folder = checkpoint(tmp_path, 1)
    kept = folder.rename(folder.with_name("step-00000001.replaced.part"))  # latest names what is not there
    assert select(tmp_path, WORLD) == (kept, read_info(kept))


def test_the_best_so_far_is_that_of_the_checkpoint_which_was_kept_for_it(tmp_path):
    assert best_so_far(tmp_path, "top1") == float("-inf")
    checkpoint(tmp_path, 1, metrics={"top1": 30.0, "ema_top1": 20.0}, best=True)
    checkpoint(tmp_path, 2, metrics={"top1": 25.0})
    assert best_so_far(tmp_path, "top1") == 30.0 and best_so_far(tmp_path, "ema_top1") == 20.0
    assert best_so_far(tmp_path, None) == best_so_far(tmp_path, "top5") == float("-inf")
    (tmp_path / "checkpoints" / "step-00000001" / store.DESCRIPTION).write_text("damaged")
    assert best_so_far(tmp_path, "top1") == float("-inf")


def test_a_number_that_no_step_has_is_refused_in_a_short_sentence(run):
    with pytest.raises(SettingsError, match="^--which '1.*' is not latest, best or the number of a step") as error:
        select(run, WORLD, "1" * 5000)
    assert len(str(error.value)) < 200
