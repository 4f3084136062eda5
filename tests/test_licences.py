"""The table of licences is that of the installed packages, and has every requirement."""

import re
from configparser import ConfigParser
from importlib import metadata

import pytest

from support.launchers import ROOT

TABLE = dict(re.findall(r"^\| ([\w.-]+) \| .+ \| (.+) \|$", (ROOT / "docs" / "licences.md").read_text(), re.MULTILINE))


def required() -> set[str]:
    read = ConfigParser()
    read.read(ROOT / "setup.cfg")
    lists = [read["options"]["install_requires"], *read["options.extras_require"].values()]
    return {re.match(r"[\w.-]+", line)[0] for text in lists for line in text.split("\n")
            if line and not line.startswith("#")} - {"vir-at-scale"}


def stated(name: str) -> str:
    """By a package's metadata: an SPDX expression, else classifiers, else the old field."""
    found = metadata.metadata(name)
    classes = [line.rpartition(" :: ")[2] for line in found.get_all("Classifier", [])
               if line.startswith("License ::") and "DFSG" not in line]
    return found.get("License-Expression") or " / ".join(classes) or found["License"]


def test_every_requirement_is_in_the_table_and_nothing_else():
    assert TABLE.keys() - {"package"} == required()


@pytest.mark.parametrize("name", sorted(required()))
def test_the_licence_is_the_one_that_the_package_states(name):
    try:
        assert TABLE[name] == stated(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
