"""Shards on a server in parts, and from a cache: which bytes, from where, and what happens when either fails."""

import hashlib
import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.file_store import FileStore, make_shards
from tests.support.http_server import HttpServer, Lie
from tests.support.waiting import HANGS, wait_for
from vir.data.cache import Outcome
from vir.data.remote_shards import CachedShards, RemoteShards, Traffic
from vir.data.stores.choose import open_store
from vir.data.stores.store import MissingError, StoreError
from vir.errors import DataError

SIZES = (300_000, 200_000, 100_000)
fork = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path / "notes")


def remote_of(store, tmp_path, timeout=5.0):
    urls = make_shards(tmp_path / "server", SIZES)
    return RemoteShards(urls, [store.stat(url) for url in urls], timeout, store)


@pytest.fixture
def remote(store, tmp_path):
    return remote_of(store, tmp_path)


@pytest.fixture
def cached(remote, tmp_path):
    return CachedShards(remote, tmp_path / "cache", 10**6)


def content(remote, shard, offset, size):
    with open(remote.urls[shard].removeprefix("file://"), "rb") as file:
        return file.read()[offset:offset + size]


def test_parts_come_from_the_server_and_are_counted(remote, store):
    assert remote.read(1, 70_000, 1000) == content(remote, 1, 70_000, 1000)
    remote.expect(1, 0, 10)
    remote.forget()
    assert b"".join(remote.blocks(2)) == content(remote, 2, 0, SIZES[2])
    assert store.noted() == ["read 001.tar 70000 1000", "blocks 002.tar"]
    assert (remote.traffic.ranged_reads, remote.traffic.ranged_bytes, remote.traffic.downloads) == (1, 1000, 0)


def test_where_is_without_secrets(store):
    remote = RemoteShards(["https://me:secret@host/0.tar?token=secret"], [store.stat("file:///dev/null")], 1.0, store)
    cached = CachedShards(remote, "/nowhere", 1)
    for access in (remote, cached):
        assert "host/0.tar" in access.where(0) and "secret" not in access.where(0) and "me" not in access.where(0)


def test_whole_shards_come_from_the_cache(cached, remote, store):
    assert cached.read(0, 5, 100) == content(remote, 0, 5, 100)
    assert cached.download(0) is Outcome.DOWNLOADED
    assert cached.read(0, 200_000, 100_000) == content(remote, 0, 200_000, 100_000)
    cached.expect(0, 5, 100)
    cached.expect(1, 5, 100)
    assert cached.read(1, 0, 1) == content(remote, 1, 0, 1)
    assert store.noted() == ["read 000.tar 5 100", "blocks 000.tar", "read 001.tar 0 1"]
    traffic = cached.traffic
    assert (traffic.downloads, traffic.downloaded_bytes, traffic.ranged_reads, traffic.ranged_bytes,
            traffic.evictions) == (1, SIZES[0], 2, 101, 0)


def test_threads_a_fork_and_a_copy_read_the_same(cached, remote):
    cached.download(0)
    wanted = [(shard, offset, 500) for shard in range(3) for offset in range(0, 90_000, 1500)]
    expected = [content(remote, *part) for part in wanted]
    for access in (cached, pickle.loads(pickle.dumps(cached))):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda part: access.read(*part), wanted)) == expected
    child = fork.Process(target=lambda: os._exit([cached.read(*part) for part in wanted] != expected), daemon=True)
    child.start()
    child.join(HANGS)
    assert child.exitcode == 0


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("spoil", [lambda path: os.truncate(path, 100), lambda path: path.unlink()])
def test_a_cache_that_loses_bytes_is_passed_over(cached, remote, spoil, is_open):
    cached.download(0)
    if is_open:
        cached.read(0, 0, 1)
    spoil(cached.cache.folder / cached.entries[0].name)
    assert cached.read(0, 250_000, 1000) == content(remote, 0, 250_000, 1000)


def test_after_a_failure_the_thread_reads_from_the_server_once(cached, remote, store):
    """What has changed on the cache's disk without a change of size."""
    cached.download(0)
    path = cached.cache.folder / cached.entries[0].name
    path.write_bytes(bytes(SIZES[0]))
    assert cached.read(0, 0, 10) == bytes(10)
    cached.forget()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cached.read, 0, 0, 10).result() == bytes(10)  # its cache may be in order
    assert cached.read(0, 0, 10) == content(remote, 0, 0, 10)
    assert cached.read(0, 0, 10) == bytes(10)
    assert store.noted() == ["blocks 000.tar", "read 000.tar 0 10"]


def test_an_evicted_file_is_closed_when_another_is_opened(cached):
    cached.download(0)
    cached.read(0, 0, 1)
    path = cached.cache.folder / cached.entries[0].name
    path.unlink()
    cached.download(1)
    cached.read(1, 0, 1)
    links = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{number}")]
    assert not [link for link in links if link.startswith(str(path))]


def test_errors_of_the_server_are_raised(cached, tmp_path):
    (tmp_path / "server" / "001.tar").unlink()
    with pytest.raises(MissingError, match=r"001\.tar is not there"):
        cached.read(1, 0, 1)
    with pytest.raises(MissingError, match=r"001\.tar is not there"):
        cached.download(1)


class TestWithoutRanges:
    @pytest.fixture
    def store(self, tmp_path):
        return FileStore(tmp_path / "notes", tmp_path / "gate", ranged=False)

    def test_processes_wait_for_one_download(self, cached, remote, store):
        def reads():
            assert cached.read(0, 200_000, 1000) == content(remote, 0, 200_000, 1000)

        processes = [fork.Process(target=reads, daemon=True) for _ in range(4)]
        for process in processes:
            process.start()
        wait_for(lambda: store.noted())
        time.sleep(0.3)
        assert all(process.is_alive() for process in processes)
        store.gate.touch()
        for process in processes:
            process.join(HANGS)
        assert [process.exitcode for process in processes] == [0] * 4
        assert store.noted() == ["blocks 000.tar"]

    def test_the_wait_is_bounded(self, store, tmp_path):
        cached = CachedShards(remote_of(store, tmp_path, timeout=0.3), tmp_path / "cache", 10**6)
        slow = threading.Thread(target=cached.read, args=(0, 0, 1))
        slow.start()
        wait_for(lambda: store.noted())
        with pytest.raises(StoreError, match=r"000\.tar cannot be read in parts, and was not in the cache .*cache "
                                             r"after 0\.3 s; raise --data\.timeout or --data\.cache_bytes"):
            cached.read(0, 0, 1)
        store.gate.touch()
        slow.join(HANGS)
        assert not slow.is_alive()

    def test_a_folder_that_cannot_be_written_is_told(self, remote, store, tmp_path):
        (tmp_path / "file").touch()
        cached = CachedShards(remote, tmp_path / "file" / "cache", 10**6)
        with pytest.raises(DataError, match=r"000\.tar cannot be read in parts, and not be kept in the cache .*: Not a "
                                            "directory; make room there or give another folder"):
            cached.read(0, 0, 1)

    def test_threads_that_read_more_shards_than_there_is_room_for_take_turns(self, store, tmp_path):
        urls = make_shards(tmp_path / "server", [100_000] * 8)
        remote = RemoteShards(urls, [store.stat(url) for url in urls], 10.0, store)
        cached = CachedShards(remote, tmp_path / "cache", 300_000)
        threading.Timer(0.5, store.gate.touch).start()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda shard: cached.read(shard, 99_000, 1000), range(8)))
        assert found == [content(remote, shard, 99_000, 1000) for shard in range(8)]
        assert len(store.noted()) < 20  # who waits for room asks for nothing

    def test_a_run_lets_go_of_its_own_shards_before_those_that_another_run_reads(self, remote, store, tmp_path):
        store.gate.touch()
        cached = CachedShards(remote, tmp_path / "cache", 599_999)
        cached.read(2, 0, 1)
        other = cached.cache.folder / f"{'0' * 32}.tar"
        other.write_bytes(bytes(200_000))
        os.utime(other, (time.time() - 60,) * 2)
        cached.read(0, 0, 1)
        assert other.exists() and cached.cache.find(cached.entries[2]) is None

    def test_a_shard_whose_bytes_are_in_doubt_comes_again_once(self, cached, remote, store):
        store.gate.touch()
        cached.read(0, 0, 1)
        path = cached.cache.folder / cached.entries[0].name
        for expected in (content(remote, 0, 5, 10), bytes(10)):
            path.write_bytes(bytes(SIZES[0]))
            cached.forget()
            assert cached.read(0, 5, 10) == expected
        assert store.noted() == ["blocks 000.tar"] * 2

    def test_a_cached_shard_that_cannot_be_opened_is_told_at_once(self, store, tmp_path):
        (tmp_path / "cache").mkdir()
        urls = make_shards(tmp_path / "server", [(tmp_path / "cache").stat().st_size])
        cached = CachedShards(RemoteShards(urls, [store.stat(urls[0])], 10.0, store), tmp_path / "cache", 10**6)
        (tmp_path / "cache" / cached.entries[0].name).mkdir()  # it has the size of the shard
        began = time.monotonic()
        with pytest.raises(DataError, match=r"000\.tar cannot be read in parts, and not be kept in the cache .*: it is "
                                            "no regular file; make room"):
            cached.read(0, 0, 1)
        assert time.monotonic() - began < 5

    def test_a_budget_below_a_shard_is_told(self, remote, tmp_path):
        with pytest.raises(DataError, match="has 300000 bytes, for which the cache .* no room among its 299999; raise"):
            CachedShards(remote, tmp_path / "cache", 299_999).read(0, 0, 1)


def test_threads_count_without_loss():
    traffic = Traffic()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2000):
            pool.submit(traffic.add, ranged_reads=1, ranged_bytes=3)
    assert (traffic.ranged_reads, traffic.ranged_bytes) == (2000, 6000)
    assert pickle.loads(pickle.dumps(traffic)).ranged_bytes == 6000


def test_a_fork_while_a_thread_counts_can_count():
    traffic = Traffic()
    with traffic._lock:
        process = fork.Process(target=traffic.add, kwargs={"downloads": 1}, daemon=True)
        process.start()
        process.join(HANGS)
    assert process.exitcode == 0


class TestOverHttp:
    """By the store that belongs to the URL."""

    CONTENT = bytes(range(256)) * 8000

    @pytest.fixture
    def server(self):
        with HttpServer({"/0.tar": self.CONTENT, "/1.tar": self.CONTENT[::-1]}) as server:
            yield server

    @pytest.fixture
    def cached(self, server, tmp_path):
        urls = [server.url(f"/{shard}.tar") for shard in range(2)]
        store = open_store(urls[0], 2.0)
        return CachedShards(RemoteShards(urls, [store.stat(url) for url in urls], 2.0), tmp_path / "cache", 10**7,
                            [hashlib.sha256(self.CONTENT).hexdigest(), None])

    def test_eight_processes_make_one_download(self, server, cached):
        starts = fork.Barrier(8)

        def races():
            starts.wait(10)
            while cached.download(0) is Outcome.LOCKED:
                time.sleep(0.005)
            assert cached.read(0, 1_000_001, 999) == self.CONTENT[1_000_001:1_001_000]

        server.forget()
        server.always(Lie(waits=0.2))
        processes = [fork.Process(target=races, daemon=True) for _ in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(HANGS)
        assert [process.exitcode for process in processes] == [0] * 8
        assert server.bytes_of == {"/0.tar": len(self.CONTENT)}

    def test_what_is_whole_needs_no_server(self, server, cached):
        cached.download(0)
        server.stop()
        assert cached.read(0, 5, 10) == self.CONTENT[5:15]
        with pytest.raises(StoreError, match=r"1\.tar"):
            cached.read(1, 5, 10)
        server.start()
        assert cached.read(1, 5, 10) == self.CONTENT[::-1][5:15]

    def test_a_shard_that_is_replaced_is_never_mixed(self, server, cached):
        cached.download(0)
        server.content["/0.tar"] = server.content["/1.tar"] = bytes(len(self.CONTENT))
        assert cached.read(0, 5, 10) == self.CONTENT[5:15]  # those that the run has begun with
        for read in (lambda: cached.read(1, 5, 10), lambda: cached.download(1)):
            with pytest.raises(StoreError, match="changed on the server"):
                read()
        assert [path.name for path in cached.cache.folder.glob("*.tar")] == [cached.entries[0].name]

    def test_an_answer_that_breaks_off_is_gone_on_with(self, server, cached):
        server.lie(Lie(sends=700_000, ends="reset"))
        assert cached.download(0) is Outcome.DOWNLOADED
        assert cached.read(0, 699_000, 2000) == self.CONTENT[699_000:701_000]
