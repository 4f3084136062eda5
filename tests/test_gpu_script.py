"""tests/gpu.sh without a GPU: each step of its hour is rehearsed; one that fails or hangs does not end the others."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.gpu_hour.driver import Step, run
from support.gpu_hour.page import NONE, page
from support.gpu_hour.steps import FULL, Hour
from support.launchers import HANGS, ROOT, call

PRINTS = ["-n", "1", "-r", "1", "print('here')"]
HANGS_WITH_A_CHILD = ["-n", "1", "-r", "1", "import subprocess, sys; subprocess.run([sys.executable, '-c', "
                      "'import time; time.sleep(1000 + 0.125)'])"]


def step(name, arguments=PRINTS, seconds=5.0, **more):
    return Step(name=name, module="timeit", arguments=arguments, seconds=seconds, **more)


def fail():
    raise KeyError("loss")


def test_whatever_becomes_of_a_step_the_others_are_run_and_kept(tmp_path):
    reports = []
    steps = [step("good", read=lambda: {"found": 1}), step("bad", ["-n", "none"], read=lambda: {"partly": 2}),
             step("hangs", HANGS_WITH_A_CHILD, 0.7), step("dies", ["-n", "1", "import os; os.kill(os.getpid(), 9)"]),
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
    assert not any(b"1000 + 0.125" in words for words in processes)  # nor does a process of its stay


def test_a_page_of_nothing_and_of_failures_has_its_tables():
    assert NONE in page([])
    outcomes = run([step("digits/zero1_fp16", ["-n", "|"])], Path("/tmp"), 0.1, lambda _: None)
    assert "| digits/zero1_fp16 | left out | 0 | takes about 5 s" in page(outcomes)


def test_the_hour_fits_into_its_minutes_and_names_no_step_twice(tmp_path):
    steps = Hour(tmp_path, FULL).steps()
    assert len({one.name for one in steps}) == len(steps) > 30
    assert sum(one.seconds for one in steps) <= 25 * 60
    assert [one.name for one in steps[:2]] == ["environment", "tests"]


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "gpu.json").touch()
    done = call("bash", "tests/gpu.sh", "--output", tmp_path, PYTHON=sys.executable)
    assert done.returncode == 2 and f"--output {tmp_path} is not empty; give another folder" in done.stdout


def test_it_is_valid_bash():
    assert subprocess.run(["bash", "-n", ROOT / "tests" / "gpu.sh"], timeout=20).returncode == 0


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
def test_every_step_of_the_hour_is_rehearsed(tmp_path):
    folder = tmp_path / "an hour"
    done = call("bash", "tests/gpu.sh", "--rehearse", "--output", folder, timeout=HANGS, PYTHON=sys.executable)
    report = json.loads((folder / "gpu.json").read_text())
    ended = {one["name"]: (one["ended"], one["said"]) for one in report["steps"]}
    assert ended == {one.name: ("done", "") for one in Hour(tmp_path, FULL).steps()}, done.stdout[-4000:]
    assert done.returncode == 0 and report["rehearsal"]

    found = {one["name"]: one["found"] for one in report["steps"]}
    assert found["resume/compared"] == {"steps": 4, "steps with other losses": [], "other weights": [],
                                        "other averages": []}
    on_cpu = found["digits on CPU/zero0_fp32"]["losses"]
    assert found["digits/zero0_fp32"]["losses"] == on_cpu and len(on_cpu) == 3  # here the same device
    for config in ("zero1_fp16", "zero1_bf16", "zero2_offload_bf16", "zero3_bf16_ckpt"):
        losses = found[f"digits/{config}"]["losses"]
        assert losses != on_cpu and list(losses.values()) == pytest.approx(list(on_cpu.values()), rel=2e-2)
    assert found["tests"].keys() == {"skipped", "not passed"}
    assert Path(found["profile"]["trace"]).is_file()
    assert {row["row"] for row in found["operator"]["results"]} >= {"sdpa", "auto", "2-D auto"}
    assert not list((folder / "step time").rglob("checkpoints"))

    text = (folder / "gpu.md").read_text()
    tables = text.split("## Digits")[1]
    assert f"{NONE} |" not in tables and f"\n{NONE}\n" not in tables, tables
    for name in ("vir_small, eager", "vir_small, compiled", "vit_base, compiled", "zero3_bf16_ckpt", "fp32 as TF32"):
        assert f"| {name} |" in tables
