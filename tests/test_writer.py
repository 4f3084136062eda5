"""Files of one rank: as torch.save writes them, with their checksums; what goes wrong is told, and raised nowhere."""

import errno
import hashlib
import threading
from types import SimpleNamespace

import pytest
import torch

from support.small_disk import small_disk  # noqa: F401
from support.waiting import HANGS, wait_for
from vir.checkpoints import writer
from vir.checkpoints.writer import GivenUp, Writer, do, done, write_file

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def asynchronous(request):
    return request.param


def written(one, folder, *states):
    one.begin()
    for number, state in enumerate(states):
        one.take(state, folder / f"{number}.pt")
    return one.write(folder).result(HANGS)


def test_a_file_is_what_torch_reads_and_is_listed_with_its_checksum(tmp_path, asynchronous):
    states = [{"weight": torch.randn(3, 5)}, {"step": 4}]
    problems, files = written(Writer(CPU, asynchronous), tmp_path, *states)
    assert not problems and sorted(files) == ["0.pt", "1.pt"]
    for name, listed in files.items():
        content = (tmp_path / name).read_bytes()
        assert listed == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert torch.equal(torch.load(tmp_path / "0.pt")["weight"], states[0]["weight"])
    assert torch.load(tmp_path / "1.pt") == states[1]


def test_the_next_checkpoint_is_of_the_next_state(tmp_path, asynchronous):
    one, weight = Writer(CPU, asynchronous), torch.zeros(3)
    for step in range(3):
        folder = tmp_path / str(step)
        folder.mkdir()
        written(one, folder, {"weight": weight})
        weight += 1
    assert [torch.load(tmp_path / str(step) / "0.pt")["weight"][0].item() for step in range(3)] == [0, 1, 2]


def test_a_state_that_changes_while_it_is_written_is_written_as_it_was(tmp_path, monkeypatch):
    begun, go_on, weight = threading.Event(), threading.Event(), torch.zeros(3)

    def slow(*given):
        begun.set()
        assert go_on.wait(HANGS)
        return write_file(*given)

    monkeypatch.setattr(writer, "write_file", slow)
    one = Writer(CPU, asynchronous=True)
    one.take({"weight": weight}, tmp_path / "a.pt")
    future = one.write(tmp_path)
    assert begun.wait(HANGS) and not future.done()
    weight += 1
    go_on.set()
    assert not future.result(HANGS).problems and torch.equal(torch.load(tmp_path / "a.pt")["weight"], torch.zeros(3))


def test_a_problem_is_told_and_the_other_files_are_written(tmp_path, asynchronous):
    one = Writer(CPU, asynchronous)
    (tmp_path / "0.pt").mkdir()
    problems, files = written(one, tmp_path, {"a": 1}, {"b": 2})
    assert len(problems) == 1 and "0.pt: " in problems[0] and "Is a directory" in problems[0]
    assert sorted(files) == ["1.pt"]
    assert not written(one, tmp_path / "0.pt", {"a": 1}).problems  # and the next checkpoint has none of it


def test_a_full_disk_is_told_in_the_words_of_the_system(small_disk, asynchronous):  # noqa: F811
    problems, files = written(Writer(CPU, asynchronous), small_disk, {"weight": torch.zeros(1_000_000)})
    assert not files and "0.pt: " in problems[0] and "No space left on device" in problems[0]


def test_memory_that_is_not_there_names_the_way_out(tmp_path):
    problems, files = written(Writer(CPU, asynchronous=True), tmp_path, _Huge())
    assert not files and "0.pt: the copy of this rank's state does not fit into host memory" in problems[0]
    assert "--checkpoint.asynchronous false" in problems[0]
    problems, files = written(Writer(CPU, asynchronous=False), tmp_path, _Huge())  # which is that way already
    assert not files and "Cannot allocate memory" in problems[0] and "--checkpoint.asynchronous" not in problems[0]


class _Huge:
    """Refuses to be taken apart, as the system refuses memory that is not there."""

    def __reduce__(self):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_what_is_given_up_ends_soon(tmp_path, monkeypatch):
    one, parts = Writer(CPU, asynchronous=True), []
    monkeypatch.setattr(writer, "_CHUNK", 1)

    def update(part):
        parts.append(part)
        if len(parts) == 3:
            one.give_up()

    monkeypatch.setattr(writer.hashlib, "sha256", lambda: SimpleNamespace(update=update))
    one.take({"weight": torch.zeros(100)}, tmp_path / "a.pt")
    problems, files = one.write(tmp_path).result(HANGS)
    assert problems and not files and len(parts) == 3


def test_a_file_that_was_given_up_before_is_not_written(tmp_path):
    given_up = threading.Event()
    given_up.set()
    with pytest.raises((GivenUp, RuntimeError)):
        write_file({"a": torch.zeros(3)}, tmp_path / "a.pt", given_up)


def test_work_in_the_background_lets_the_caller_go_on_and_keeps_its_error():
    go_on = threading.Event()
    future = do(lambda: go_on.wait(HANGS), in_background=True)
    assert not future.done()
    go_on.set()
    assert future.result(HANGS) is True
    failed = do(lambda: 1 / 0, in_background=True)
    with pytest.raises(ZeroDivisionError):
        failed.result(HANGS)
    assert done(3).done() and done(3).result() == 3


def test_the_thread_holds_up_no_end_of_the_process():
    hangs = threading.Event()
    before = threading.enumerate()
    do(hangs.wait, in_background=True)
    thread, = (one for one in threading.enumerate() if one not in before)
    assert thread.daemon and thread.name == "checkpoint"
    hangs.set()
    wait_for(lambda: not thread.is_alive(), "its end")
