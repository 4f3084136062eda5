"""The first lines of a run, against what the system says itself."""

import os
import subprocess
import sys

import torch

from vir.distributed import World
from vir.reports.environment import describe_environment


def test_the_lines_say_command_versions_and_machines(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "vir.train", "--output", "a run"])
    command, versions, ranks = describe_environment(World(rank=0, size=1, device=torch.device("cpu")))
    assert command == "command: python -m vir.train --output 'a run'"
    asked = subprocess.run([sys.executable, "-m", "pip", "show", "deepspeed", "timm", "vir-at-scale"],
                           capture_output=True, text=True, timeout=120).stdout
    deepspeed, timm, ours = (line.split()[1] for line in asked.splitlines() if line.startswith("Version: "))
    assert versions.startswith(f"vir-at-scale {ours}, Python {sys.version.split()[0]}, torch {torch.__version__} (")
    assert f"deepspeed {deepspeed}, timm {timm}, webdataset " in versions
    assert ranks == f"ranks: 1 on {os.uname().nodename} (CPU, {torch.get_num_threads()} threads)"
