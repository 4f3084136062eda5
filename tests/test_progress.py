"""The line that says where a run stands: on a terminal one that moves, elsewhere lines without control characters."""

import io
import re
import subprocess
import sys
import time

import pytest

from support.launchers import ROOT
from support.terminal import Terminal
from vir.reports.metrics import MetricsWriter
from vir.reports.progress import Progress

TOOL = ROOT / "tools" / "follow_run.py"


def train(step, seconds, loss=2.5):
    return {"kind": "train", "step": step, "total_steps": 40, "time": seconds, "loss": loss,
            "images_per_second": 640.4}


def said(events, moves=False):
    stream = io.StringIO()
    progress = Progress(stream, moves)
    progress.show(events)
    progress.close()
    return stream.getvalue()


def test_the_newest_step_is_told_with_its_pace_and_the_last_accuracy():
    events = [train(10, 100.0), {"kind": "eval", "step": 10, "top1": 40.0, "ema_top1": 45.04}, train(20, 130.0, 1.25)]
    assert said(events) == "step 20 of 40, loss 1.250, 640 images/s, 0:01:00 left, top-1 45.0 %\n"
    del events[1]["ema_top1"]
    assert said(events).endswith("left, top-1 40.0 %\n")


def test_the_first_interval_tells_no_pace_and_a_loss_that_is_not_finite_is_called_so():
    assert said([train(10, 100.0, loss=None)]) == "step 10 of 40, loss not finite, 640 images/s\n"
    assert said([]) == said([{"kind": "eval", "step": 1, "top1": 1.0}]) == ""


def test_where_lines_stay_an_evaluation_is_told_at_once_and_steps_are_not():
    stream = io.StringIO()
    progress, events = Progress(stream, moves=False), []
    for event in (train(10, 0.0), train(20, 1.0), {"kind": "eval", "step": 20, "top1": 50.0}, train(30, 2.0)):
        events.append(event)
        progress.show(events)
    assert re.findall(r"^step (\d+)", stream.getvalue(), flags=re.MULTILINE) == ["10", "20"]
    assert not re.search(r"[^ -~\n]", stream.getvalue())


def test_on_a_terminal_one_line_is_drawn_anew():
    drawn = said([train(10, 0.0), train(20, 1.0)], moves=True)
    assert drawn.count("\n") == 1 and "\r" in drawn
    assert " 50 % |" in drawn and "step 20 of 40" in drawn.split("\r")[-1]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_the_tool_follows_a_run_that_goes_on_and_leaves_out_what_an_earlier_start_wrote(tmp_path, on_terminal):
    """Until it is asked to end, as the quick start does."""
    run = tmp_path / "a run"
    run.mkdir()
    writer = MetricsWriter(run, 0, 0)
    writer.write("train", 5, total_steps=40, epoch=0.5, loss=9.0, images_per_second=1.0)
    writer.write("start", 6, epoch=0.5, ranks=1, imports_seconds=3.0)
    words = [sys.executable, TOOL, run]
    if on_terminal:
        with Terminal(*words) as terminal:
            _go_on(writer, lambda: "step 20 of 40" in terminal.said())
            terminal.press_ctrl_c()
            output = terminal.wait(60)
            assert terminal.process.returncode == 0
        assert "\r" in output
    else:
        with (tmp_path / "out").open("w") as out, subprocess.Popen(words, cwd=ROOT, stderr=out) as process:
            _go_on(writer, lambda: "step 20 of 40" in (tmp_path / "out").read_text())
            process.terminate()
            assert process.wait(60) == 0
        output = (tmp_path / "out").read_text()
        assert "\r" not in output
    assert "loss 1.000" in output and "9.000" not in output


def _go_on(writer, is_told):
    """Write steps until one is told: the tool takes a moment to begin."""
    deadline = time.monotonic() + 60
    while not is_told():
        assert time.monotonic() < deadline
        writer.write("train", 20, total_steps=40, epoch=2.0, loss=1.0, images_per_second=1.0)
        time.sleep(0.3)


def test_the_tool_refuses_a_broken_line_by_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"\n')
    done = subprocess.run([sys.executable, TOOL, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr == (f"follow_run: {tmp_path / 'metrics.jsonl'}, line 1 is not JSON: Expecting ',' delimiter: "
                           "line 1 column 17 (char 16)\n")
