"""Jobs of a real Slurm with two nodes: handed in by sbatch launch/slurm.sbatch, preempted, signalled, of an array."""

import argparse
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from support.launchers import HANGS, ROOT
from support.slurm import Slurm, needs_slurm
from support.tiny_runs import command, launch, train_events, weights
from vir.checkpoints.names import newest
from vir.cluster import slurm as slurm_of_job
from vir.cluster.signals import LAUNCHER_GONE, STOP_FILE
from vir.cluster.slurm import SlurmLaunch, name_of_job, was_stopped_by_slurm, words_of_task
from vir.errors import SettingsError
from vir.status import Status

STEPS = 60
SBATCH = ROOT / "launch" / "slurm.sbatch"
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
"""One thread to each rank, by whichever launcher, as in the run of two processes."""


@pytest.fixture(scope="module")
def slurm():
    with Slurm() as running:
        yield running


def arguments(shards, run, steps=STEPS):
    return command(shards, run, "zero2_fp32", steps=steps, every=1000)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The run by torchrun on one machine, its losses and its weights."""
    tmp = tmp_path_factory.mktemp("undisturbed")
    codes, said = launch(tmp, [arguments(shards, tmp / "run")])
    assert codes == [0], said
    return losses(tmp / "run"), weights(tmp / "run", STEPS, tmp)


def losses(run):
    return {event["step"]: event["loss"] for event in train_events(run)}


def wait_for_steps(slurm, job, run, more_than):
    slurm.wait_state(job, "RUNNING")

    def is_there():
        assert slurm.job(job)["JobState"] == "RUNNING", slurm.output(job)[-6000:]
        return (run / "metrics.jsonl").exists() and len(losses(run)) > more_than

    slurm.wait(is_there, f"more than {more_than} steps of job {job}", HANGS)


def assert_is(run, undisturbed, tmp_path):
    """The same losses and weights, to the bit: two nodes add the same two numbers as two processes do."""
    found, expected = weights(run, STEPS, tmp_path), undisturbed[1]
    assert losses(run) == undisturbed[0]
    assert all((found[name] == expected[name]).all() for name in expected) and found.keys() == expected.keys()


@needs_slurm
@pytest.mark.launcher
@pytest.mark.timeout(4 * HANGS)
def test_a_job_by_torchrun_is_the_run_of_two_processes(slurm, shards, undisturbed, tmp_path):
    run = tmp_path / "a run"
    job = slurm.submit(*TWO_NODES, SBATCH, "--torchrun", *arguments(shards, run), cwd=tmp_path)
    assert slurm.wait_state(job, "COMPLETED")["ExitCode"] == "0:0"
    assert all(f"1 on {name} (CPU, 1 threads)" in slurm.output(job) for name in slurm.names)
    assert_is(run, undisturbed, tmp_path)


@needs_slurm
@pytest.mark.launcher
@pytest.mark.timeout(4 * HANGS)
def test_a_job_that_is_preempted_goes_on(slurm, shards, undisturbed, tmp_path):
    run = tmp_path / "a run"
    job = slurm.submit(*TWO_NODES, SBATCH, *arguments(shards, run), cwd=tmp_path)
    wait_for_steps(slurm, job, run, 2)
    urgent = slurm.submit("--partition=high", "--exclusive", "--nodes=2", "--wrap", "true", cwd=tmp_path)
    slurm.wait_state(urgent, "COMPLETED")
    slurm.wait_state(job, "PENDING", restarts=1)
    assert max(losses(run)) < STEPS
    slurm.start_soon(job)
    assert slurm.wait_state(job, "COMPLETED", restarts=1)["ExitCode"] == "0:0"
    said = slurm.output(job)
    for what in ("stopped by SIGTERM after saving", f"job {job} goes back into the queue",
                 f"job {job} was put back into the queue 1 times", *(f"1 on {name} (CPU" for name in slurm.names)):
        assert what in said, said[-6000:]
    assert_is(run, undisturbed, tmp_path)


@needs_slurm
@pytest.mark.launcher
@pytest.mark.timeout(4 * HANGS)
def test_each_task_of_an_array_is_a_run_and_a_job_of_its_own_wherever_the_project_is(slurm, shards, tmp_path):
    project = tmp_path / "a project"
    project.mkdir()
    for name in ("launch", "vir", "ds_configs"):
        (project / name).symlink_to(ROOT / name)
    array = slurm.submit("--array=0-1", "--output=%a.txt", project / "launch" / "slurm.sbatch",
                         *arguments(shards, "seeds of/%a", steps=1000), "--train.seed", "%a", cwd=tmp_path)
    tasks, runs = [f"{array}_{seed}" for seed in range(2)], [tmp_path / "seeds of" / f"{seed}" for seed in range(2)]
    for task, run in zip(tasks, runs):
        wait_for_steps(slurm, task, run, 2)
    assert "seed: 1\n" in (runs[1] / "config.yaml").read_text()
    assert losses(runs[0])[1] != losses(runs[1])[1]

    assert slurm.job(tasks[1])["JobId"] == array  # the number of this task is that of all
    slurm.run("scancel", "--signal=USR1", "--batch", tasks[1])  # as before a time limit
    slurm.wait_state(tasks[1], "PENDING", restarts=1)
    slurm.run("scontrol", "hold", tasks[1])
    said = slurm.output(tasks[1])
    assert "stopped by SIGUSR1 after saving" in said and f"job {tasks[1]} goes back into the queue" in said
    other = slurm.job(tasks[0])
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")

    slurm.run("scancel", tasks[0])
    ended = slurm.wait_state(tasks[0], "CANCELLED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "0")
    slurm.wait(lambda: f"job {tasks[0]} is COMPLETING: it is left to Slurm" in slurm.output(tasks[0]), "the last word")
    slurm.run("scancel", array)
    assert [newest(run).name for run in runs] == [f"step-{max(losses(run)):08d}" for run in runs]


ENDS = """
from argparse import Namespace
from vir.cluster import slurm
from vir.status import Status
slurm._ANSWERS_WITHIN_S = 2
slurm.SlurmLaunch(Namespace(print=False, torchrun=False, max_restarts=0), []).ended(Status(75, "stopped", cause=15))
"""


@needs_slurm
@pytest.mark.launcher
def test_a_controller_that_does_not_answer_does_not_lose_the_requeue(slurm, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    script = f"until [ -e silent ]; do sleep 0.1; done; PYTHONPATH='{ROOT}' python ends.py; echo ended by $?; sleep 60"
    job = slurm.submit("--requeue", "--open-mode=append", "--wrap", script, cwd=tmp_path)
    slurm.wait_state(job, "RUNNING")
    said = Path(slurm.job(job)["StdOut"])
    with slurm.silent_controller():
        (tmp_path / "silent").touch()
        slurm.wait(lambda: said.exists() and "trying again" in said.read_text(), "second try")
        (tmp_path / "silent").unlink()
    slurm.wait_state(job, "PENDING", restarts=1)
    slurm.run("scancel", job)
    assert f"job {job} is not back in the queue yet (no answer within 2 s); trying again" in said.read_text()
    assert "ended by 1" not in said.read_text()


@needs_slurm
@pytest.mark.launcher
@pytest.mark.parametrize("words, says", [
    (["--optim.lrr", "1"], "--optim.lrr"),
    (["--torchrun", "--max-restarts", "many"], "'many' is no number from 0 on"),
])
def test_a_wrong_flag_ends_the_job_for_good(slurm, words, says, tmp_path):
    job = slurm.submit(SBATCH, *words, cwd=tmp_path)
    found = slurm.wait_state(job, "FAILED", seconds=60)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0") and says in slurm.output(job)


@needs_slurm
@pytest.mark.launcher
def test_an_array_in_one_folder_is_refused(slurm, tmp_path):
    job = slurm.submit("--array=3", SBATCH, "--output", "runs/a", cwd=tmp_path)
    found = slurm.wait_state(f"{job}_3", "FAILED", seconds=60)
    assert found["ExitCode"] == "2:0"
    assert "task 3 of this array would train in the folder of all others" in slurm.output(f"{job}_3")


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_JOB_NUM_NODES": "2",
       "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_PER_TASK": "12"}


def of_job(monkeypatch, torchrun=False, **job):
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(print=False, torchrun=torchrun, max_restarts=0)
    return SlurmLaunch(args, ["--output", "r"])


def test_srun_gets_the_cores_that_it_does_not_inherit(monkeypatch):
    with of_job(monkeypatch, **JOB).start("x", Path("status.json")) as start:
        words = " ".join(start.command)
    assert words.startswith("srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task=12 /")
    assert words.endswith("-u -m vir.train --output r")


def test_one_torchrun_on_each_node_starts_its_ranks(monkeypatch):
    with of_job(monkeypatch, torchrun=True, **JOB).start("x", Path("status.json")) as start:
        words = " ".join(start.command)
    assert " --cpus-per-task=96 --nodes=2 --ntasks=2 --ntasks-per-node=1 " in words
    assert " --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=gpu03:" in words
    assert start.environment == {"VIR_RUN_ID": "x"}


def test_torchrun_needs_as_many_ranks_on_each_node(monkeypatch):
    with pytest.raises(SettingsError, match=r"the job has 8,7 tasks on its nodes; --torchrun needs as many on each"):
        job = JOB | {"SLURM_TASKS_PER_NODE": "8,7"}
        with of_job(monkeypatch, torchrun=True, **job).start("x", Path("status.json")):
            pass


def test_outside_of_a_job_the_command_is_only_printed(tmp_path):
    def call(*words):
        return subprocess.run(["bash", SBATCH, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    printed = call("--print", "--data.train", "no such", "--output", "a run")
    assert printed.returncode == 0, printed.stderr
    assert shlex.split(printed.stdout)[-5:] == ["vir.train", "--data.train", "no such", "--output", "a run"]
    refused = call("--data.train", "no such")
    assert refused.returncode == 2 and "this is no job of Slurm (SLURM_JOB_ID is not set)" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_slurms_commands_the_run_ends_as_it_did(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(slurm_of_job, "_ASKS_FOR_S", -1)
    launch = of_job(monkeypatch, **JOB, PATH=str(tmp_path))
    launch.ended(Status(75, "stopped", cause=signal.SIGTERM))
    assert capsys.readouterr().err == ("vir-launch: job 7 cannot go back into the queue (scontrol: No such file or "
                                       "directory); hand the same command in again\n")


def test_the_name_of_an_arrays_task_is_not_that_of_all():
    assert name_of_job({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}) == "9_3"
    assert name_of_job({"SLURM_JOB_ID": "9"}) == "9"


def test_words_of_an_arrays_task():
    assert words_of_task(["--output", "s-%a/%a"], {"SLURM_ARRAY_TASK_ID": "12"}) == ["--output", "s-12/12"]
    assert words_of_task(["100%a"], {}) == ["100%a"]
    with pytest.raises(SettingsError, match="task 12 of this array .* --output runs/seed-%a"):
        words_of_task(["--output", "s"], {"SLURM_ARRAY_TASK_ID": "12"})


@pytest.mark.parametrize("found, is_so", [
    (Status(75, "", cause=signal.SIGTERM), True),
    (Status(75, "", cause=signal.SIGUSR1), True),
    (Status(75, "stopped by SIGTERM", cause=signal.SIGINT), False),
    (Status(75, "", cause=STOP_FILE), False),
    (Status(75, "", cause=LAUNCHER_GONE), False),
    (Status(3, "a shard is missing"), False),
    (Status(0, "done"), False),
])
def test_what_goes_back_into_the_queue(found, is_so):
    assert was_stopped_by_slurm(found) is is_so
