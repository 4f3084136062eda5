"""launch/deepspeed.sh on one machine, with real ranks: one run that is asked to save and to evaluate, loses a rank,
starts again, is stopped, loses its runner, and ends, by mpirun, as one without script and launcher that met nothing,
bit for bit. Other ways to stop are those of tests/test_nodes.py."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from support.launchers import HANGS, ROOT
from support.tiny_runs import command, launch, saved_step, steps_done, train_events, weights
from vir import status
from vir.launch import main
from vir.reports.metrics import read_metrics

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

STEPS, EVERY = 60, 20
TWO = ["--num_accelerators", "2"]


class Script:
    """A launch script at work in a folder whose name has a space; all of it is gone when the block ends."""

    def __init__(self, tmp: Path, arguments: list[str], *options: str):
        self.run, self.began = Path(arguments[arguments.index("--output") + 1]), time.time()
        self._log = (tmp / f"{time.monotonic_ns()}.log").open("w+")
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "deepspeed.sh"), *options, *arguments], cwd=tmp,
            stdout=self._log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        for process in self.of_this_start():
            process.kill()

    def said(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def of_this_start(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline", "environ", "status"])
                if str(self.run) in (process.info["environ"] or {}).get(status.FILE, "")
                and process.info["status"] != psutil.STATUS_ZOMBIE]

    def named(self, words: str) -> psutil.Process:
        found = [process for process in self.of_this_start() if words in " ".join(process.info["cmdline"] or [])]
        return min(found, key=lambda process: process.pid)

    def wait_until(self, holds, what: str):
        until = time.monotonic() + HANGS
        while not holds():
            assert self.process.poll() is None and time.monotonic() < until, f"{what}?\n{self.said()[-6000:]}"
            time.sleep(0.02)

    def steps(self) -> list[int]:
        return steps_done(self.run, self.began)

    def wait_for_steps(self, count: int = 2):
        self.wait_until(lambda: len(self.steps()) >= count, f"{count} steps")

    def ends(self) -> int:
        code = self.process.wait(timeout=HANGS)
        assert self.of_this_start() == [], "processes are left"
        assert not list(self.run.glob(".status*"))
        return code


def by_mpirun(tmp: Path) -> list[str]:
    """By deepspeed's runner of Open MPI, with this machine as the only one."""
    (tmp / "hostfile").write_text("localhost slots=2\n")
    return ["--hostfile", str(tmp / "hostfile"), "--force_multi", "--launcher", "openmpi", "--master_addr", "127.0.0.1",
            "--launcher_args", "--allow-run-as-root --oversubscribe --bind-to none --mca btl_tcp_if_include lo"]


def evaluated(run: Path) -> list[int]:
    return [event["step"] for event in read_metrics(run) if event["kind"] == "eval"]


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("launch") / "a folder"
    tmp.mkdir()

    def arguments(name):
        return [*command(shards, tmp / name, "zero2_fp32", steps=STEPS, every=EVERY), "--train.rank_timeout", "10"]

    codes, said = launch(tmp, [arguments("undisturbed")])
    assert codes == [0], said[-4000:]
    met = {}
    asked = arguments("asked")
    with Script(tmp, asked, *TWO, "--max-restarts", "2") as script:
        script.wait_for_steps()
        (script.run / "SAVE").touch()
        script.wait_until(lambda: saved_step(script.run), "a checkpoint")
        met["saved"] = saved_step(script.run), ""
        (script.run / "EVALUATE").touch()
        script.wait_until(lambda: evaluated(script.run), "an evaluation")
        met["evaluated"] = evaluated(script.run)[0], ""
        script.named("--local_rank=1").kill()
        script.wait_until(lambda: "starting again" in script.said(), "a start again")
        script.began = time.time()
        script.wait_for_steps()
        script.process.send_signal(signal.SIGUSR1)
        met["a rank killed, then SIGUSR1 to the script"] = script.ends(), script.said()
    with Script(tmp, asked, *TWO) as script:  # which has no handler of signals on one machine
        script.wait_for_steps()
        script.named("launcher.runner").send_signal(signal.SIGTERM)
        met["SIGTERM to the runner"] = script.ends(), script.said()
        met["saved by it"] = saved_step(script.run), script.steps()[-1]
    with Script(tmp, asked, *(by_mpirun(tmp) if shutil.which("mpirun") else TWO)) as script:
        met["done"] = script.ends(), script.said()
    return tmp, met


def test_a_run_that_is_done_ends_with_0(runs):
    code, said = runs[1]["done"]
    assert code == 0, said[-4000:]


def test_a_run_that_is_asked_to_saves_and_evaluates_and_goes_on(runs):
    assert 0 < runs[1]["saved"][0] < EVERY
    assert runs[1]["saved"][0] <= runs[1]["evaluated"][0] < STEPS and evaluated(runs[0] / "undisturbed") == [STEPS]
    assert not {"SAVE", "EVALUATE", "STOP"} & {path.name for path in (runs[0] / "asked").iterdir()}


def test_a_lost_rank_is_named_and_the_run_started_again(runs):
    code, said = runs[1]["a rank killed, then SIGUSR1 to the script"]
    assert code == 75, said[-4000:]
    assert re.search(r"vir-launch: exit code 5, told by rank 0 \(\S+\): rank 1 \(\S+\) .* is lost", said)
    assert re.search(r"vir-launch: starting again from step \d+, restart 1 of 2", said)
    assert "stopped by SIGUSR1" in said


def test_ranks_whose_runner_was_killed_save_their_last_step(runs):
    code, said = runs[1]["SIGTERM to the runner"]
    assert code == 75 and "before its ranks: waiting for them to save and end" in said, said[-4000:]
    saved, last = runs[1]["saved by it"]
    assert saved == last


def test_after_all_this_the_run_is_the_undisturbed_one_bit_for_bit(runs, tmp_path):
    kept = ("step", "samples_seen", "loss", "lr", "grad_norm", "updates")
    expected, found = ([{key: event[key] for key in kept} for event in train_events(runs[0] / name)]
                       for name in ("undisturbed", "asked"))
    assert [event["step"] for event in expected] == list(range(1, STEPS + 1)) and found == expected
    expected, found = (weights(runs[0] / name, STEPS, tmp_path, ema=True) for name in ("undisturbed", "asked"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- before anything starts


@pytest.mark.parametrize("words, error", [
    (["--data.train", "x", "--lr", "1"], r"vir-launch: no such flag: --lr \(use --optim\.lr\)"),
    (["--data.train", "x", "--hostfile", "/no/file"], r"--hostfile /no/file cannot be read"),
    (["--data.train", "x", "--max-restarts", "few"], r"--max_restarts: 'few' is no number from 0 on"),
])
def test_a_wrong_option_is_told_before_anything_starts(words, error, capfd):
    try:
        code = main(["deepspeed", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and re.search(error, capfd.readouterr().err)
