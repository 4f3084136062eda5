"""The status that the first rank to end leaves for its launch script."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from vir import status
from vir.status import FILE, Status


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "a run" / ".status-1-0.json"
    path.parent.mkdir()
    monkeypatch.setenv(FILE, str(path))
    for name in ("RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    return path


def test_the_first_rank_that_ends_is_believed(file, monkeypatch):
    assert status.read(file) is None
    monkeypatch.setenv("RANK", "3")
    status.write(3, "a shard is missing")
    monkeypatch.setenv("RANK", "0")
    status.write(5, "rank 3 has ended")
    assert status.read(file) == Status(3, "a shard is missing", 3, os.uname().nodename)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_of_ranks_that_end_together_one_is_heard_whole(file):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda code: status.write(code, str(code) * 5000), range(16)))
    found = status.read(file)
    assert found is not None and found.said == str(found.code) * 5000


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_a_file_system_without_links_does_as_well(file, monkeypatch, error):
    def link(*_):
        raise error("no links")

    monkeypatch.setattr(os, "link", link)
    status.write(0, "done")
    status.write(5, "later")
    assert status.read(file) == Status(0, "done", 0, os.uname().nodename)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_ranks_that_torchrun_starts_again_are_heard_again(file, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    for count, code, goes_on in (("0", 5, True), ("1", 5, True), ("2", 5, False)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        status.write(code, f"attempt {count}")
        found = status.read(file)
        assert found is not None and found.said == f"attempt {count}" and found.goes_on is goes_on
    status.remove(file)
    assert list(file.parent.iterdir()) == []


def test_a_start_that_another_machines_agent_has_caused_is_heard_though_it_is_not_counted(file, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    for port, code, goes_on in (("40001", 75, True), ("30001", 0, False)):
        monkeypatch.setenv("MASTER_PORT", port)
        status.write(code, port)
        status.write(5, "a later rank")
        found = status.read(file)
        assert found is not None and (found.code, found.said, found.goes_on) == (code, port, goes_on)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    monkeypatch.setenv("MASTER_PORT", "40002")
    status.write(75, "stopped")
    assert not status.read(file).goes_on


def test_a_folder_that_is_gone_or_no_script_that_waits_hinder_no_rank(file, monkeypatch):
    file.parent.rmdir()
    status.write(0, "done")
    assert status.is_awaited() and status.read(file) is None
    monkeypatch.delenv(FILE)
    status.write(0, "done")
    assert not status.is_awaited()


def test_a_variable_that_is_no_number_hinders_no_rank(file, monkeypatch):
    monkeypatch.setenv("RANK", "abc")
    status.write(2, "RANK is 'abc'")
    assert status.read(file) == Status(2, "RANK is 'abc'", 0, os.uname().nodename)


def test_the_script_asks_in_a_file_that_is_there_from_the_start(file):
    assert status.asked_to_stop(file) == 0
    status.make_room(file)
    assert status.asked_to_stop(file) == 0
    status.ask_to_stop(file, 15)
    assert status.asked_to_stop(file) == 15
    status.remove(file)
    assert list(file.parent.iterdir()) == []


def test_what_is_half_written_is_not_read(file):
    file.write_text('{"code": 0, "sa')
    assert status.read(file) is None
