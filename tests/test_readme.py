"""README's commands: every file, module and flag in them exists."""

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
from support.launchers import ROOT, call

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
RUNS = [command for command in COMMANDS if "vir." in command or "tools/" in command or command.startswith("bash ")]


@pytest.fixture(scope="module")
def flags_of():
    """The flags that --help of a module or tool lists."""
    known: dict[str, set[str]] = {}

    def find(program: str) -> set[str]:
        if program not in known:
            start = [program] if program.endswith(".py") else ["-m", program]
            done = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True,
                                  timeout=120)
            assert done.returncode == 0, done.stderr
            known[program] = set(re.findall(r"--[a-zA-Z_.\-]+", done.stdout))
        return known[program]

    return find


def test_readme_shows_the_set_up_and_the_verbs():
    assert "bash launch/quickstart.sh" in COMMANDS and "bash tests/run.sh" in COMMANDS
    for verb in ("tools/convert_imagenet.py", "--module vir.train", "tools/consolidate_checkpoint.py",
                 "-m vir.evaluate"):
        assert any(verb in command for command in RUNS), verb


@pytest.mark.parametrize("command", RUNS)
def test_what_a_command_names_exists(command, flags_of):
    words = shlex.split(command)
    for word in words:
        if word.startswith(("tools/", "launch/", "tests/", "ds_configs/", "vir/")):
            assert (ROOT / word).is_file(), word
    program = next((word for word in words if re.fullmatch(r"vir\.\w+|tools/\w+\.py", word)), None)
    if program is None:
        return
    if not program.endswith(".py"):
        assert importlib.util.find_spec(program), program
    unknown = {word.split("=")[0] for word in words[words.index(program):] if word.startswith("--")} - flags_of(program)
    assert not unknown, f"{program} has no {unknown}"


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, timeout=20).returncode == 0


def test_the_quick_start_goes_the_whole_road(tmp_path):
    run = tmp_path / "a run"
    done = call("bash", ROOT / "launch" / "quickstart.sh", "--output", run, "--train.epochs", "1", timeout=400)
    assert done.returncode == 0, done.stdout[-4000:]
    said = re.search(r"held-out top-1: ([\d.]+) % raw weights, ([\d.]+) % EMA, on 1000 images", done.stdout)
    assert said and float(said[1]) > 10, done.stdout[-2000:]  # one epoch is better than chance
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.yaml", "curves.png", "ds_config.json", "log.txt", "metrics.jsonl", "tensorboard",
        "vir.safetensors", "vir_ema.safetensors", "vir.json", "vir_ema.json"}
