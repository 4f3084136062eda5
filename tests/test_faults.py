"""One run through every fault of one machine: each start of the same command meets another, mostly without a launcher
that would end the other rank. All must be gone soon, with a code that is documented and a line that names the cause,
and at the end the run must be the same as one that met nothing, bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from support.faults import GONE_WITHIN, Ranks, members
from support.forked import Imported
from support.launchers import HANGS, call
from support.tiny_runs import command, saved_step, train_events, weights
from vir.reports.metrics import read_metrics
from vir.run_folder import CHECKPOINTS

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

STEPS, EVERY, EVALUATE = 160, 16, 40  # steps enough for all faults on a machine so busy that each is late
SILENCE = 8
"""Seconds after which a rank counts as lost here."""
READ_THAT_HANGS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
/* A network mount whose server is gone for rank 1: while the file $HANG is there, a read of a large enough piece never
   returns. Rank 0 waits for rank 1 in a collective. */
static int hangs(void) {
    const char *rank = getenv("SLURM_PROCID"), *hang = getenv("HANG");
    return rank && hang && strcmp(rank, "1") == 0 && access(hang, F_OK) == 0;
}
/* It cannot tell what it has at hand. */
ssize_t preadv64v2(int file, const struct iovec *into, int count, off64_t offset, int flags) {
    errno = EOPNOTSUPP;
    return -1;
}
ssize_t pread64(int file, void *into, size_t size, off64_t offset) {
    ssize_t (*real)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pread64");
    while (size > 100 && hangs()) sleep(1);
    return real(file, into, size, offset);
}
"""


def arguments(shards: Path, run: Path) -> list[str]:
    return [*command(shards, run, "zero2_fp32", steps=STEPS, every=EVERY), "--train.rank_timeout", f"{SILENCE}",
            "--data.workers", "4", "--data.prefetch", "8", "--checkpoint.keep", "3",
            "--eval.every_epochs", str(EVALUATE * 48 / 400)]


def wait_for_evaluation(ranks):
    ranks.wait_until(lambda: any(step % EVALUATE == 0 for step in ranks.steps()), "an evaluation")


def stop_in_start_up(ranks):
    ranks.wait_until(lambda: "ranks: 2 on" in ranks.said(0), "the process group")
    ranks.ask_to_stop()


def warn_of_preemption_in_evaluation(ranks):
    wait_for_evaluation(ranks)
    ranks.ask_to_stop(signal.SIGUSR1)


def meet_a_defect(ranks):
    """The program does it."""


def kill_in_start_up(ranks):
    ranks.wait_until(lambda: "ranks: 2 on" in ranks.said(0), "the process group")
    ranks.processes[1].kill()


def kill_in_a_step(ranks):
    ranks.wait_for_steps()
    ranks.processes[1].kill()


def kill_rank_0_in_a_step(ranks):
    ranks.wait_for_steps()
    ranks.processes[0].kill()


def kill_in_evaluation(ranks):
    wait_for_evaluation(ranks)
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
    (ranks.run.parent.parent / "hang").touch()
    ranks.wait_until(lambda: NO_BATCH in ranks.said(1), "a word about the data")
    ranks.ask_to_stop()


def fill_the_disk(ranks):
    """Right after a save: until the next one, the metrics grow by more than the rest of a page."""
    ranks.wait_for_a_save()
    ranks.wait_until(lambda: not list((ranks.run / CHECKPOINTS).glob("*.part")), "the end of the save")
    with suppress(OSError), (ranks.run.parent / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with suppress(OSError), (ranks.run.parent / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))


DEFECT = """
import os, sys
from vir.train import command
from vir.training import loop
def training_loss(*_):
    raise KeyError("of nobody")
if os.environ["SLURM_PROCID"] == "1":
    loop.training_loss = training_loss
sys.exit(command())
"""
LOST = (r"rank {lost} \(\S+\) .* \(process \d+\) is lost: {how}\. Rank {other} \(\S+\) .* ends with it, exit code "
        r"5; the same command continues from the last checkpoint")
GONE, SILENT = "its process is gone", r"silent for \d+ s"
STOPPED = "; the same command continues: "
NO_BATCH = "no batch for"
"""Said again after each further silence."""
# What is done, under which launcher, the exit codes, and which process must say what.
FAULTS = {
    "asked to stop in start-up": (stop_in_start_up, "torchrun", [1], (0, STOPPED)),
    "killed in start-up": (kill_in_start_up, "srun", [5, -9], (0, LOST.format(lost=1, how=GONE, other=0))),
    "killed in a step": (kill_in_a_step, "srun", [5, -9], (0, LOST.format(lost=1, how=GONE, other=0))),
    "rank 0 killed in a step": (kill_rank_0_in_a_step, "srun", [-9, 5],
                                (1, LOST.format(lost=0, how="its store cannot be reached.*", other=1))),
    "killed in an evaluation": (kill_in_evaluation, "srun", [5, -9], (0, LOST.format(lost=1, how=GONE, other=0))),
    "stopped": (stop_a_rank, "srun", [5, -9], (0, LOST.format(lost=1, how=SILENT, other=0))),
    "rank 0 stopped": (stop_rank_0, "srun", [-9, 5],
                       (1, LOST.format(lost=0, how=r"its store has not answered for \d+ s", other=1))),
    "worker killed": (kill_a_worker, "srun", [5, 3],
                      (1, r"vir-train: loader process 2 at digits-train-\S+ of \S+ was killed by SIGKILL; SIGKILL is "
                          r"mostly the system's answer to a lack of memory: lower --data.workers")),
    "worker crashed": (crash_a_worker, "srun", [3, 5],
                       (1, r"rank 0 .* ended with exit code 3, loader process 1 at .* was killed by SIGSEGV")),
    "a defect": (meet_a_defect, "srun", [5, 1],
                 (1, r"^vir-train: rank 1 \(\S+\) at step \d+, positions \d+ to \d+, compiling: KeyError: "
                     r"'of nobody'$")),
    "reads that hang": (let_reads_hang, "srun", [75, 75],
                        (1, NO_BATCH + r" \d+ s, waiting for loader process \d at digits-\w+-\d+.tar:\S+@\d+ of ")),
    "disk full": (fill_the_disk, "srun", [3, 3],
                  (0, r"vir-train: the checkpoint .* could not be written: .* \(0.0 MB are free there\); those before "
                      r"it are whole: free some space and run the same command again")),
    "warned of preemption in an evaluation": (warn_of_preemption_in_evaluation, "deepspeed", [75], (0, STOPPED)),
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
def imported(shim):
    with Imported(LD_PRELOAD=str(shim)) as imported:
        yield imported


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A folder that holds 100 MB, or as much as there is where nothing may be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], capture_output=True)
    yield folder / "mounted" if mounted.returncode == 0 else folder / "part of another"
    if mounted.returncode == 0:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def runs(shards, shim, imported, disk, tmp_path_factory) -> tuple[list[Path], dict[str, Met]]:
    """The undisturbed run and the one that met every fault, and what each fault came to.

    Ranks of srun are forked from a process that has imported everything; those of the launchers, and the last, are not.
    """
    tmp, run, met = tmp_path_factory.mktemp("faults"), disk / "faulty", {}
    disk.mkdir()
    with Ranks(arguments(shards, tmp / "undisturbed"), tmp / "undisturbed", tmp / "undisturbed",
               imported=imported) as ranks:
        assert ranks.codes() == [0, 0], ranks.said(0)[-3000:]
    for name, (fault, launcher, _, _) in FAULTS.items():
        if fault is fill_the_disk and disk.name != "mounted":
            continue
        began_at = saved_step(run)
        program = ("-c", DEFECT) if fault is meet_a_defect else ("-m", "vir.train")
        with Ranks(arguments(shards, run), run, tmp / name.replace(" ", "-"), launcher, program, imported,
                   LD_PRELOAD=str(shim), HANG=str(disk.parent / "hang")) as ranks:
            fault(ranks)
            seconds = ranks.seconds_until_gone()
            for left in (disk.parent / "hang", disk / "filler"):
                left.unlink(missing_ok=True)
            met[name] = Met(ranks.codes(), [log.read_text() for log in ranks.logs], seconds, saved_step(run), began_at)
    with Ranks(arguments(shards, run), run, tmp / "last") as ranks:
        assert ranks.codes() == [0, 0], ranks.said(0)[-3000:]
    return [tmp / "undisturbed", run], met


@pytest.mark.parametrize("name", FAULTS)
def test_all_is_gone_soon_with_a_documented_code_and_a_line_that_names_the_cause(name, runs):
    _, launcher, codes, (process, line) = FAULTS[name]
    if name not in runs[1]:
        pytest.skip("no file system can be mounted here, so none can be filled")
    met = runs[1][name]
    assert met.codes == codes, met.said
    assert met.seconds < GONE_WITHIN
    told = [said for said in met.said[process].splitlines() if re.search(line, said)]
    assert len(told) == 1 or told and line.startswith(NO_BATCH), met.said[process]
    if name != "a defect" and launcher == "srun":
        assert "Traceback" not in met.said[process], met.said[process]


def test_a_disk_that_is_full_is_told_once_and_ends_the_run_at_the_next_checkpoint_alone(runs):
    if "disk full" not in runs[1]:
        pytest.skip("no file system can be mounted here, so none can be filled")
    said = runs[1]["disk full"].said[0]
    assert len(re.findall(r"cannot write \S+/metrics.jsonl: No space left on device", said)) == 1, said
    warned = said.index("cannot write")
    assert f"step {(runs[1]['disk full'].saved // EVERY + 1) * EVERY}/{STEPS} " in said[warned:], said


def test_each_start_went_on_from_the_newest_checkpoint(runs):
    went_on = [met.saved for met in runs[1].values()]
    assert went_on == sorted(went_on) and went_on[-1] > EVALUATE
    assert [met.began_at for met in runs[1].values()] == [0, *went_on[:-1]]


def test_a_stop_while_reads_hang_saves_the_last_finished_step(runs):
    met = runs[1]["reads that hang"]
    assert met.saved > met.began_at
    assert met.said[0].count(STOPPED) == 1


def test_after_all_faults_the_run_is_the_undisturbed_one_bit_for_bit(runs, tmp_path):
    kept = ("step", "samples_seen", "loss", "lr", "grad_norm", "updates")
    expected, found = ([{key: event[key] for key in kept} for event in train_events(run)]
                       for run in runs[0])
    assert [event["step"] for event in expected] == list(range(1, STEPS + 1)) and found == expected
    expected, found = ([(event["step"], event["top1"], event["ema_loss"]) for event in read_metrics(run)
                        if event["kind"] == "eval"] for run in runs[0])
    assert found == expected
    for ema in (False, True):
        expected, found = (weights(run, STEPS, tmp_path, ema=ema) for run in runs[0])
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---- a build of an op that is killed


BUILD = """
import sys
from torch.utils.cpp_extension import load
load("op", [sys.argv[1]], is_python_module=False)
print("built")
"""


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.15", reason="it waits for ever, see below")
def test_a_killed_build_does_not_hold_up_the_next_start(tmp_path):
    (tmp_path / "op.cpp").write_text("int op() { return 1; }")
    slow = tmp_path / "slow-compiler"
    slow.write_text(f"#!/bin/sh\ncase \"$*\" in *op.cpp*) touch {tmp_path}/compiling; sleep 1000;; esac\n"
                    "exec c++ \"$@\"\n")
    slow.chmod(0o755)
    command = [sys.executable, "-c", BUILD, tmp_path / "op.cpp"]
    with subprocess.Popen(command, start_new_session=True, env={
            **os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops"), "CXX": str(slow)}) as build:
        until = time.monotonic() + HANGS
        while not (tmp_path / "compiling").exists() and time.monotonic() < until:
            time.sleep(0.05)
        for process in members(build.pid):  # ninja gives each compiler a process group of its own
            os.kill(process, signal.SIGKILL)
    assert list((tmp_path / "ops").glob("**/lock"))
    done = call(*command, TORCH_EXTENSIONS_DIR=str(tmp_path / "ops"))
    assert done.returncode == 0 and "built" in done.stdout, done.stdout


def test_a_version_of_torch_that_waits_for_the_lock_of_a_killed_build_is_helped(tmp_path, monkeypatch, caplog):
    from vir.engine.engine import warn_of_killed_builds

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    warn_of_killed_builds("2.9.0")
    (tmp_path / "cpu_adam" / "lock").touch()
    warn_of_killed_builds("2.15.0+cu132")
    assert not [record for record in caplog.records if record.name == "vir"]
    warn_of_killed_builds("2.9.1+cu128")
    (said,) = (record.getMessage() for record in caplog.records if record.name == "vir")
    assert str(tmp_path / "cpu_adam" / "lock") in said and "then remove the file" in said
