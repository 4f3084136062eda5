"""Downloads ahead of the readers, in order of next use and within the budget; what fails is told and does no harm."""

import logging
import multiprocessing
import re
import threading
import time

import numpy as np
import pytest

from tests.support.file_store import FileStore, make_shards
from tests.support.small_disk import small_disk  # noqa: F401
from tests.support.waiting import HANGS, wait_for
from vir.data import prefetch
from vir.data.cache import Uses
from vir.data.order import SampleOrder
from vir.data.prefetch import Prefetcher
from vir.data.remote_shards import CachedShards, RemoteShards
from vir.data.traffic import node_shards

SHARDS, SAMPLES, BYTES, BATCH = 24, 50, 10_000, 20
STEPS = SHARDS * SAMPLES // BATCH
ORDER = SampleOrder(0, [SAMPLES] * SHARDS, 2, 50)
fork = multiprocessing.get_context("fork")


def needs(first, last, order=ORDER):
    return node_shards(order, [SAMPLES] * SHARDS, first_step=first, last_step=last, global_batch_size=BATCH,
                       ranks=range(1), world_size=1)


def cached_of(tmp_path, budget_bytes, shards=SHARDS, sha256s=(), store=None, folder=None, size=BYTES):
    urls = make_shards(tmp_path / "server", [size] * shards)
    store = store or FileStore(tmp_path / "notes")
    remote = RemoteShards(urls, [store.stat(url) for url in urls], 5.0, store)
    return CachedShards(remote, folder or tmp_path / "cache", budget_bytes, sha256s)


def prefetcher_of(cached, uses=needs, last_step=2 * STEPS):
    return Prefetcher(cached, uses, (SAMPLES,) * SHARDS, global_batch_size=BATCH, steps_per_epoch=STEPS,
                      last_step=last_step)


def present(cached):
    return {shard for shard, entry in enumerate(cached.entries) if cached.cache.find(entry)}


def settled(prefetcher):
    """It has seen the step, and nothing was under way or begun in three rounds, of which two have the full wait between
    them: what was put off for the time of a wait has had its turn."""
    may_be_old = prefetcher.rounds + 1  # one under way, which may have seen the step before
    wait_for(lambda: prefetcher.rounds >= max(may_be_old, prefetcher.last_busy) + 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(prefetch, "_PAUSE_S", 0.002)
    monkeypatch.setattr(prefetch, "_POLL_S", 0.01)
    for name in ("rounds", "last_busy", "begun"):
        monkeypatch.setattr(prefetch.Prefetcher, name, 0, raising=False)
    all_of_them = []

    def counted(self, begin=prefetch.Prefetcher._begin_downloads):
        begun, busy = self.begun, any(thread.name == "download" for thread in threading.enumerate())
        begin(self)
        if busy or self.begun > begun:
            self.last_busy = self.rounds + 1
        self.rounds += 1

    def is_due(self, shard, is_due=prefetch.Prefetcher._is_due):
        found = is_due(self, shard)
        self.begun += found
        return found

    def noted(self, *arguments, initialize=prefetch.Prefetcher.__init__, **named):
        initialize(self, *arguments, **named)
        all_of_them.append(self)

    monkeypatch.setattr(prefetch.Prefetcher, "_begin_downloads", counted)
    monkeypatch.setattr(prefetch.Prefetcher, "_is_due", is_due)
    monkeypatch.setattr(prefetch.Prefetcher, "__init__", noted)
    yield
    for prefetcher in all_of_them:  # one that a failure has left would disturb the tests after it
        prefetcher.close()
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name in ("prefetch", "download")])


def test_an_epoch_from_a_small_cache(tmp_path):
    """After each step all that the next ones need is there; in two epochs hardly more than two downloads a shard, of
    which hardly one is begun for which there is no room."""
    store = FileStore(tmp_path / "notes")
    cached = cached_of(tmp_path, 9 * BYTES, store=store)
    prefetcher = prefetcher_of(cached)
    for step in range(2 * STEPS):
        prefetcher.advance(step * BATCH)
        settled(prefetcher)
        rows = needs(step, step + 1)
        assert set(rows.shards[rows.counts > 3].tolist()) <= present(cached), step
        assert sum(path.stat().st_size for path in cached.cache.folder.iterdir()) <= 9 * BYTES
        for shard in rows.shards.tolist():
            cached.read(shard, 0, 10)
    prefetcher.close(HANGS)
    traffic = cached.traffic
    assert 2 * SHARDS - 9 <= traffic.downloads <= 2.2 * SHARDS
    begun = sum(line.startswith("blocks") for line in store.noted())
    assert traffic.downloads <= begun <= traffic.downloads + 2
    assert traffic.evictions == traffic.downloads - len(present(cached))
    assert traffic.downloaded_bytes == traffic.downloads * BYTES
    assert traffic.ranged_reads < 0.02 * 2 * STEPS * 3


def test_it_looks_ahead_as_far_as_the_budget_goes_and_resumes_anywhere(tmp_path):
    cached = cached_of(tmp_path, 10 * BYTES)
    prefetcher = prefetcher_of(cached)
    prefetcher.advance(17 * BATCH + 3)
    settled(prefetcher)
    soonest, rows = [], needs(16, 3 * STEPS)
    for shard in rows.shards.tolist():
        if shard not in soonest:
            soonest.append(shard)
    prefetcher.close(HANGS)
    assert present(cached) == set(soonest[:10])


def test_room_for_all_makes_one_download_of_each(tmp_path):
    cached = cached_of(tmp_path, SHARDS * BYTES)
    prefetcher = prefetcher_of(cached)
    for step in range(0, STEPS, 7):
        prefetcher.advance(step * BATCH)
        settled(prefetcher)
    prefetcher.close(HANGS)
    assert present(cached) == set(range(SHARDS)) and cached.traffic.downloads == SHARDS


def test_at_most_eight_at_a_time_and_close_does_not_wait(tmp_path):
    store = FileStore(tmp_path / "notes", tmp_path / "gate")
    cached = cached_of(tmp_path, SHARDS * 100_000, store=store, size=100_000)
    prefetcher = prefetcher_of(cached)
    prefetcher.advance(0)
    wait_for(lambda: len(store.noted()) == 8)
    time.sleep(0.2)
    assert len(store.noted()) == 8
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < HANGS / 5  # the gate is shut
    prefetcher.advance(10**6)
    store.gate.touch()
    wait_for(lambda: not prefetcher._under_way)
    assert len(store.noted()) == 8 and len(present(cached)) == 8


def test_advance_does_not_wait_for_the_order(tmp_path):
    gate = threading.Event()

    def slow(first, last):
        gate.wait(HANGS)
        return needs(first, last)

    prefetcher = prefetcher_of(cached_of(tmp_path, 9 * BYTES), slow)
    start = time.monotonic()
    for step in range(5):
        prefetcher.advance(step * BATCH)
    assert time.monotonic() - start < HANGS / 5
    gate.set()
    prefetcher.close(HANGS)


def test_two_runs_on_a_node_download_once(tmp_path):
    urls = make_shards(tmp_path / "server", [BYTES] * SHARDS)
    store = FileStore(tmp_path / "notes")
    identities = [store.stat(url) for url in urls]

    def one():
        cached = CachedShards(RemoteShards(urls, identities, 5.0, store), tmp_path / "cache", SHARDS * BYTES)
        prefetcher = prefetcher_of(cached)
        prefetcher.advance(0)
        wait_for(lambda: len(present(cached)) == SHARDS)
        prefetcher.close(HANGS)

    processes = [fork.Process(target=one, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(store.noted()) == [f"blocks {shard:03}.tar" for shard in range(SHARDS)]


def test_a_shard_that_another_run_removed_is_not_downloaded_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "_LOOK_S", 0.0)
    cached = cached_of(tmp_path, SHARDS * BYTES)
    prefetcher = prefetcher_of(cached)
    prefetcher.advance(0)
    settled(prefetcher)
    (cached.cache.folder / cached.entries[3].name).unlink()
    settled(prefetcher)
    prefetcher.close(HANGS)
    assert cached.traffic.downloads == SHARDS and 3 not in present(cached)


def test_a_shard_that_goes_while_it_is_looked_at_is_downloaded_again(tmp_path, monkeypatch):
    """By other threads, for shards that are needed sooner: a moment after it was found, or was downloaded."""
    cached = cached_of(tmp_path, SHARDS * BYTES)
    prefetcher = prefetcher_of(cached)

    def gone_after(call):
        def called(*arguments):
            found = call(*arguments)
            cached.cache.remove(cached.entries[3])
            prefetcher._let_go(cached.entries[3].name)
            return found
        return called

    monkeypatch.setattr(cached, "download", gone_after(cached.download))
    prefetcher._under_way[3] = threading.current_thread()
    prefetcher._download(3, Uses())
    assert prefetcher._is_due(3) and cached.traffic.downloads == 1
    cached.cache.fill(cached.entries[3], lambda: cached.remote.blocks(3))
    monkeypatch.setattr(cached.cache, "touch", gone_after(cached.cache.touch))
    assert not prefetcher._is_due(3)
    assert prefetcher._is_due(3)


def test_a_server_that_fails_is_told_once_and_asked_again_later(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(prefetch, "_PENALTY_S", 0.3)
    cached = cached_of(tmp_path, SHARDS * BYTES)
    (tmp_path / "server").rename(tmp_path / "away")
    prefetcher, failed = prefetcher_of(cached), set()
    monkeypatch.setattr(prefetcher, "_wait_after", lambda shard, error, wait=prefetcher._wait_after: (
        failed.add(shard) or wait(shard, error)))
    with caplog.at_level(logging.WARNING, "vir"):
        prefetcher.advance(0)
        wait_for(lambda: len(failed) == SHARDS)
    assert len(caplog.records) == 1
    assert ".tar is not there; it is not cached for 0 s" in caplog.text
    (tmp_path / "away").rename(tmp_path / "server")
    wait_for(lambda: len(present(cached)) == SHARDS)
    prefetcher.close(HANGS)


def test_a_wrong_checksum_is_tried_twice_and_told_once(tmp_path, caplog):
    cached = cached_of(tmp_path, SHARDS * BYTES, sha256s=["00"] + [None] * (SHARDS - 1))
    prefetcher = prefetcher_of(cached)
    prefetcher.advance(0)
    settled(prefetcher)
    settled(prefetcher)
    prefetcher.close(HANGS)
    assert cached.remote._store(0).noted().count("blocks 000.tar") == 2
    assert [record.message for record in caplog.records if "it is read in parts instead" in record.message
            and "000.tar has the SHA-256" in record.message] == [record.message for record in caplog.records] != []
    assert present(cached) == set(range(1, SHARDS))


def test_a_budget_below_a_shard_is_told(tmp_path, caplog):
    cached = cached_of(tmp_path, BYTES - 1)
    prefetcher = prefetcher_of(cached)
    prefetcher.advance(0)
    settled(prefetcher)
    prefetcher.close(HANGS)
    assert [record.message for record in caplog.records] == [
        f"the cache {tmp_path / 'cache'} has {BYTES - 1} bytes, too few for one shard; all is read in parts from the "
        "server; raise --data.cache_bytes"]


def test_a_full_disk_is_told_once_and_used_as_it_is(tmp_path, small_disk, caplog):  # noqa: F811
    """1 MB has room for five shards of 200,000 bytes; an epoch goes on with those."""
    cached = cached_of(tmp_path, 10**9, folder=small_disk / "cache", size=200_000)
    prefetcher = prefetcher_of(cached)
    for step in range(STEPS):
        prefetcher.advance(step * BATCH)
        settled(prefetcher)
    prefetcher.close(HANGS)
    (said,) = [record.message for record in caplog.records]
    assert re.fullmatch(rf"the disk of the cache {small_disk / 'cache'} has room for only \d+ of the 1000000000 bytes "
                        "that the cache may have; make room there, or give another --data.cache", said), said
    assert cached.cache.budget_bytes == 10**9
    assert cached.traffic.downloads > SHARDS * 0.5 and len(present(cached)) <= 5


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    cached = cached_of(tmp_path, 10**9, folder=tmp_path / "file" / "cache")
    prefetcher = prefetcher_of(cached)
    prefetcher.advance(0)
    settled(prefetcher)
    prefetcher.close(HANGS)
    assert len(caplog.records) == 1 and "takes no more: Not a directory" in caplog.text
    assert len(cached.read(0, 0, 10)) == 10


def test_a_defect_is_told_and_the_reader_goes_on(tmp_path, caplog):
    def broken(first, last):
        raise ZeroDivisionError("division")

    prefetcher = prefetcher_of(cached_of(tmp_path, 10**6), broken)
    prefetcher.advance(0)
    prefetcher._thread.join(HANGS)
    prefetcher.advance(BATCH)
    prefetcher.close(HANGS)
    assert [record.message for record in caplog.records] == [
        "nothing more is downloaded ahead: ZeroDivisionError: division"]


@pytest.mark.parametrize("first", [0, 11, 59])
def test_looking_ahead_in_spans_sees_what_is_needed(first):
    calls = []

    def uses(first, last):
        calls.append((first, last))
        return needs(first, last)

    ahead = prefetch._Ahead(uses, SHARDS, STEPS, 3 * STEPS - 5)
    for step in [*range(first, 3 * STEPS), first + 200]:
        seen = ahead.seen_from(step).steps(step)
        rows = needs(step, max(step, min(step + STEPS, 3 * STEPS - 5)))
        shards, at = np.unique(rows.shards, return_index=True)
        assert (seen[shards] == rows.steps[at]).all()
    assert sum(last - begin for begin, last in calls) == 3 * STEPS - 5 - first  # each step once


def test_it_starts_in_the_process_that_advances(tmp_path):
    cached = cached_of(tmp_path, SHARDS * BYTES)
    prefetcher = prefetcher_of(cached)

    def child():
        prefetcher.advance(0)
        wait_for(lambda: len(present(cached)) == SHARDS)

    process = fork.Process(target=child, daemon=True)  # which ends without close
    process.start()
    process.join(HANGS)
    assert process.exitcode == 0 and prefetcher._thread is None
