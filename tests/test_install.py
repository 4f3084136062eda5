"""A wheel of what git tracks, unpacked far from the sources: its files are there and its programs answer."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions

import pytest

from support.launchers import ROOT

PROGRAMS = ["vir-check", "vir-consolidate", "vir-convert", "vir-evaluate", "vir-explain", "vir-export", "vir-index",
            "vir-launch", "vir-plan", "vir-predict", "vir-train", "vir-verify"]
ASK = """
import contextlib, io, json, sys
from importlib.metadata import distributions

import vir
from vir.engine import ds_config

found = {"package": vir.__file__, "zero2_bf16": ds_config.read("zero2_bf16"),
         "shipped": sorted(path.name for path in ds_config.SHIPPED.iterdir()), "programs": {}}
(distribution,) = distributions(path=[sys.argv[1]])
for point in distribution.entry_points:
    program, said = point.load(), io.StringIO()
    sys.argv = [point.name, "--help"]
    try:
        with contextlib.redirect_stdout(said):
            code = program()
    except SystemExit as end:
        code = end.code or 0
    found["programs"][point.name] = [code, said.getvalue()]
print(json.dumps(found))
"""


def run(*command, cwd, **environment):
    done = subprocess.run([str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The unpacked wheel."""
    tmp = tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]:
        if not os.path.lexists(ROOT / name):  # removed, and not committed yet
            continue
        (tmp / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp / "source" / name, follow_symlinks=False)
    assert (tmp / "source" / "vir" / "ds_configs").is_symlink()
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp / "out", ".",
        cwd=tmp / "source")
    (wheel,) = (tmp / "out").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp / "site")
    shutil.rmtree(tmp / "source")  # nothing can lean on it
    return tmp / "site"


@pytest.fixture(scope="module")
def answers(site, tmp_path_factory):
    """What the installed package says from a folder that has nothing to do with its sources."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return json.loads(run(sys.executable, "-c", ASK, site, cwd=elsewhere, PYTHONPATH=str(site)).splitlines()[-1])


def test_it_is_the_installed_package_that_answers(site, answers):
    assert answers["package"] == str(site / "vir" / "__init__.py")


def test_the_wheel_holds_the_package_and_nothing_beside_it(site):
    assert sorted(path.name for path in site.iterdir() if not path.name.endswith(".dist-info")) == ["vir"]
    modules = {path.relative_to(site) for path in (site / "vir").rglob("*.py")}
    assert modules == {path.relative_to(ROOT) for path in (ROOT / "vir").rglob("*.py")}


def test_the_files_that_are_no_modules_are_there(site):
    shipped = {"vir/py.typed", "vir/__init__.pyi", "vir/reports/run_page.html",
               *(f"vir/{path.relative_to(ROOT)}" for path in (ROOT / "ds_configs").glob("*.json")),
               *(str(path.relative_to(ROOT)) for path in (ROOT / "vir" / "recipes").glob("*.yaml"))}
    found = {str(path.relative_to(site)) for path in (site / "vir").rglob("*")
             if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert found == shipped and len(shipped) > 10
    assert not any(path.is_symlink() for path in site.rglob("*"))
    for name in shipped:
        assert (site / name).read_bytes() == (ROOT / name).read_bytes()


def test_deepspeeds_json_is_found_by_its_name(answers):
    assert answers["zero2_bf16"]["zero_optimization"]["stage"] == 2
    assert answers["shipped"] == sorted(path.name for path in (ROOT / "ds_configs").iterdir())


def test_its_programs_are_the_documented_ones(site):
    (distribution,) = distributions(path=[str(site)])
    assert sorted(point.name for point in distribution.entry_points) == PROGRAMS
    assert re.fullmatch(r"\d+\.\d+.*", distribution.version)


@pytest.mark.parametrize("name, flag", list(zip(PROGRAMS, [
    "--write-good", "--output", "--split", "--weights", "--sheet", "--opset", "--checksums", "deepspeed",
    "--gpus-per-node", "--stream", "--optim.lr", "--repair"], strict=True)))
def test_a_program_answers_a_call_for_help(answers, name, flag):
    code, said = answers["programs"][name]
    assert code == 0 and flag in said and "usage: " in said
