"""Checkpoints that are written beside training, in real runs: killed in each phase of one, on slow disks, with defects.
Each run goes on after its kill, and at its end is the one that met nothing, bit for bit."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support.befallen import KEPT, SLOW_S
from support.faults import GONE_WITHIN, Ranks
from support.forked import forked, of_this_session
from support.launchers import HANGS
from support.tiny_runs import command, launch, train_events, weights
from vir.checkpoints.info import DESCRIPTION
from vir.checkpoints.names import BEST, STEPS, named_by, newest, step_of
from vir.checkpoints.store import select
from vir.reports.metrics import read_metrics

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(2 * HANGS)]

TOTAL = 9
SYNCHRONOUS = ["--checkpoint.asynchronous", "false"]


def arguments(shards: Path, run: Path, config: str, *more: str, every: int = 1) -> list[str]:
    return command(shards, run, config, "--checkpoint.every_steps", str(every), *more, steps=TOTAL)


@dataclass
class Left:
    """By a kill."""

    selected: int
    """Step of the checkpoint that is taken."""
    parts: dict[str, dict[str, int]]
    """Folders with temporary names: bytes of their files, by names."""
    steps: list[int]
    latest: int


def left_in(run: Path) -> Left:
    root = run / "checkpoints"
    return Left(selected=select(run)[1].step, latest=step_of(newest(run)),
                parts={part.name: {file.name: file.stat().st_size for file in part.iterdir()}
                       for part in sorted(root.glob("*.part"))},
                steps=sorted(step_of(path) for path in root.glob(STEPS)))


def is_same(one: Path, other: Path, step: int, tmp: Path) -> None:
    for ema in (False, True):
        expected, found = (weights(run, step, tmp, ema=ema) for run in (one, other))
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def are_same(one: Path, other: Path, tmp: Path) -> None:
    kept = ("step", "samples_seen", "loss", "lr", "grad_norm", "updates")
    expected, found = ([{key: event[key] for key in kept} for event in train_events(run)] for run in (one, other))
    assert [event["step"] for event in expected] == list(range(1, TOTAL + 1)) and found == expected
    is_same(one, other, TOTAL, tmp)


# ---- one rank, killed in each phase


PHASES = ["in_copy", "in_write", "before_publication", "described", "renamed", "in_removal"]
"""Each at the second checkpoint of its start, so that the first one is there."""


@pytest.fixture(scope="module")
def killed(shards, tmp_path_factory) -> tuple[Path, dict[str, Left]]:
    """A folder with the run that was killed in each phase, and then finished; beside it one that was not, and one whose
    checkpoints are synchronous. What each kill has left."""
    tmp, met = tmp_path_factory.mktemp("killed"), {}
    words = arguments(shards, tmp / "killed", "zero2_fp32", "--checkpoint.keep", str(KEPT))
    for phase in PHASES:
        step = (met[PHASES[len(met) - 1]].selected if met else 0) + 2
        done = forked("-m", "support.befallen", phase, step, 0, *words, ranks=1)
        assert done.returncode == -9, done.stdout[-3000:]
        met[phase] = left_in(tmp / "killed")
    codes, said = launch(tmp, [words, arguments(shards, tmp / "undisturbed", "zero2_fp32"),
                               arguments(shards, tmp / "synchronous", "zero2_fp32", *SYNCHRONOUS, every=4)], ranks=1)
    assert codes == [0, 0, 0], said[-3000:]
    return tmp, met


def test_a_kill_in_any_phase_leaves_the_one_before(killed):
    """Up to the moment in which `latest` moves: from then on it is the new one."""
    assert [killed[1][phase].selected for phase in PHASES] == [1, 2, 3, 4, 5, 7]
    assert [killed[1][phase].latest for phase in PHASES] == [1, 2, 3, 4, 5, 7]


def test_each_kill_came_in_its_phase(killed):
    tmp, met = killed
    whole = {path.name: path.stat().st_size for path in (newest(tmp / "killed")).iterdir()}
    optimizer, model = sorted(name for name in whole if name != DESCRIPTION)[::-1]
    files = {name: size for name, size in whole.items() if name != DESCRIPTION}
    assert "optim" in optimizer and met["in_copy"].parts == {"step-00000002.part": {}}
    (part,) = met["in_write"].parts.values()
    assert 0 < max(part.values()) < whole[max(part, key=part.get)]
    assert met["before_publication"].parts.keys() == {"step-00000004.part"}
    for phase, names in (("before_publication", files), ("described", whole)):
        (part,) = met[phase].parts.values()
        assert part.keys() == names.keys()
        assert {name: part[name] for name in files} == pytest.approx(files, rel=1e-3)
    assert met["renamed"].parts == {} and met["renamed"].steps[-1] == 6
    ((name, part),) = met["in_removal"].parts.items()
    assert name.endswith(".removed.part") and len(part) == len(whole) - 1


def test_the_next_start_removes_what_a_kill_has_left(killed):
    assert not list((killed[0] / "killed" / "checkpoints").glob("*.part"))
    assert left_in(killed[0] / "killed").steps == [TOTAL - 2, TOTAL - 1, TOTAL]


def test_after_all_kills_the_run_is_the_undisturbed_one_bit_for_bit(killed, tmp_path):
    are_same(killed[0] / "undisturbed", killed[0] / "killed", tmp_path)


def test_synchronous_checkpoints_are_the_same_bit_for_bit(killed, tmp_path):
    are_same(killed[0] / "undisturbed", killed[0] / "synchronous", tmp_path)
    for step in (4, 8):
        is_same(killed[0] / "undisturbed", killed[0] / "synchronous", step, tmp_path)


# ---- a slow disk


def said_of(run: Path, pattern: str) -> list[tuple[str, ...]]:
    """What the groups of a pattern match in the log."""
    return re.findall(pattern, (run / "log.txt").read_text())


def made_in(run: Path) -> list[tuple[int, float, float]]:
    """Step, seconds until it was published, seconds that training waited, of each checkpoint."""
    return [(int(step), float(took), float(waited)) for step, took, waited in said_of(
        run, r"checkpoint \S+/step-(\d+): \S+ MB in (\S+) s, for which training waited ([0-9.]+) s")]


@pytest.fixture(scope="module")
def hurried(shards, tmp_path_factory) -> Path:
    """Checkpoints at each second step, as the plan says, and before each step, as somebody asks for; evaluations at
    each fourth, while those of the steps before are on their way."""
    run = tmp_path_factory.mktemp("hurried") / "run"
    words = arguments(shards, run, "zero2_fp32", "--eval.every_steps", "4", every=2)
    done = forked("-m", "support.befallen", "slow_disk_and_wishes", 0, 0, *words, ranks=1)
    assert done.returncode == 0, done.stdout[-3000:]
    return run


def test_on_a_slow_disk_each_waits_for_the_one_before_which_is_said_once(hurried):
    made = made_in(hurried)
    # Each step once, though every second one was asked for twice.
    assert [step for step, _, _ in made] == list(range(1, TOTAL + 1))
    assert all(took >= 2 * SLOW_S for _, took, _ in made)
    waits = said_of(hurried, r"the checkpoint of step (\d+) has waited \S+ s for the one of step \d+")
    assert {"2", "3", "5", "6", "7"} <= set(waits)  # before the others an evaluation may take as long as the disk
    ((took, steps),) = said_of(hurried, r"writing a checkpoint takes (\S+) s, longer than the time between two: .*; "
                                        r"this disk holds --checkpoint.every_minutes 0.1 or --checkpoint.every_steps "
                                        r"(\d+)")
    assert float(took) >= 2 * SLOW_S and int(steps) >= 1
    (told,) = said_of(hurried, r"\(a checkpoint \S+ s, for which training waited \S+ s; (\d+) had to wait for the "
                               r"one before\)")
    assert told == str(len(waits)) == str(len(set(waits)))


def test_evaluations_between_steps_change_no_checkpoint_that_is_on_its_way(hurried, killed, tmp_path):
    """The average takes the place of the weights then."""
    for step in left_in(hurried).steps:  # that of 8 was on its way in the last evaluation
        is_same(killed[0] / "undisturbed", hurried, step, tmp_path)
    evaluated = {event["step"]: event["top1"] for event in read_metrics(hurried) if event["kind"] == "eval"}
    assert evaluated.keys() == {4, 8, TOTAL}
    assert evaluated[step_of(named_by(hurried, BEST))] == max(evaluated.values())


def test_the_last_one_is_published_before_the_run_is_done(hurried):
    lines = (hurried / "log.txt").read_text()
    assert lines.index(f"step-{TOTAL:08d}: ") < lines.index(" of steps: ") < lines.index("done: ")
    left = left_in(hurried)
    assert (left.selected, left.latest, left.parts) == (TOTAL, TOTAL, {}) and {2, 4, 6, 8, TOTAL} <= {*left.steps}


# ---- two ranks


@dataclass
class Start:
    codes: list[int]
    said: list[str]
    seconds: float
    left: Left


STARTS = [("in_write", 2, 1), ("renamed", 3, 0), ("defect_of_writer", 4, 1)]


@pytest.fixture(scope="module")
def ranks(shards, tmp_path_factory) -> tuple[Path, dict[str, Start]]:
    """A folder with a run of two ranks in ZeRO 3, of which one was lost again and again; beside it one without."""
    tmp, met = tmp_path_factory.mktemp("ranks"), {}
    words = arguments(shards, tmp / "killed", "zero3_bf16")
    for fault, step, rank in STARTS:
        with Ranks(words, tmp / "killed", tmp / fault, program=("-m", "support.befallen", fault, str(step), str(rank)),
                   imported=of_this_session()) as started:
            seconds = started.seconds_until_gone()
            met[fault] = Start(started.codes(), [started.said(rank) for rank in (0, 1)], seconds,
                               left_in(tmp / "killed"))
    codes, said = launch(tmp, [words, arguments(shards, tmp / "undisturbed", "zero3_bf16", every=TOTAL)])
    assert codes == [0, 0], said[-3000:]
    return tmp, met


@pytest.mark.parametrize("fault, codes, saved", [
    ("in_write", [5, -9], 1), ("renamed", [-9, 5], 2), ("defect_of_writer", [5, 1], 3)])
def test_a_rank_that_is_lost_within_a_checkpoint_ends_all_and_leaves_the_one_before(fault, codes, saved, ranks):
    met = ranks[1][fault]
    assert met.codes == codes and met.seconds < GONE_WITHIN, met.said
    assert met.left.selected == saved, met.left


def test_a_defect_of_the_thread_that_writes_is_told_by_its_rank_and_by_the_others(ranks):
    said = ranks[1]["defect_of_writer"].said
    assert re.search(r"^vir-train: rank 1 \(\S+\) .*KeyError: 'of nobody'$", said[1], re.MULTILINE), said[1]
    assert "rank 1" in said[0] and "ends with it, exit code 5" in said[0], said[0]


def test_of_two_ranks_in_zero_3_both_runs_are_the_same_bit_for_bit(ranks, tmp_path):
    are_same(ranks[0] / "undisturbed", ranks[0] / "killed", tmp_path)
