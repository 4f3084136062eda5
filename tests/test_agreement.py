"""Two ranks that differ are refused on both by the name of the host, and what it has; a clock is a warning.

This file is also the program of the ranks: python tests/test_agreement.py FOLDER
"""

import json
import logging
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from support.launchers import torchrun
from vir import distributed
from vir.cluster import agreement
from vir.cluster.agreement import Word, clock_warnings, different, digest
from vir.cluster.preflight import DEEPSPEED
from vir.config import RunConfig, to_dict
from vir.errors import SettingsError
from vir.flags import parse

CONFIG = parse(["--data.train", "d", "--output", "runs/a"])
JSON = {"zero_optimization": {"stage": 2}}


def told(config: RunConfig = CONFIG, deepspeed_json=JSON):
    try:
        agreement.check(config, deepspeed_json)
    except SettingsError as error:
        return str(error)


def as_rank(folder):
    rank = distributed.start().rank
    is_other = rank == 1
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    agreement.log.addHandler(handler)
    socket.gethostname = lambda: f"node-{rank}"
    found = {"same": told(), "local": told(parse(["--data.train", f"{rank}", "--output", "runs/a", "--data.cache",
                                                  f"/disk{rank}", "--data.workers", str(1 + rank)]))}
    other = parse(["--data.train", "d", "--output", "runs/a", "--optim.lr", "0.5", "--checkpoint.every_steps", "9"])
    found["config"] = told(other if is_other else CONFIG)
    found["deepspeed"] = told(deepspeed_json={"zero_optimization": {"stage": 3}} if is_other else JSON)
    for name, value in (("code_digest", "bad0" * 16), ("versions", {"python": "3.10.1"})):
        true = getattr(agreement, name)
        setattr(agreement, name, (lambda: value) if is_other else (lambda: {"python": "3.11.2"})
                if name == "versions" else true)
        found[name] = told()
        setattr(agreement, name, true)
    found["quiet"] = list(lines)
    clock = time.time
    time.time = lambda: clock() + 7200 * rank
    found["clock"], found["warned"] = told(), lines
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.stop()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(__file__, folder)
    assert done.returncode == 0, done.stdout
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.launcher
def test_ranks_that_agree_and_what_may_differ_by_machine(found):
    for of_rank in found:
        assert (of_rank["same"], of_rank["local"], of_rank["quiet"]) == (None, None, [])


@pytest.mark.launcher
def test_every_rank_is_told_the_same_about_the_other_one(found):
    code = agreement.code_digest()[:12]
    for of_rank in found:
        assert of_rank["config"] == (
            "the settings on node-1 differ from those of node-0: checkpoint.every_steps: None -> 9; optim.lr: None -> "
            "0.5; start all ranks with the same options and the same YAML files")
        assert f"node-0: {DEEPSPEED}.zero_optimization.stage: 2 -> 3; start all" in of_rank["deepspeed"]
        assert of_rank["code_digest"] == (
            f"the code of vir is not the same on all hosts: its digest is bad0bad0bad0 on node-1, but {code} on "
            "node-0; check out the same version on all of them, without changes of their own")
        assert of_rank["versions"] == ("python is not the same on all hosts: it is 3.10 on node-1, but 3.11 on "
                                       "node-0; install the same version on all of them")


@pytest.mark.launcher
def test_a_clock_is_a_warning_by_name(found):
    for of_rank in found:
        (said,) = of_rank["warned"]
        assert of_rank["clock"] is None
        assert said.startswith("the clock of node-1 is 7,") and " ahead of the others', more than 60 s:" in said


def words(*others, count=8):
    """Of two ranks on each host; `others` take the place of the last ones."""
    good = [Word(f"node-{rank // 2}", "c0de" * 16, {"torch": "2.15.0"}, "d", 0.0) for rank in range(count)]
    return good[:count - len(others)] + list(others)


def none_asked():
    raise AssertionError("the settings are gathered only where they differ")


def test_most_are_right_also_against_rank_0_and_hosts_are_named_once():
    good = words(count=8)
    assert different(good, none_asked) == "" and different(good[:1], none_asked) == ""
    bad = [replace(word, code="bad0" * 16) if word.host in ("node-0", "node-1") and rank < 3 else word
           for rank, word in enumerate(good)]
    assert "is bad0bad0bad0 on node-0, node-1, but c0dec0dec0de on node-1;" in different(bad, none_asked)
    many = [replace(word, versions={"torch": "2.9"}) for word in words(count=12)] + [
        replace(word, host=f"good-{number}") for number, word in enumerate(words(count=20))]
    assert different(many, none_asked).startswith("torch is not the same on all hosts: it is 2.9 on node-0, node-1, "
                                                  "node-2, node-3 and 2 more, but 2.15.0 on good-0; install")


@pytest.mark.parametrize("name, usual, other, is_refused", [
    ("driver", "550.54.15", "550.90.07", False), ("driver", "550.54.15", "none", False),
    ("python", "3.11.2", "3.11.10", False), ("python", "3.11.2", "3.12.2", True), ("torch", "2.15.0", "2.15.1", True),
    ("deepspeed", "0.18.1", "0.18.2", True), ("vir", "1.0", "1.1", True)])
def test_a_version_refuses_a_run_only_where_the_run_depends_on_it(name, usual, other, is_refused):
    some = [replace(word, versions={name: usual}) for word in words()]
    assert agreement.version_warnings(some) == []
    some[-1] = replace(some[-1], versions={name: other})
    assert bool(different(some, none_asked)) is is_refused
    if not is_refused:
        assert agreement.version_warnings(some) == [
            f"{name} is not the same on all hosts: it is {other} on node-3, but {usual} on node-0; where hosts behave "
            "differently, look at this first"]


def test_the_settings_that_differ_are_those_of_the_first_that_differs():
    some = words(replace(words()[7], config="e"))
    of_all = [to_dict(CONFIG)] * 7 + [to_dict(parse(["--data.train", "d", "--train.seed", "7"]))]
    assert different(some, lambda: of_all).startswith(
        "the settings on node-3 differ from those of node-0: train.seed: 42 -> 7; start")


@pytest.mark.parametrize("flag, value, same", [
    ("--train.log_every", "7", False), ("--model.drop_path_rate", "0.3", False), ("--data.val", "v", True),
    ("--output", "x", True), ("--data.lanes", "3", True), ("--data.max_bad_fraction", "0.5", False)])
def test_the_digest_is_of_all_settings_but_those_of_a_machine(flag, value, same):
    other = parse(["--data.train", "d", "--output", "runs/a", flag, value])
    assert (digest(to_dict(other)) == digest(to_dict(CONFIG))) is same


def test_clocks_are_named_by_host():
    some = [replace(word, clock=100.0) for word in words()]
    assert clock_warnings(some) == []
    late = [replace(word, clock=-100.0) if word.host == "node-2" else word for word in some]
    (said,) = clock_warnings(late)
    assert said.startswith("the clock of node-2 is 200 s behind the others', more than 60 s: times in its log mislead;")


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
