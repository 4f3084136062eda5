"""The commands of the page about launchers, run: each section's, with 2 processes on tiny data."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from test_docs import commands_of

from support.launchers import HANGS, ROOT, TINY, call, free_port
from support.tiny_runs import train_events

PAGE = ROOT / "docs" / "launching.md"
EXAMPLE = """# Launching

## torchrun
On one machine:
```bash
bash launch/torchrun.sh --nproc_per_node 8 --config vir/recipes/vir_small_in1k.yaml \\
  --deepspeed_config zero2_bf16 --data.train SHARDS/train --data.val SHARDS/val --output runs/a   # 8 GPUs
```
## accelerate
```bash
accelerate launch --config_file launch/accelerate.yaml --num_processes 8 -m vir.train --data.train SHARDS/train
```
"""
RANKS = ("--nproc_per_node", "--num_processes", "--num_gpus", "--num_accelerators")
"""Flags whose value becomes 2."""
RUNS_HERE = {"bash launch/torchrun.sh", "bash launch/deepspeed.sh", "torchrun", "deepspeed", "accelerate launch"}
"""Beginnings of commands that one machine can run by itself: without a hostfile or a second machine."""
NEEDS_OTHERS = ("--hostfile", "--nnodes", "--rdzv_endpoint", "--machine_rank", "--num_machines")
TINY_RUN = [*TINY, "--train.steps", "2", "--train.global_batch_size", "8", "--train.micro_batch_size", "4",
            "--train.log_every", "1", "--schedule.warmup_epochs", "0", "--device", "cpu"]
"""Given after what the page says, so that it wins."""


def sections(text: str) -> dict[str, list[str]]:
    """The commands of the bash blocks under each heading of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return {title: commands_of(body) for title, body in zip(parts[::2], parts[1::2])}


def runnable(command: str) -> bool:
    return any(command.startswith(f"{begin} ") for begin in RUNS_HERE) and "vir.evaluate" not in command and not any(
        word.partition("=")[0] in NEEDS_OTHERS for word in shlex.split(command))


def substituted(command: str, shards: Path, run: Path) -> list[str]:
    """SHARDS, the number of processes and --output as they are here, bf16 as fp32; then TINY_RUN. Nothing else."""
    words = shlex.split(command)
    for at, word in enumerate(words[:-1]):
        if word in RANKS:
            words[at + 1] = "2"
        if word == "--output":
            words[at + 1] = str(run)
        if word == "--deepspeed_config":
            words[at + 1] = words[at + 1].replace("bf16", "fp32")
    words = [word.replace("SHARDS", str(shards)) for word in words]
    programs = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner",
                "accelerate": "accelerate.commands.launch"}
    if module := programs.get(words[0]):  # their scripts need not be beside this Python
        ports = {"deepspeed": "--master_port", "torchrun": "--master_port", "accelerate": "--main_process_port"}
        words = [sys.executable, "-m", module, ports[words[0]], free_port(),
                 *words[2 if words[0] == "accelerate" else 1:]]
    return [*words, *([] if "--output" in words else ["--output", str(run)]), *TINY_RUN]


def test_commands_are_found_by_section_and_only_the_table_is_substituted(tmp_path):
    found = sections(EXAMPLE)
    assert list(found) == ["torchrun", "accelerate"] and all(len(commands) == 1 for commands in found.values())
    words = substituted(found["torchrun"][0], Path("/s"), tmp_path)
    assert words[:len(words) - len(TINY_RUN)] == [
        "bash", "launch/torchrun.sh", "--nproc_per_node", "2", "--config", "vir/recipes/vir_small_in1k.yaml",
        "--deepspeed_config", "zero2_fp32", "--data.train", "/s/train", "--data.val", "/s/val", "--output",
        str(tmp_path)]


@pytest.mark.parametrize("command, runs", [
    ("bash launch/torchrun.sh --nproc_per_node 8", True), ("bash launch/torchrun.sh --nnodes 2:4", False),
    ("bash launch/deepspeed.sh --hostfile=hosts --output a", False), ("sbatch launch/slurm.sbatch", False)])
def test_what_needs_other_machines_is_not_run_here(command, runs):
    assert runnable(command) is runs


COMMANDS = [pytest.param(command, id=f"{title}: {command}") for title, commands in sections(
    PAGE.read_text() if PAGE.is_file() else EXAMPLE).items() for command in commands if runnable(command)]


@pytest.mark.launcher
@pytest.mark.timeout(2 * HANGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_trains_with_two_processes(command, shards, tmp_path):
    run = tmp_path / "a run"
    done = call(*substituted(command, shards, run), timeout=HANGS, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-6000:]
    assert [event["step"] for event in train_events(run)] == [1, 2]
    assert re.search(r"2 steps of 8 = 1 x 4 x 2 ranks", done.stdout), done.stdout[-3000:]
