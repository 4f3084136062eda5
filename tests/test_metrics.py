"""metrics.jsonl over kills and resumes, and the picture drawn from it."""

import json
import logging
import os
import re
import resource
import runpy
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vir.errors import DataError
from vir.log import log
from vir.reports.curves import plot_runs
from vir.reports.metrics import MetricsWriter, read_metrics
from vir.run_folder import METRICS


def steps(run):
    return [(event["kind"], event["step"]) for event in read_metrics(run)]


def write_run(run, last=4, loss=2.0, ema=True):
    run.mkdir()
    writer = MetricsWriter(run, 0, 0)
    for step in range(1, last + 1):
        writer.write("train", step, epoch=step / 2, loss=loss / step, lr=0.1, images_per_second=100.0)
        if step % 2 == 0:
            averaged = dict(ema_loss=1.0, ema_top1=60.0) if ema else {}
            writer.write("eval", step, epoch=step / 2, loss=loss, top1=50.0, **averaged)
    writer.close()
    return run


def test_events_are_read_as_they_were_written(tmp_path):
    run = write_run(tmp_path / "a", last=2)
    train, _, evaluation = read_metrics(run)
    assert train.pop("time") > 0
    assert train == {"kind": "train", "step": 1, "epoch": 0.5, "loss": 2.0, "lr": 0.1, "images_per_second": 100.0}
    assert evaluation["kind"] == "eval" and evaluation["top1"] == 50.0


def test_a_line_is_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path, 0, 0)
    writer.write("train", 1, loss=1.0)
    assert steps(tmp_path) == [("train", 1)]
    writer.close()


def board(run, name):
    """[(step, value)] as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def test_tensorboard_gets_the_numbers(tmp_path):
    run = write_run(tmp_path / "a")
    assert board(run, "train/loss") == [(step, pytest.approx(2 / step)) for step in (1, 2, 3, 4)]
    assert [step for step, _ in board(run, "eval/ema_top1")] == [2, 4]


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path):
    run = write_run(tmp_path / "a")
    writer = MetricsWriter(run, 1.0, 2)
    writer.write("train", 3, loss=9.0)
    writer.close()
    assert board(run, "train/loss") == [(1, 2.0), (2, 1.0), (3, 9.0)]


# ---- disks that are full

@pytest.fixture()
def said():
    """What is logged, as (level, message)."""
    messages, handler, level = [], logging.Handler(), log.level
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield messages
    log.removeHandler(handler)
    log.setLevel(level)


@contextmanager
def no_space_left(folder):
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextmanager
def files_may_not_grow(folder):
    """Beyond the size of the smallest that is being written, by this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = min(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 150, limits[1]))  # SIGXFSZ is ignored by Python
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(params=[no_space_left, files_may_not_grow], ids=lambda way: way.__name__)
def full_disk(request, tmp_path):
    """(folder, context in which its disk is full)."""
    if request.param is files_may_not_grow:
        yield tmp_path, files_may_not_grow
        return
    done = subprocess.run([shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip() or 'there is no mount'}")
    yield tmp_path, no_space_left
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_costs_no_event(full_disk, said):
    run, is_full = full_disk
    writer = MetricsWriter(run, 0, 0)
    writer.write("train", 1, loss=1.0)
    with is_full(run):
        for step in range(2, 90):  # more than a page: what is left of one may still be filled
            writer.write("train", step, loss=1.0 / step)
        assert [event["step"] for event in read_metrics(run)] == list(range(1, len(read_metrics(run)) + 1))
        assert len(read_metrics(run)) < 80 and (run / METRICS).read_bytes().endswith(b"\n")
        warnings = sorted(message for level, message in said)
        assert len(warnings) == 2 and all("each later event tries again" in message for message in warnings)
        assert f"cannot write {run / METRICS}: " in warnings[0] and "/tensorboard/events.out" in warnings[1]
        assert "No space left" in warnings[0] or "File too large" in warnings[0]
    said.clear()
    for step in (90, 91):
        writer.write("train", step, loss=1.0 / step)
    assert [level for level, message in said] == ["INFO"] * 2 and all("again, with all" in text for _, text in said)
    assert steps(run) == [("train", step) for step in range(1, 92)]
    assert board(run, "train/loss") == [(step, pytest.approx(1 / step)) for step in range(1, 92)]
    writer.close()


def test_events_are_written_at_the_end_once_there_is_space(full_disk):
    run, is_full = full_disk
    writer = MetricsWriter(run, 0, 0)
    with is_full(run):
        for step in range(1, 90):
            writer.write("train", step, loss=1.0)
    writer.close()
    assert steps(run) == [("train", step) for step in range(1, 90)]
    assert len(board(run, "train/loss")) == 89


def test_a_disk_that_stays_full_is_told_at_the_end_and_ends_nothing(full_disk, said):
    run, is_full = full_disk
    writer = MetricsWriter(run, 0, 0)
    with is_full(run):
        for step in range(1, 90):
            writer.write("train", step, loss=1.0)
        writer.close()
        lost = 89 - len(read_metrics(run))
    assert any(f"{METRICS} lacks the last {lost} records: " in message for _, message in said)


def test_a_second_full_disk_is_told_as_well(full_disk, said):
    run, is_full = full_disk
    writer = MetricsWriter(run, 0, 0)
    for begin in (1, 100):
        with is_full(run):
            for step in range(begin, begin + 90):
                writer.write("train", step, loss=1.0)
        writer.write("train", begin + 90, loss=1.0)
    assert [level for level, _ in said] == ["WARNING", "WARNING", "INFO", "INFO"] * 2


def test_half_a_line_that_could_not_be_cut_off_is_cut_off_later(tmp_path, monkeypatch):
    """As on a network disk whose server is gone for a while."""
    writer = MetricsWriter(tmp_path, 0, 0)
    with monkeypatch.context() as patched, files_may_not_grow(tmp_path):
        patched.setattr(os, "truncate", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        for step in range(1, 5):
            writer.write("train", step, loss=1.0)
        assert not (tmp_path / METRICS).read_bytes().endswith(b"\n")
    writer.close()
    assert steps(tmp_path) == [("train", step) for step in range(1, 5)]


def test_a_board_that_cannot_be_opened_is_only_told(tmp_path, said):
    (tmp_path / "tensorboard").write_text("in the way")
    writer = MetricsWriter(tmp_path, 0, 0)
    writer.write("train", 1, loss=1.0)
    (level, message), = said
    assert level == "WARNING" and "/tensorboard/events.out" in message and "File exists" in message
    (tmp_path / "tensorboard").unlink()
    writer.write("train", 2, loss=1.0)
    writer.close()
    assert board(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0)]


def test_metrics_that_cannot_be_begun_are_an_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        MetricsWriter(tmp_path / "none", 0, 0)


def test_resuming_drops_later_steps_so_that_each_step_stands_once(tmp_path):
    run = write_run(tmp_path / "a")
    writer = MetricsWriter(run, 1.0, 2)
    writer.write("train", 3, epoch=1.5, loss=9.0, lr=0.1, images_per_second=1.0)
    writer.close()
    assert steps(run) == [("train", 1), ("train", 2), ("eval", 2), ("train", 3)]
    assert read_metrics(run)[-1]["loss"] == 9.0


def test_resuming_from_the_start_drops_everything(tmp_path):
    run = write_run(tmp_path / "a")
    MetricsWriter(run, 0, 0).close()
    assert steps(run) == []


def test_a_last_line_cut_short_is_ignored_and_gone_after_resuming(tmp_path):
    run = write_run(tmp_path / "a", last=1)
    with (run / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')
    assert steps(run) == [("train", 1)]
    writer = MetricsWriter(run, 0.5, 1)
    writer.write("train", 2, loss=1.0)
    writer.close()
    assert steps(run) == [("train", 1), ("train", 2)]


def test_a_broken_line_within_the_file_is_named(tmp_path):
    run = write_run(tmp_path / "a", last=1)
    good = (run / METRICS).read_text()
    (run / METRICS).write_text(good + "{broken\n" + good)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_metrics(run)


@pytest.mark.parametrize("content", ["5", "[]", '{"kind": "train"}'])
def test_a_line_that_is_no_event_is_named(tmp_path, content):
    (tmp_path / METRICS).write_text(content + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1 is no event"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("fields, said", [
    ('"step": null', "step is None; it must be a whole number, 1 or more"), ('"step": 0', "step is 0; "),
    ('"step": true', "step is True; "), ('"step": 2, "samples_seen": null', "samples_seen is None; it must be a whole"),
    ('"step": 2, "samples_seen": 0', "samples_seen is 0; it must be a whole number, at least that of the steps, 2"),
    ('"step": 2, "loss": "x"', "loss is 'x'; it must be a number, or null; correct the line, or remove it"),
    ('"step": 2, "grad_norm": []', r"grad_norm is \[\]; "), ('"step": 2, "images_per_second": 1e999', "is inf; ")])
def test_a_number_that_is_none_is_named(tmp_path, fields, said):
    (tmp_path / METRICS).write_text('{"kind": "eval", "step": 1, "loss": null}\n{"kind": "train", %s}\n' % fields)
    with pytest.raises(DataError, match=rf"metrics\.jsonl, line 2: .*{said}"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_no_run(tmp_path):
    for call in (read_metrics, lambda run: plot_runs([run], tmp_path / "c.png")):
        with pytest.raises(DataError, match=f"{tmp_path} has no metrics.jsonl"):
            call(tmp_path)
    assert not (tmp_path / "c.png").exists()


def colours(path):
    """How many pixels have each of matplotlib's first three line colours."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return [int((pixels == np.array(colour)).all(1).sum()) for colour in
            ((31, 119, 180), (255, 127, 14), (44, 160, 44))]


def test_curves_show_training_validation_and_average(tmp_path):
    plot_runs([write_run(tmp_path / "a")], tmp_path / "a.png")
    plot_runs([write_run(tmp_path / "b", ema=False)], tmp_path / "b.png")
    with_average, without = colours(tmp_path / "a.png"), colours(tmp_path / "b.png")
    assert all(count > 100 for count in with_average)
    assert without[0] > 100 and without[1] > 100 and without[2] == 0


def test_curves_of_a_run_that_has_just_begun_are_drawn(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    (run / METRICS).write_text("")
    plot_runs([run], tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").size[0] > 100


def test_curves_of_several_runs_draw_each(tmp_path):
    runs = [write_run(tmp_path / name, ema=False, loss=loss) for name, loss in (("a", 2.0), ("b", 5.0))]
    plot_runs(runs[:1], tmp_path / "one.png")
    plot_runs(runs, tmp_path / "two.png")
    assert colours(tmp_path / "one.png")[2] == 0 and colours(tmp_path / "two.png")[2] > 100


def test_events_are_one_json_object_a_line(tmp_path):
    lines = (write_run(tmp_path / "a") / METRICS).read_text().splitlines()
    assert len(lines) == 6 and all(isinstance(json.loads(line), dict) for line in lines)


def test_numbers_that_are_not_finite_are_null_and_leave_a_gap_in_the_curve(tmp_path):
    writer = MetricsWriter(tmp_path, 0, 0)
    for step, loss in ((1, 2.0), (2, float("nan")), (3, float("inf"))):
        writer.write("train", step, epoch=float(step), loss=loss, lr=0.1, images_per_second=1.0)
    writer.close()
    assert "NaN" not in (tmp_path / METRICS).read_text() and "Infinity" not in (tmp_path / METRICS).read_text()
    assert [event["loss"] for event in read_metrics(tmp_path)] == [2.0, None, None]
    plot_runs([tmp_path], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_tool_draws_several_runs_into_one_picture_and_names_what_is_no_run(tmp_path, capsys):
    tool = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "plot_run.py"))["main"]
    runs = [str(write_run(tmp_path / name)) for name in "ab"]
    assert tool([*runs, "--output", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    for run in (tmp_path, tmp_path / "gone", tmp_path / "both.png"):
        assert tool([str(run)]) == 3
        assert f"plot_run: {run} has no metrics.jsonl" in capsys.readouterr().err


def test_an_average_that_was_given_up_within_the_run_leaves_a_gap(tmp_path):
    run = write_run(tmp_path / "a")
    with (run / METRICS).open("a") as file:
        print(json.dumps({"kind": "eval", "step": 6, "epoch": 3, "loss": 1.0, "top1": 60.0}), file=file)
    plot_runs([run], tmp_path / "c.png")
    assert all(count > 100 for count in colours(tmp_path / "c.png"))


@pytest.mark.parametrize("content, said", [
    (b"\xff\xfe\n", "cannot be read: 'utf-8' codec"),
    (b'{"kind": "train", "step": 7, "epoch": 1, "loss": 2}\n',
     "the train event of step 7 has no lr, images_per_second; it is not of a run of this version"),
    (b'{"kind": "eval", "step": 7}\n', "the eval event of step 7 has no epoch; ")])
def test_metrics_that_are_none_of_ours_are_told(tmp_path, content, said):
    (tmp_path / METRICS).write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path / METRICS}:? {said}"):
        plot_runs([tmp_path], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("output, said", [
    ("gone/a.png", "cannot be written: No such file or directory; give a file in a folder that is there"),
    ("a/metrics.jsonl/a.png", "cannot be written: Not a directory; give"),
    ("folder.png", "cannot be written: it is a folder; give"),
    ("a.md", r"has not the ending of a picture; give a name such as a.png \(known: .*jpg,.*pdf, .*png.*\)"),
    ("picture", "has not the ending of a picture; give a name such as picture.png"),
])
def test_the_tool_refuses_an_output_that_it_cannot_write(tmp_path, capsys, output, said):
    tool = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "plot_run.py"))["main"]
    run = write_run(tmp_path / "a")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert tool([str(run), "--output", str(tmp_path / output)]) == 2
    assert re.search(f"^plot_run: --output {tmp_path}/{output} {said}", capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_full_of_the_picture_is_told(tmp_path):
    run = write_run(tmp_path / "a")
    with files_may_not_grow(tmp_path), pytest.raises(DataError, match="c.png could not be written: File too large"):
        plot_runs([run], tmp_path / "c.png")
