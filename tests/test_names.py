"""The names of checkpoints, and which of them is meant."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from vir.checkpoints import names


@pytest.mark.parametrize("step, name", [(0, "step-00000000"), (10, "step-00000010"), (12345678, "step-12345678")])
def test_names_are_as_long_as_the_patterns_that_find_them(step, name):
    assert names.name_of(step) == name
    assert names.step_of(Path("runs", name)) == names.step_of(Path("runs", name + names.REPLACED)) == step
    assert fnmatch(name, names.STEPS)


def test_the_newest_is_what_latest_names_and_lies_in_the_run(tmp_path):
    assert names.newest(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert names.newest(tmp_path) is None
    for text in ("step-00000010\n", "../../elsewhere/step-00000010"):
        (tmp_path / "checkpoints" / "latest").write_text(text)
        assert names.newest(tmp_path) == tmp_path / "checkpoints" / "step-00000010"
        assert names.named_by(tmp_path, "latest") == names.newest(tmp_path) and names.named_by(tmp_path, "best") is None


@pytest.mark.parametrize("latest, first", [
    (None, []), ("", ["checkpoints"]), ("step-00000002", ["step-00000002"]),
    ("step-00000004", ["step-00000004", "step-00000004.replaced.part"]),
    ("step-00000003", ["step-00000003", "step-00000003.replaced.part"]),  # is not there itself
])
def test_candidates_are_what_latest_names_and_then_the_others_from_the_last_step_down(tmp_path, latest, first):
    root = tmp_path / "checkpoints"
    found = ["step-00000010", "step-00000009", "step-00000004", "step-00000004.replaced.part",
             "step-00000003.replaced.part", "step-00000002"]
    none = ["step-00000005.part", "step-00000006.removed.part", "step-00000010.removed.part", "step-of-mine"]
    for name in (*found[::2], *none, *found[1::2]):
        (root / name).mkdir(parents=True)
    if latest is not None:
        (root / "latest").write_text(latest)
    assert [path.name for path in names.candidates(tmp_path)] == [
        *first, *(name for name in found if name not in first)]


def test_there_are_no_candidates_where_there_is_no_run(tmp_path):
    assert names.candidates(tmp_path / "nowhere") == []
