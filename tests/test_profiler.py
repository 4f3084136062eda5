"""--train.profile: which steps are in the file that a rank writes."""

import json
import re
import resource

import pytest
import torch

from vir.distributed import World
from vir.training import profiler as profiler_module
from vir.training.profiler import Profiler


def traced(folder, steps, first, total, rank=0):
    """The steps that the trace shows of a process which does those from `first` to `total`; None without a file."""
    profiler = Profiler(steps, first, total, folder, World(rank=rank, size=4, device=torch.device("cpu")))
    for step in range(first, total):
        profiler.before(step)
        with torch.profiler.record_function(f"this is step {step}"):
            torch.ones(2) + 1
        profiler.after(step)
    profiler.close()
    path = folder / f"rank{rank:05d}.json"
    if not path.exists():
        return None
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert any("aten::add" in name for name in names)
    return sorted({int(found[1]) for name in names if (found := re.fullmatch(r"this is step (\d+)", name))})


@pytest.mark.parametrize("steps, first, total, expected", [
    (2, 0, 20, [10, 11]),                   # after ten
    (5, 0, 8, [3, 4, 5, 6, 7]),             # there are too few: the last ones
    (10, 0, 4, [0, 1, 2, 3]),               # all there are
    (3, 100, 104, [101, 102, 103]),         # of a run that was continued
    (1, 100, 120, [110]),
    (1, 100, 101, [100]),
])
def test_the_steps_that_are_recorded(tmp_path, steps, first, total, expected):
    assert traced(tmp_path / "profile", steps, first, total) == expected


def test_without_the_flag_nothing_is_written(tmp_path):
    assert traced(tmp_path / "profile", 0, 0, 12) is None
    assert not (tmp_path / "profile").exists()


def test_each_rank_has_a_file_of_its_own(tmp_path):
    for rank in (0, 3):
        assert traced(tmp_path / "profile", 1, 0, 2, rank=rank) == [1]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank00000.json", "rank00003.json"]


def test_a_run_that_ends_early_leaves_what_was_recorded(tmp_path):
    profiler = Profiler(5, 0, 5, tmp_path / "profile", World(rank=0, size=1, device=torch.device("cpu")))
    profiler.before(0)
    with torch.profiler.record_function("this is step 0"):
        torch.ones(2) + 1
    profiler.after(0)
    assert not (tmp_path / "profile").exists()
    profiler.close()
    assert "this is step 0" in (tmp_path / "profile" / "rank00000.json").read_text()
    profiler.close()  # once more changes nothing


def no_folder(folder):
    folder.write_text("in the way")


def no_file(folder):
    """Kineto writes beside the trace, says to stderr that it cannot, and raises nothing."""
    (folder / "rank00000.json.tmp").mkdir(parents=True)
    (folder / "rank00000.json").write_text("of an earlier start")


@pytest.mark.parametrize("prevent, reason", [(no_folder, "File exists"), (no_file, "could not write it")])
def test_a_trace_that_cannot_be_written_is_only_told(tmp_path, monkeypatch, prevent, reason):
    said = []
    monkeypatch.setattr(profiler_module.log, "warning", lambda text, *args: said.append(text % args))
    prevent(tmp_path / "profile")
    profiler = Profiler(1, 0, 1, tmp_path / "profile", World(rank=0, size=1, device=torch.device("cpu")))
    profiler.before(0)
    profiler.after(0)
    profiler.close()
    message, = said
    assert str(tmp_path / "profile" / "rank00000.json") in message and reason in message


def test_an_error_of_the_profiler_is_only_told(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of events")

    said = []
    monkeypatch.setattr(profiler_module.log, "warning", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    assert traced(tmp_path / "profile", 1, 0, 1) is None
    assert len(said) == 1 and said[0].endswith("out of events")


def test_half_a_trace_does_not_stay_on_a_full_disk(tmp_path):
    profiler = Profiler(1, 0, 1, tmp_path / "profile", World(rank=0, size=1, device=torch.device("cpu")))
    profiler.before(0)
    for _ in range(1000):
        torch.ones(2) + 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # SIGXFSZ is ignored by Python
    try:
        profiler.after(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "profile").iterdir()) == []
