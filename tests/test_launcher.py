"""The place of a process among those of a run, from what torchrun, deepspeed, accelerate or srun says."""

import math
import os
import sys
from pathlib import Path

import pytest

from support.launchers import ACCELERATE, call, free_port
from vir import launcher
from vir.data.loader import processes_for
from vir.errors import SettingsError
from vir.launcher import Place, adopt, first_host, local_rank, processes_asked_for

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_ID": "41234",
        "SLURM_STEP_ID": "3"}
PORT = 21848  # 10000 + the CRC-32 of 41234.3 modulo 20000
SAID = (*TORCH, "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "VIR_RUN_ID")


@pytest.fixture
def environment(monkeypatch):
    """A function that leaves these variables of all that are looked at."""
    def leave(**variables):
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in SAID:
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name in SAID:  # what adopt() says itself is taken back, too
            monkeypatch.setitem(os.environ, name, os.environ.get(name, ""))
            if name not in variables:
                monkeypatch.delitem(os.environ, name)

    return leave


@pytest.mark.parametrize("said, place", [
    ({}, Place(0, 1, 0, "127.0.0.1", 0)),
    (TORCH, Place(5, 8, 1, "node1", 29500)),
    (TORCH | STEP | {"SLURM_PROCID": "0"}, Place(5, 8, 1, "node1", 29500)),  # torchrun or deepspeed under srun
    ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 0, "127.0.0.1", 0)),
    (STEP, Place(5, 8, 1, "gpu07", PORT, "slurm-41234.3")),
    (STEP | {"SLURM_STEP_NUM_NODES": "1"}, Place(5, 8, 1, "127.0.0.1", PORT, "slurm-41234.3")),
    (STEP | {"SLURM_RESTART_COUNT": "2"}, Place(5, 8, 1, "gpu07", PORT, "slurm-41234.3.2")),  # it was put back twice
    (STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}, Place(5, 8, 1, "10.0.0.1", 1234, "slurm-41234.3")),
    (TORCH | {"TORCHELASTIC_RUN_ID": "job"}, Place(5, 8, 1, "node1", 29500, "job")),
    (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place(0, 1, 1, "127.0.0.1", 0)),
    # A script of sbatch, or a shell of salloc: told how many tasks the job may have, but none of them.
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Place(0, 1, 0, "127.0.0.1", 0)),
])
def test_the_place_is_what_the_launcher_says(environment, said, place):
    environment(**said)
    assert adopt() == place
    assert adopt() == place


def test_what_slurm_says_is_said_as_torch_does_for_deepspeed(environment):
    environment(**STEP)
    adopt()
    assert {name: os.environ[name] for name in (*TORCH, "LOCAL_WORLD_SIZE")} == {
        **TORCH, "MASTER_ADDR": "gpu07", "MASTER_PORT": str(PORT), "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize("said, error", [
    ({"RANK": "1"}, "says RANK=1 but not WORLD_SIZE; start by deepspeed, torchrun, accelerate or srun"),
    ({"WORLD_SIZE": "2"}, "says WORLD_SIZE=2 but not RANK;"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "says RANK=1, WORLD_SIZE=2 but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT;"),
    (TORCH | {"MASTER_PORT": ""}, "but not MASTER_PORT;"),
    (TORCH | {"RANK": "one"}, "RANK is 'one'; it must be a number"),
    (TORCH | {"RANK": "8"}, "RANK is 8 and WORLD_SIZE 8; a rank is from 0 to 7"),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "1"},
     "SLURM_STEP_NUM_TASKS is 8 but SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_STEP_ID is not set"),
    (STEP | {"SLURM_STEP_NODELIST": ",["}, "which names no host; set MASTER_ADDR"),
])
def test_what_is_said_half_is_refused_with_the_way_out(environment, said, error):
    environment(**said)
    with pytest.raises(SettingsError) as raised:
        adopt()
    assert error in str(raised.value)


def test_jobs_and_steps_that_follow_each_other_have_ports_of_their_own(environment):
    ports = set()
    for job, step in ((1000 + number, step) for number in range(8) for step in range(4)):
        environment(**STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        ports.add(adopt().port)
    assert len(ports) == 32 and all(10000 <= port < 30000 for port in ports)


@pytest.mark.parametrize("nodes, first", [
    ("node1", "node1"), ("node1,node2", "node1"), ("node[03-07,9],login", "node03"), ("a[1,3],b", "a1"),
    ("rack[2-3]-gpu", "rack2-gpu"), ("c-2-[001-100]", "c-2-001")])
def test_the_first_host_of_a_compressed_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("said, cores", [
    ({}, 16), ({"LOCAL_WORLD_SIZE": "4"}, 4), ({"LOCAL_SIZE": "3"}, 5), ({"LOCAL_WORLD_SIZE": "64"}, 1),
    ({"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "16", "VIR_RUN_ID": "slurm-7.0"}, 16),  # srun has bound each task
    ({"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "64", "VIR_RUN_ID": "slurm-7.0"}, 16),
    ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "64"}, 4),  # the task is a torchrun, which has four ranks
    ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "8"}, 2),
    ({"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": ""}, 8),
])
def test_the_cores_of_a_rank(environment, monkeypatch, said, cores):
    monkeypatch.setattr(launcher, "cpu_limit", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_CPUS_PER_TASK", "VIR_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert launcher.cores() == cores
    assert processes_for(None) == min(16, max(1, cores - 1)) and processes_for(3) == 3


@pytest.mark.parametrize("said, ranks", [({}, 1), ({"LOCAL_WORLD_SIZE": "8"}, 8), (
    {"LOCAL_WORLD_SIZE": "8", "VIR_RUN_ID": "slurm-7.0"}, 1)])
def test_the_ranks_that_share_what_a_container_or_srun_gives(environment, said, ranks):
    environment(**said)
    assert launcher.sharing() == ranks


@pytest.mark.parametrize("limit, cores", [(math.inf, 16), (6.5, 6), (0.5, 1), (64.0, 16)])
def test_ranks_share_what_the_container_may_use(environment, monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(launcher, "cpu_limit", lambda: limit)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_CPUS_PER_TASK", "VIR_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert launcher.cores() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launcher.cores() == max(1, cores // 2)


@pytest.mark.parametrize("said, number", [({}, 0), ({"LOCAL_RANK": "3"}, 3), ({"SLURM_LOCALID": "2"}, 2),
                                          ({"LOCAL_RANK": "x"}, 0)])
def test_the_number_on_the_machine(environment, said, number):
    environment(**said)
    assert launcher.local_rank() == local_rank() == number


@pytest.mark.parametrize("words, number", [
    ("python /bin/accelerate launch --num_processes 2 -m vir.evaluate", 2),
    ("python -m accelerate.commands.launch --num-processes=3 -m vir.evaluate", 3),
    ("accelerate launch --num_processes 2 --num_processes 4 -m x", 4), ("accelerate launch -m x", 0),
    ("accelerate launch --num_processes 1 -m x", 1), ("accelerate launch -m x --json a--num_processes 2", 0)])
def test_the_processes_that_accelerate_was_asked_for(words, number):
    assert processes_asked_for(words.split()) == number


@pytest.mark.launcher
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="command lines are seen on Linux only")
def test_accelerate_that_starts_one_process_instead_of_two_is_told_with_the_command_that_starts_them(
        environment, tmp_path):
    """By accelerate itself, without GPUs; with --multi_gpu it starts both, and nothing is said."""
    environment()  # without what a run within this process has left
    script = tmp_path / "script.py"
    script.write_text("from vir.launcher import tell_of_missing_processes\n"
                      "tell_of_missing_processes('vir.evaluate')\nprint('ran')\n")

    def said(*options):
        done = call(*ACCELERATE, *options, "--mixed_precision", "no", "--main_process_port", free_port(), script,
                    CUDA_VISIBLE_DEVICES="", timeout=600)
        assert done.returncode == 0, done.stdout
        return done.stdout.count("ran\n"), [line for line in done.stdout.splitlines() if "vir.evaluate" in line]

    count, (line,) = said("--num_processes", "2")
    assert count == 1 and line.startswith("vir.evaluate: accelerate was asked for 2 processes and has started one")
    assert line.endswith("by: torchrun --nproc_per_node 2 -m vir.evaluate …")
    assert said("--multi_gpu", "--num_processes", "2") == (2, [])


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="command lines are seen on Linux only")
@pytest.mark.parametrize("number, environment, is_told", [
    ("2", {"ACCELERATE_MIXED_PRECISION": "no"}, True), ("1", {"ACCELERATE_MIXED_PRECISION": "no"}, False),
    ("2", {}, False), ("2", {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"}, False)])
def test_only_a_process_of_accelerate_alone_that_was_to_have_others_is_told(number, environment, is_told):
    """Its parent's command line is a real one."""
    child = f"{sys.executable} -c 'from vir.launcher import tell_of_missing_processes as tell; tell(\"m\")'; true"
    done = call("sh", "-c", child, "--num_processes", number, **environment)
    assert done.returncode == 0 and ("m: accelerate was asked for 2" in done.stdout) == is_told, done.stdout


@pytest.mark.parametrize("device, variable, wanted", [
    ("auto", None, False), ("auto", "cuda", False), ("auto", "cpu", True), ("cpu", None, True), ("cpu", "cuda", True)])
def test_the_cpu_is_asked_for_by_the_flag_or_by_deepspeeds_variable(device, variable, wanted, monkeypatch):
    if variable is None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    else:
        monkeypatch.setenv("DS_ACCELERATOR", variable)
    assert launcher.wants_cpu(device) is wanted


def test_deepspeeds_variable_hides_from_its_ranks_the_gpus_that_its_launcher_shows_them():
    done = call(sys.executable, "-c", "import os\nfrom vir import distributed\ndistributed.start()\n"
                "print(os.environ['CUDA_VISIBLE_DEVICES'])\ndistributed.stop()",
                CUDA_VISIBLE_DEVICES="0,1", DS_ACCELERATOR="cpu")
    assert done.stdout.splitlines()[-1] == "-1", done.stdout


def test_hidden_gpus_are_hidden_from_torch_and_deepspeed():
    """In a process of its own: both remember what they have seen."""
    done = call(sys.executable, "-c", "import torch\nfrom vir import launcher\nlauncher.hide_gpus()\n"
                "from deepspeed.accelerator import get_accelerator\nprint(launcher.gpus_are_hidden(), "
                "torch.cuda.is_available(), torch.accelerator.is_available(), get_accelerator().device_name())")
    assert done.stdout.splitlines()[-1] == "True False False cpu", done.stdout


@pytest.mark.parametrize("tasks, node, said", [
    ("4(x2)", "0", "4"), ("4(x2)", "1", "4"), ("8(x2),7", "1", "8"), ("8(x2),7", "2", "7"), ("8,7", "0", "8"),
    ("8,7", "1", "7"), ("3", "0", "3"), ("3", "4", ""), ("", "0", ""), ("3", "x", "")])
def test_how_many_tasks_slurm_has_put_on_a_node(tasks, node, said):
    assert launcher.tasks_of_node(tasks, node) == said
