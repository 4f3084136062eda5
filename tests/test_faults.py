"""One run through every fault of one machine: each start of the same command meets another, without a launcher that
would end the other rank. All must be gone soon, with a code that is documented and a line that names the cause, and at
the end the run must be the same as one that met nothing, bit for bit."""

import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support.faults import GONE_WITHIN, Ranks
from support.launchers import HANGS
from support.tiny_runs import command, train_events, weights
from vir.checkpoints.info import newest, read_info
from vir.reports.metrics import read_metrics

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

STEPS, EVERY, EVALUATE = 160, 8, 40
SILENCE = 8
"""Seconds after which a rank counts as lost here."""
READ_THAT_HANGS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>
/* A network mount whose server is gone: a read of a large enough piece never returns while the file $HANG is there. */
ssize_t pread64(int file, void *into, size_t size, off64_t offset) {
    ssize_t (*real)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pread64");
    while (size > 100 && getenv("HANG") && access(getenv("HANG"), F_OK) == 0) sleep(1);
    return real(file, into, size, offset);
}
"""


def arguments(shards: Path, run: Path) -> list[str]:
    return [*command(shards, run, "zero2_fp32", steps=STEPS, every=EVERY), "--train.rank_timeout", f"{SILENCE}",
            "--data.workers", "4", "--data.prefetch", "8", "--checkpoint.keep", "3",
            "--eval.every_epochs", str(EVALUATE * 48 / 400)]


def kill_in_start_up(ranks):
    ranks.wait_until(ranks.run.is_dir, "the run folder")
    ranks.processes[1].kill()


def kill_in_a_step(ranks):
    ranks.wait_for_steps()
    ranks.processes[1].kill()


def kill_rank_0_in_a_step(ranks):
    ranks.wait_for_steps()
    ranks.processes[0].kill()


def kill_in_a_save(ranks):
    ranks.wait_for_a_save()
    ranks.processes[1].kill()


def kill_in_evaluation(ranks):
    ranks.wait_until(lambda: any(step % EVALUATE == 0 for step in ranks.steps()), "an evaluation")
    ranks.processes[1].kill()


def stop_a_rank(ranks):
    ranks.wait_for_steps()
    ranks.processes[1].send_signal(signal.SIGSTOP)


def stop_rank_0(ranks):
    ranks.wait_for_steps()
    ranks.processes[0].send_signal(signal.SIGSTOP)


def kill_a_worker(ranks):
    ranks.wait_for_steps()
    ranks.workers(1)[2].kill()


def crash_a_worker(ranks):
    ranks.wait_for_steps()
    ranks.workers(0)[1].send_signal(signal.SIGSEGV)


def let_reads_hang(ranks):
    ranks.wait_for_steps()
    (ranks.run.parent / "hang").touch()
    ranks.wait_until(lambda: all("no batch for" in ranks.said(rank) for rank in range(2)), "a word about the data")
    for process in ranks.processes:
        process.terminate()


LOST = r"rank {lost} \(\S+\) (at step|saving after step|evaluating after step) \d+.* \(process \d+\) is lost: {how}\. " \
       r"Rank {other} \(\S+\) .* ends with it, exit code 5; the same command continues from the last checkpoint"
GONE, SILENT = "its process is gone", r"silent for [89] s"
# What is done, the exit codes of both ranks, and what the rank that is left must say.
FAULTS = {
    "killed in start-up": (kill_in_start_up, [5, -9], (0, r"rank 1 .* is lost: its process is gone")),
    "killed in a step": (kill_in_a_step, [5, -9], (0, LOST.format(lost=1, how=GONE, other=0))),
    "rank 0 killed in a step": (kill_rank_0_in_a_step, [-9, 5],
                                (1, LOST.format(lost=0, how="its store cannot be reached.*", other=1))),
    "killed in a save": (kill_in_a_save, [5, -9], (0, LOST.format(lost=1, how=GONE, other=0))),
    "killed in an evaluation": (kill_in_evaluation, [5, -9], (0, LOST.format(lost=1, how=GONE, other=0))),
    "stopped": (stop_a_rank, [5, -9], (0, LOST.format(lost=1, how=SILENT, other=0))),
    "rank 0 stopped": (stop_rank_0, [-9, 5],
                       (1, LOST.format(lost=0, how="its store has not answered for [89] s", other=1))),
    "worker killed": (kill_a_worker, [5, 3],
                      (1, r"vir.train: loader process 2 at digits-train-\S+ of \S+ was killed by SIGKILL; SIGKILL is "
                          r"mostly the system's answer to a lack of memory: lower --data.workers")),
    "worker crashed": (crash_a_worker, [3, 5], (1, r"rank 0 .* ended with exit code 3, loader process 1 at .* was "
                                                   r"killed by SIGSEGV")),
    "reads that hang": (let_reads_hang, [75, 75],
                        (0, r"no batch for [89] s, waiting for loader process \d at digits-train-\d+.tar:\S+@\d+ of")),
}


@dataclass
class Met:
    """What a fault came to."""

    codes: list[int]
    said: list[str]
    seconds: float
    saved: int
    """Step of the newest checkpoint after it."""
    began_at: int
    """Step that this start continued from."""


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "hang.c").write_text(READ_THAT_HANGS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "hang.so", folder / "hang.c", "-ldl"], check=True)
    return folder / "hang.so"


@pytest.fixture(scope="module")
def runs(shards, shim, tmp_path_factory) -> tuple[Path, dict[str, Met]]:
    """The folder of the runs `undisturbed` and `faulty`, and what each fault came to."""
    tmp, met = tmp_path_factory.mktemp("faults"), {}
    with Ranks(arguments(shards, tmp / "undisturbed"), tmp / "undisturbed", tmp / "undisturbed.log") as ranks:
        assert ranks.codes() == [0, 0], ranks.said(0)[-3000:]
    for name, (fault, _, _) in FAULTS.items():
        saved = newest(tmp / "faulty")
        began_at = read_info(saved).step if saved else 0
        with Ranks(arguments(shards, tmp / "faulty"), tmp / "faulty", tmp / name.replace(" ", "-"),
                   LD_PRELOAD=str(shim), HANG=str(tmp / "hang")) as ranks:
            fault(ranks)
            seconds = ranks.seconds_until_gone()
            (tmp / "hang").unlink(missing_ok=True)
            saved = newest(tmp / "faulty")
            met[name] = Met(ranks.codes(), [ranks.said(0), ranks.said(1)], seconds,
                            read_info(saved).step if saved else 0, began_at)
    with Ranks(arguments(shards, tmp / "faulty"), tmp / "faulty", tmp / "last") as ranks:
        assert ranks.codes() == [0, 0], ranks.said(0)[-3000:]
    return tmp, met


@pytest.mark.parametrize("name", FAULTS)
def test_all_is_gone_soon_with_a_documented_code_and_a_line_that_names_the_cause(name, runs):
    _, codes, (rank, line) = FAULTS[name]
    met = runs[1][name]
    print(name, met.seconds, met.codes, met.began_at, met.saved)
    assert met.codes == codes, met.said
    assert met.seconds < GONE_WITHIN
    told = [said for said in met.said[rank].splitlines() if re.search(line, said)]
    assert len(told) == 1, met.said[rank]
    if 75 not in codes:
        assert "Traceback" not in met.said[rank], met.said[rank]


def test_each_start_went_on_from_the_newest_checkpoint(runs):
    went_on = [met.saved for met in runs[1].values()]
    assert went_on == sorted(went_on) and went_on[-1] > EVALUATE
    assert [met.began_at for met in runs[1].values()] == [0, *went_on[:-1]]


def test_a_stop_while_reads_hang_saves_the_last_finished_step(runs):
    met = runs[1]["reads that hang"]
    assert met.saved > met.began_at
    assert f"saving after step {met.saved}" in met.said[0] or "stopped by a signal" in met.said[0]


def test_after_all_faults_the_run_is_the_undisturbed_one_bit_for_bit(runs, tmp_path):
    tmp, _ = runs
    kept = ("step", "samples_seen", "loss", "lr", "grad_norm", "updates")
    expected, found = ([{key: event[key] for key in kept} for event in train_events(tmp / name)]
                       for name in ("undisturbed", "faulty"))
    assert [event["step"] for event in expected] == list(range(1, STEPS + 1)) and found == expected
    expected, found = ([(event["step"], event["top1"], event["ema_loss"]) for event in read_metrics(tmp / name)
                        if event["kind"] == "eval"] for name in ("undisturbed", "faulty"))
    assert found == expected
    for ema in (False, True):
        expected, found = (weights(tmp / name, STEPS, tmp_path, ema=ema) for name in ("undisturbed", "faulty"))
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
