"""tests/gpu.sh without a GPU: each step of its hour is rehearsed; one that fails or hangs does not end the others."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.gpu_hour.driver import Step, run
from support.gpu_hour.modules import missing
from support.gpu_hour.page import NONE, page
from support.gpu_hour.steps import FULL, REHEARSAL, Hour
from support.launchers import HANGS, ROOT, call

PRINTS = ["-n", "1", "-r", "1", "print('here')"]
HANGS_WITH_CHILDREN = ["-n", "1", "-r", "1", "import subprocess, sys; words = [sys.executable, '-c', "
                       "'import time; time.sleep(1000 + 0.125)']; subprocess.Popen(words, start_new_session=True); "
                       "subprocess.run(words)"]


def step(name, arguments=PRINTS, seconds=5.0, **more):
    return Step(name=name, module="timeit", arguments=arguments, seconds=seconds, **more)


def fail():
    raise KeyError("loss")


def test_whatever_becomes_of_a_step_the_others_are_run_and_kept(tmp_path):
    reports = []
    steps = [step("good", read=lambda: {"found": 1}), step("bad", ["-n", "none"], read=lambda: {"partly": 2}),
             step("hangs", HANGS_WITH_CHILDREN, 0.7), step("dies", ["-n", "1", "import os; os.kill(os.getpid(), 9)"]),
             step("unread", read=fail), step("unprepared", prepare=fail), step("too long", seconds=1000),
             step("in/a folder", read=lambda: {"found": 3})]
    began = time.monotonic()
    outcomes = run(steps, tmp_path, 60, lambda so_far: reports.append(len(so_far)))
    assert time.monotonic() - began < 30
    assert [(one.name, one.ended, one.found) for one in outcomes] == [
        ("good", "done", {"found": 1}), ("bad", "failed", {"partly": 2}), ("hangs", "over time", {}),
        ("dies", "failed", {}), ("unread", "failed", {}), ("unprepared", "failed", {}), ("too long", "left out", {}),
        ("in/a folder", "done", {"found": 3})]
    said = [one.said for one in outcomes]
    assert said[0] == "" and said[2] == "ended after 2 s" and said[3].startswith("code -9: ")
    assert said[1].startswith("code ") and said[4] == said[5] == "KeyError: 'loss'"
    assert said[6].startswith("takes about 1000 s, ") and said[6].endswith(" s were left")
    assert reports == list(range(1, len(steps) + 1))
    assert "here" in (tmp_path / "in" / "a folder.log").read_text()
    processes = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"1000 + 0.125" in words for words in processes)  # nor does a process of its stay, in any session


def test_a_second_call_does_what_is_not_done_and_keeps_the_rest(tmp_path):
    reports, bad = [], ["-n", "none"]
    first = run([step("one", read=lambda: {"found": 1}), step("two", bad), step("three"), step("four", seconds=1000)],
                tmp_path, 60, lambda _: None)
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "file").touch()
    (tmp_path / "one.log").unlink()
    second = run([step("one", bad), step("two", read=lambda: {"found": 2}, leaves=tmp_path / "left"),
                  step("three", bad), step("four")], tmp_path, 60, reports.append, first)
    assert [(one.name, one.ended, one.found) for one in second] == [
        ("one", "done", {"found": 1}), ("two", "done", {"found": 2}), ("three", "done", {}), ("four", "done", {})]
    assert [[one.ended for one in so_far] for so_far in reports] == [
        ["done", "done", "done", "left out"], ["done"] * 4]
    assert not (tmp_path / "one.log").exists() and not (tmp_path / "left").exists()


def test_a_step_with_a_bound_of_its_own_gets_three_quarters_of_it(tmp_path):
    """Of the 12 s after which it is ended: pytest, which gets a session's bound so, still writes its file then."""
    (outcome,) = run([step("bounded", ["-r", "1"], seconds=4, bound_flag="--number")], tmp_path, 60, list)
    assert outcome.ended == "done" and (tmp_path / "bounded.log").read_text().startswith("9 loops")


def test_a_page_of_nothing_and_of_failures_has_its_tables():
    assert NONE in page([])
    outcomes = run([step("digits/zero1_fp16", ["-n", "|"])], Path("/tmp"), 0.1, lambda _: None)
    assert "| digits/zero1_fp16 | left out | 0 | takes about 5 s" in page(outcomes)


def test_the_hour_fits_into_its_minutes_and_names_no_step_twice(tmp_path):
    steps = Hour(tmp_path, FULL).steps()
    assert len({one.name for one in steps}) == len(steps) > 30
    assert sum(one.seconds for one in steps) <= 25 * 60
    assert [one.name for one in steps[:2]] == ["environment", "tests"]


def hour(*arguments, **environment):
    """tests/gpu.sh behind its look for modules."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return call(sys.executable, "-m", "support.gpu_hour", *arguments, PYTHONPATH=paths, **environment)


@pytest.mark.parametrize("file, content", [("mine.txt", ""), ("gpu.json", '{"rehearsal": true}')])
def test_a_folder_with_something_else_in_it_is_refused(file, content, tmp_path):
    (tmp_path / file).write_text(content)
    done = hour("--output", tmp_path)
    said = f"--output {tmp_path} is not empty and has no gpu.json of such an hour; give another folder"
    assert done.returncode == 2 and said in done.stdout


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    done = hour("--output", tmp_path / "new", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no CUDA device: give --rehearse" in done.stdout
    assert not (tmp_path / "new").exists()


def test_what_is_missing_is_named_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import quite_absent\n")
    (tmp_path / "of_another_torch.py").write_text("raise OSError('undefined\\nsymbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert missing(("json", "absent", "needs_more", "of_another_torch")) == [
        "absent", "needs_more (No module named 'quite_absent')", "of_another_torch (undefined symbol)"]


def test_it_is_valid_bash():
    assert subprocess.run(["bash", "-n", ROOT / "tests" / "gpu.sh"], timeout=20).returncode == 0


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_every_step_of_the_hour_is_rehearsed(tmp_path):
    folder = tmp_path / "an hour"
    done = call("bash", "tests/gpu.sh", "--rehearse", "--output", folder, timeout=HANGS, PYTHON=sys.executable)
    report = json.loads((folder / "gpu.json").read_text())
    ended = {one["name"]: (one["ended"], one["said"]) for one in report["steps"]}
    assert ended == {one.name: ("done", "") for one in Hour(tmp_path, REHEARSAL).steps()}, done.stdout[-4000:]
    assert done.returncode == 0 and report["rehearsal"]

    found = {one["name"]: one["found"] for one in report["steps"]}
    assert found["resume/compared"] == {"steps after the resume": 2, "steps with other losses": [], "other weights": [],
                                        "other averages": []}
    on_cpu = found["digits on CPU/zero0_fp32"]["losses"]
    assert found["digits/zero0_fp32"]["losses"] == on_cpu and len(on_cpu) == 3  # here the same device
    for config in ("zero1_fp16", "zero1_bf16", "zero2_offload_bf16", "zero3_bf16_ckpt"):
        losses = found[f"digits/{config}"]["losses"]
        assert losses != on_cpu and list(losses.values()) == pytest.approx(list(on_cpu.values()), rel=2e-2)
    assert found["tests"].keys() == {"skipped", "not passed"}
    assert "traceEvents" in json.loads(gzip.decompress(Path(found["profile"]["trace"]).read_bytes()))
    assert not (folder / "profile" / "profile" / "rank00000.json").exists()
    assert {row["row"] for row in found["operator/17"]["results"]} >= {"sdpa", "auto", "2-D auto"}
    assert not list((folder / "step time").rglob("checkpoints")) and not (folder / "profile" / "checkpoints").exists()

    text = (folder / "gpu.md").read_text()
    tables = text.split("## Digits")[1]
    assert f"{NONE} |" not in tables and f"\n{NONE}\n" not in tables, tables
    for name in ("vir_small, eager", "vir_small, compiled", "vit_base, compiled", "zero3_bf16_ckpt", "fp32 as TF32"):
        assert f"| {name} |" in tables
