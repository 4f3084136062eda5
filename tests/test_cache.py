"""Whole shards on a disk: who downloads, what goes, what is never taken for whole; with real files and processes."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.small_disk import small_disk  # noqa: F401
from tests.support.waiting import HANGS, wait_for
from vir.data.cache import (
    RECENT_S,
    Cache,
    ChecksumError,
    Entry,
    File,
    NoRoomError,
    Outcome,
    Uses,
    cache_name,
    victims,
)
from vir.data.stores.store import Identity
from vir.errors import DataError

fork = multiprocessing.get_context("fork")
KB = 1 << 10


def named(name):
    """As a cache names its files; one that begins with `name`."""
    return f"{name.encode().hex():0<32}.tar"


def entry_of(content, name="a", **fields):
    return Entry(**{"name": named(name), "where": f"http://host/{name}.tar", "size": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(), **fields})


def fill(cache, content, name, uses=Uses(), gone=None, **fields):
    evicted = [] if gone is None else gone
    return cache.fill(entry_of(content, name, **fields), lambda: [content[:10], content[10:]], uses, evicted.append)


def short(name):
    return bytes.fromhex(name.removesuffix(".tar").rstrip("0")).decode()


def names(folder):
    return sorted(short(path.name) for path in folder.iterdir() if path.name != ".room.lock")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "made" / "cache", 100 * KB)


def test_names_differ_with_the_bytes_and_not_with_who_reads_them():
    url, identity = "https://host/train/000.tar", Identity(100, '"e"')
    name = cache_name(url, identity)
    assert len(name) == 36 and name.endswith(".tar")
    same = ["https://user:password@host/train/000.tar", url + "?X-Amz-Signature=1&X-Amz-Expires=5",
            url + "?sv=1&sig=2&se=3", url + "#part"]
    assert {cache_name(other, identity) for other in same} == {name}
    others = [("https://host/val/000.tar", identity), ("https://other/train/000.tar", identity),
              (url, Identity(101, '"e"')), (url, Identity(100, '"f"')), (url + "?id=2", identity),
              (url + "?id=3", identity)]
    assert len({name, *(cache_name(*other) for other in others)}) == 1 + len(others)


def test_what_goes_first():
    old, lately = 1e6 - RECENT_S - 1, 1e6 - RECENT_S + 1
    files = [File("soon", 1, 5.0), File("now", 1, 5.0), File("late", 1, 5.0), File("latest", 1, 5.0),
             File("done", 1, lately), File("done before", 1, old), File("other", 1, lately),
             File("other's", 1, lately - 1), File("old", 1, old), File("older", 1, old - 1)]
    uses = Uses({"soon", "now", "late", "latest", "done", "done before", "x"}, ["now", "soon", "x", "late", "latest"])
    assert [file.name for file in victims(files, "x", uses, 1e6)] == [
        "done before", "done", "older", "old", "latest", "late", "other's", "other"]
    assert [file.name for file in victims(files[:4], "now", uses, 1e6)] == ["latest", "late", "soon", "now"]
    assert [file.name for file in victims(files, "x", uses._replace(spares_others=True), 1e6)] == [
        "done before", "done", "older", "old", "latest", "late"]
    assert [file.name for file in victims(files[:2], "unknown", Uses(), 1e6)] == ["soon", "now"]


def test_a_shard_is_whole_or_not_there(cache):
    content = os.urandom(5000)
    assert cache.find(entry_of(content)) is None and cache.open(entry_of(content)) is None
    assert fill(cache, content, "a") is Outcome.DOWNLOADED
    assert fill(cache, content, "a") is Outcome.PRESENT
    assert cache.find(entry_of(content)).read_bytes() == content
    assert names(cache.folder) == ["a"]
    with open(cache.open(entry_of(content)), "rb") as file:
        assert file.read() == content


@pytest.mark.parametrize("content, fields, error, message", [
    (b"x" * 999, {"size": 1000}, DataError, r"http://host/a\.tar: 999 bytes came, its server said 1000; if the shard "
                                            r"was replaced, start the program again"),
    (b"x" * 1001, {"size": 1000}, DataError, "1001 bytes came so far, its server said 1000"),
    (b"x" * 1000, {"sha256": "00"}, ChecksumError, r"http://host/a\.tar has the SHA-256 [0-9a-f]{64}, the manifest "
                                                   "says 00; copy the shard")])
def test_other_bytes_than_were_announced_are_not_kept(cache, content, fields, error, message):
    with pytest.raises(error, match=message):
        fill(cache, content, "a", **fields)
    assert names(cache.folder) == []


def test_a_failing_download_leaves_nothing(cache):
    def breaks():
        yield b"some"
        raise DataError("gone")

    with pytest.raises(DataError, match="gone"):
        cache.fill(entry_of(b"x" * 100), breaks)
    assert names(cache.folder) == []
    assert fill(cache, b"x" * 100, "a") is Outcome.DOWNLOADED


def test_the_budget_holds_and_the_farthest_use_goes(cache):
    content = bytes(30 * KB)
    uses = Uses(set(map(named, "abcde")), list(map(named, "adbc")))
    for name in "abc":
        assert fill(cache, content, name, uses) is Outcome.DOWNLOADED
    gone = []
    assert fill(cache, content, "d", uses, gone) is Outcome.DOWNLOADED and gone == [named("c")]
    assert names(cache.folder) == ["a", "b", "d"]
    with pytest.raises(NoRoomError, match=rf"http://host/c\.tar has {30 * KB} bytes, for which the cache .*cache has "
                                          rf"no room among its {100 * KB}; raise --data\.cache_bytes"):
        fill(cache, content, "c", uses)
    assert names(cache.folder) == ["a", "b", "d"]


def test_nothing_goes_for_a_shard_that_does_not_come(cache):
    fill(cache, bytes(90 * KB), "a")

    def breaks():
        raise DataError("no answer")
        yield

    with pytest.raises(DataError, match="no answer"):
        cache.fill(entry_of(bytes(90 * KB), "b"), breaks)
    assert names(cache.folder) == ["a"]


def test_what_is_being_written_counts(cache):
    gone = []

    def during():
        yield bytes(10)  # it takes its room when its server answers
        with pytest.raises(NoRoomError):
            fill(cache, bytes(41 * KB), "b")
        gone.append(fill(cache, bytes(40 * KB), "b"))
        yield bytes(60 * KB - 10)

    assert cache.fill(entry_of(bytes(60 * KB)), during) is Outcome.DOWNLOADED
    assert gone == [Outcome.DOWNLOADED]
    assert names(cache.folder) == ["a", "b"]


def test_what_others_keep_in_the_folder_neither_counts_nor_goes(cache):
    cache.folder.mkdir(parents=True)
    kept = ["my-only-copy.tar", ".out.tar.123-ab.tmp", named("a")[:-5] + ".tar", f".{named('a')}x.7-ab.tmp"]
    for name in kept:
        (cache.folder / name).write_bytes(bytes(90 * KB))
    for name in ("val.tar", named("b")):
        (cache.folder / name).mkdir()
    (cache.folder / named("c")).symlink_to(cache.folder / kept[0])
    for name in "de":
        assert fill(cache, bytes(80 * KB), name) is Outcome.DOWNLOADED
    assert sorted(path.name for path in cache.folder.iterdir()) == sorted(
        [*kept, "val.tar", named("b"), named("c"), named("e"), ".room.lock"])


def test_what_is_used_next_is_not_known_to_all(cache):
    """Who has not opened its own ones for longest loses them, after those that other runs have left behind."""
    old, lately = 1e6 - RECENT_S - 1, 1e6 - RECENT_S + 1
    files = [File("own", 1, old - 1), File("used", 1, lately + 1), File("left", 1, old), File("other", 1, lately)]
    assert [file.name for file in victims(files, "x", Uses({"own", "used", "x"}), 1e6)] == [
        "left", "own", "used", "other"]


def test_no_download_begins_for_which_there_will_be_no_room(cache):
    begun = []
    with pytest.raises(NoRoomError):
        cache.fill(entry_of(bytes(101 * KB)), lambda: begun.append(1) or [])
    assert not begun


@pytest.mark.parametrize("mode, expected", [(0o700, 0o600), (0o755, 0o644), (0o2775, 0o664), (0o1777, 0o666)])
def test_those_may_write_to_its_locks_who_may_write_into_the_folder(cache, mode, expected):
    cache.folder.mkdir(parents=True)
    os.chmod(cache.folder, mode)
    fill(cache, b"x", "a")
    assert os.stat(cache.folder / ".room.lock").st_mode & 0o777 == expected


def test_a_link_in_the_place_of_a_lock_opens_no_file_to_others(cache, tmp_path):
    (tmp_path / "mine").touch(0o600)
    cache.folder.mkdir(parents=True)
    (cache.folder / ".room.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="room.lock"):
        fill(cache, b"x", "a")
    assert os.stat(tmp_path / "mine").st_mode & 0o777 == 0o600


class TestTwoUsers:
    """Root, and one who may write into the same folder."""

    @pytest.fixture
    def cache(self):
        if os.geteuid() != 0:
            pytest.skip("only root can be another user")
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o777)
            yield Cache(Path(folder), 100 * KB)

    def as_other(self, act):
        def main():
            os.setgid(12345)
            os.setuid(12345)
            os._exit(act())

        process = fork.Process(target=main, daemon=True)
        process.start()
        process.join(HANGS)
        return process.exitcode

    def test_both_fill_it(self, cache):
        fill(cache, bytes(60 * KB), "a")
        assert self.as_other(lambda: fill(cache, bytes(60 * KB), "b") is not Outcome.DOWNLOADED) == 0
        assert names(cache.folder) == ["b"]

    def test_what_may_not_be_removed_stays_and_others_go_instead(self, cache):
        os.chmod(cache.folder, 0o1777)
        fill(cache, bytes(40 * KB), "a")
        fill(cache, bytes(40 * KB), "b")
        os.chown(cache.folder / named("b"), 12345, 12345)
        os.utime(cache.folder / named("a"), (1, 1))  # it would be the first to go
        assert self.as_other(lambda: fill(cache, bytes(40 * KB), "c") is not Outcome.DOWNLOADED) == 0
        assert names(cache.folder) == ["a", "c"]

        def refused():
            with pytest.raises(PermissionError):
                fill(cache, bytes(90 * KB), "d")
            return 0

        assert self.as_other(refused) == 0


def test_opening_and_touching_note_the_use(cache):
    entry = entry_of(b"x" * 100)
    fill(cache, b"x" * 100, "a")
    for use in (lambda: os.close(cache.open(entry)), lambda: cache.touch(entry)):
        os.utime(cache.folder / named("a"), (1, 1))
        use()
        assert time.time() - (cache.folder / named("a")).stat().st_mtime < 60
    assert cache.touch(entry) and not cache.touch(entry_of(b"", "b"))


@pytest.mark.parametrize("spoil", [lambda path: os.truncate(path, 99), lambda path: path.unlink()])
def test_what_was_changed_behind_our_back_is_not_there_and_comes_again(cache, spoil):
    entry = entry_of(b"x" * 100)
    fill(cache, b"x" * 100, "a")
    spoil(cache.folder / named("a"))
    assert cache.find(entry) is None and cache.open(entry) is None and not cache.touch(entry)
    assert fill(cache, b"x" * 100, "a") is Outcome.DOWNLOADED
    assert cache.find(entry).read_bytes() == b"x" * 100


def test_eight_processes_that_want_a_shard_make_one_download(cache, tmp_path):
    content = os.urandom(50 * KB)
    starts = fork.Barrier(8)

    def blocks():
        with open(tmp_path / "count", "a") as file:
            file.write("x")
        time.sleep(0.2)
        yield content

    def race():
        starts.wait(10)
        outcomes = [cache.fill(entry_of(content), blocks)]
        while outcomes[-1] is Outcome.LOCKED:
            time.sleep(0.005)
            outcomes.append(cache.fill(entry_of(content), blocks))
        assert cache.find(entry_of(content)).read_bytes() == content

    processes = [fork.Process(target=race, daemon=True) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS)
    assert [process.exitcode for process in processes] == [0] * 8
    assert (tmp_path / "count").read_text() == "x"
    assert names(cache.folder) == ["a"]


def test_a_killed_download_is_never_whole_and_goes_when_its_writer_has(cache, tmp_path):
    content, begun = os.urandom(20 * KB), tmp_path / "begun"

    def hangs():
        yield content[:KB]
        yield content[KB:]  # all bytes are there, but for the renaming
        begun.touch()
        time.sleep(60)

    writer = fork.Process(target=cache.fill, args=(entry_of(content), hangs), daemon=True)
    writer.start()
    wait_for(begun.exists)
    leftover, = cache.folder.glob("*.tmp")
    os.utime(leftover, (1, 1))
    assert cache.progress(entry_of(content)) == 1 and cache.progress(entry_of(content, "b")) == 0
    assert fill(cache, content, "a") is Outcome.LOCKED
    fill(cache, b"x" * 10, "b")
    assert leftover.exists() and cache.find(entry_of(content)) is None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(HANGS)
    assert cache.find(entry_of(content)) is None
    fill(cache, b"x" * 10, "c")  # another shard, by another process
    assert names(cache.folder) == ["b", "c"]
    assert fill(cache, content, "a") is Outcome.DOWNLOADED
    assert cache.find(entry_of(content)).read_bytes() == content


def test_a_full_disk_bounds_the_room_as_long_as_it_is_full(small_disk):  # noqa: F811
    cache = Cache(small_disk / "cache", 10**9)
    content = os.urandom(300 * KB)
    assert cache.room() == 10**9  # before there is a folder
    for name in "abc":
        fill(cache, content, name)
    uses = Uses(set(map(named, "abcd")), list(map(named, "dbc")))
    gone = []
    assert fill(cache, content, "d", uses, gone) is Outcome.DOWNLOADED and gone == [named("a")]
    assert names(cache.folder) == ["b", "c", "d"] and 900 * KB < cache.room() <= 1024 * KB
    for name in "bcd":
        cache.remove(entry_of(content, name))
    (small_disk / "other").write_bytes(bytes(1000 * KB))
    with pytest.raises(NoRoomError, match=r"has 307200 bytes, for which the cache .*cache has no room on its disk, "
                                          r"where \d+ are for it; make room there, or give another folder"):
        fill(cache, content, "a")
    (small_disk / "other").unlink()
    assert fill(cache, content, "a") is Outcome.DOWNLOADED and cache.budget_bytes == 10**9


def test_a_read_only_cache_gives_what_it_has(small_disk):  # noqa: F811
    cache = Cache(small_disk / "cache", 10**6)
    fill(cache, b"x" * 100, "a")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True, timeout=10)
    with pytest.raises(OSError, match="Read-only"):
        fill(cache, b"x" * 100, "b")
    assert cache.touch(entry_of(b"x" * 100))
    with open(cache.open(entry_of(b"x" * 100)), "rb") as file:
        assert file.read() == b"x" * 100
