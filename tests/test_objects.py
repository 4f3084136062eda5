"""Objects by fsspec: a real S3-speaking server, servers that lie as S3 and Google Cloud Storage, and which store has
which URL."""

import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import fsspec
import pytest

from support.http_server import HttpServer, Lie
from support.s3_server import ENVIRONMENT, S3Server
from vir.data.executors import Stopped, run_threads
from vir.data.stores import objects, retries
from vir.data.stores.choose import open_store
from vir.data.stores.http import HttpStore
from vir.data.stores.objects import PACKAGES, ObjectStore, try_to_import
from vir.data.stores.store import MAX_BLOCK, Identity, MissingError, StoreError
from vir.errors import SettingsError

CONTENT = random.Random(0).randbytes(1_000_000)
KEY = "shards/größe a+b.tar"
TIMEOUT = 20.0


@pytest.fixture(scope="module")
def s3():
    with S3Server() as server:
        server.upload(KEY, CONTENT)
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def store(s3):
    """One for all tests: a new one takes time to get to know S3."""
    return ObjectStore("s3", TIMEOUT)


@pytest.fixture(scope="module")
def misled():
    """A server that may lie, and a store that takes it for S3."""
    with HttpServer({"/bucket/a.tar": CONTENT}) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}.items():
            patch.setenv(name, value) if value is not None else patch.delenv(name, raising=False)
        store = ObjectStore("s3", TIMEOUT)
        store.stat("s3://bucket/a.tar")  # looks into the environment
        patch.undo()
        yield server, store


@pytest.fixture
def lying(misled):
    server, store = misled
    server.always(None)
    server.forget()
    yield server
    store._timeout = TIMEOUT


def opened(misled, timeout=TIMEOUT):
    server, store = misled
    identity = store.stat("s3://bucket/a.tar")
    server.forget()
    store._timeout = timeout
    return store, "s3://bucket/a.tar", identity


def test_honest_answers(s3, store):
    url = s3.url(KEY)
    identity = store.stat(url)
    assert identity == Identity(len(CONTENT), f'"{hashlib.md5(CONTENT).hexdigest()}"', ranged=True)
    for offset, size in ((0, 1), (17, 100_000), (len(CONTENT) - 5, 5), (0, len(CONTENT)), (9, 0)):
        assert store.read(url, offset, size, identity) == CONTENT[offset:offset + size]
    assert b"".join(store.blocks(url, identity)) == CONTENT
    assert ObjectStore("s3a", TIMEOUT).stat(url.replace("s3://", "s3a://")) == identity
    with pytest.raises(StoreError, match=f"has {len(CONTENT)} bytes, so none at {len(CONTENT)} to {len(CONTENT) + 1}"):
        store.read(url, len(CONTENT), 1, identity)


def test_blocks_have_at_most_8_mb(s3, store):
    content = random.Random(1).randbytes(MAX_BLOCK + 7)
    url = s3.upload("big", content)
    blocks = list(store.blocks(url, store.stat(url)))
    assert [len(block) for block in blocks] == [MAX_BLOCK, 7] and b"".join(blocks) == content


def test_an_empty_object(s3, store):
    url = s3.upload("empty", b"")
    identity = store.stat(url)
    assert identity.size == 0 and list(store.blocks(url, identity)) == []


def test_names_are_those_of_now(s3, store):
    for key in ("list/b.tar", "list/a.tar", "list/c/d.tar", "list/"):
        s3.upload(key, b"x")
    assert store.names(s3.url("list")) == store.names(s3.url("list/")) == ["a.tar", "b.tar"]
    s3.upload("list/0.tar", b"x")
    s3.remove("list/b.tar")
    assert store.names(s3.url("list")) == ["0.tar", "a.tar"]
    with pytest.raises(MissingError, match="s3://bucket/nothing does not exist; see whether bucket and path"):
        store.names(s3.url("nothing"))


def test_what_is_not_there(s3, store):
    for url in (s3.url("no.tar"), "s3://no-bucket/a.tar"):
        with pytest.raises(MissingError, match=f"{url} does not exist; see whether bucket and path are right"):
            store.stat(url)
        with pytest.raises(MissingError, match=f"{url} does not exist"):
            store.read(url, 0, 5, Identity(10, '"x"'))
    with pytest.raises(MissingError, match="s3://bucket/shards is a folder, not a file"):
        store.stat(s3.url("shards"))


def test_another_object_is_told_at_once(s3, store):
    url = s3.upload("changes", b"a" * 100)
    identity = store.stat(url)
    s3.upload("changes", b"b" * 100)
    for call in (lambda: store.read(url, 5, 10, identity), lambda: list(store.blocks(url, identity))):
        with pytest.raises(StoreError, match=f"{url} has changed on the server since it was first seen; make"):
            call()
    s3.upload("changes", b"b" * 3)
    with pytest.raises(StoreError, match="has changed"):
        store.read(url, 50, 10, store.stat(url)._replace(size=100))


def test_many_threads_share_a_store(s3, store):
    url = s3.url(KEY)
    identity = store.stat(url)
    offsets = [random.Random(number).randrange(len(CONTENT) - 9000) for number in range(100)]
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda offset: store.read(url, offset, 9000, identity), offsets, timeout=60))
    assert parts == [CONTENT[offset:offset + 9000] for offset in offsets]


def _read_in_child(store, url, identity, results):
    results.put([store.read(url, 100, 50, identity), store.stat(url), sum(map(len, store.blocks(url, identity)))])


def test_forked_children_use_a_store_that_their_parent_uses(s3, store):
    url = s3.url(KEY)
    identity = store.stat(url)
    stop = threading.Event()

    def use():
        while not stop.is_set():
            assert store.read(url, 0, 10, identity) == CONTENT[:10]

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with ThreadPoolExecutor(2) as pool:
        using = [pool.submit(use) for _ in range(2)]
        try:
            children = [context.Process(target=_read_in_child, args=(store, url, identity, results)) for _ in range(2)]
            for child in children:
                child.start()
            found = [results.get(timeout=60) for _ in children]
            for child in children:
                child.join(timeout=30)
        finally:
            stop.set()
        for used in using:
            used.result(timeout=30)
    assert found == [[CONTENT[100:150], identity, len(CONTENT)]] * 2
    assert [child.exitcode for child in children] == [0] * 2


SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
PASSING = [Lie(status=500), Lie(status=503, headers={"Retry-After": "0"}), Lie(status=429), Lie(sends=50_000),
           Lie(sends=50_000, ends="reset"), Lie(sends=0), Lie(sends=50_000, counted=False), Lie(sends=9, chunked=True),
           Lie(body=CONTENT[:9], headers={"Content-Length": "9"}), Lie(more=b"x" * 9), Lie(ranged=False)]


@pytest.mark.parametrize("lie", PASSING, ids=range(len(PASSING)))
def test_what_passes_is_tried_again(lying, misled, lie):
    store, url, identity = opened(misled)
    lying.lie(lie, lie)
    assert store.read(url, 1000, 200_000, identity) == CONTENT[1000:201_000]
    assert [request.method for request in lying.requests] == ["GET"] * 3
    assert {request.headers["if-match"] for request in lying.requests} == {identity.tag}


def test_no_other_layer_tries_by_itself(lying, misled):
    """They would not wait as long as they are asked to."""
    store, url, identity = opened(misled)
    lying.lie(Lie(status=503, body=SLOW_DOWN, headers={"Content-Length": str(len(SLOW_DOWN)), "Retry-After": "1"}))
    began = time.monotonic()
    assert store.read(url, 0, 9, identity) == CONTENT[:9]
    assert time.monotonic() - began >= 1


def test_stat_is_tried_again(lying, misled):
    store, url, identity = opened(misled)
    lying.lie(Lie(status=503), Lie(status=500))
    assert store.stat(url) == identity and len(lying.requests) == 3


@pytest.mark.parametrize("lie", [Lie(sends=50_000, ends="stall"), Lie(waits=60.0), Lie(bytes_per_second=20_000)])
def test_whoever_is_silent_or_slow_is_asked_anew(lying, misled, lie, monkeypatch):
    monkeypatch.setattr(retries, "WINDOW", 0.2)
    monkeypatch.setattr(objects, "FLOOR", 10 ** 6)
    store, url, identity = opened(misled)
    lying.lie(lie)
    began = time.monotonic()
    assert store.read(url, 1000, 200_000, identity) == CONTENT[1000:201_000]
    assert 0.35 < time.monotonic() - began < 8


@pytest.mark.parametrize("lie", [Lie(status=503, headers={"Retry-After": "3600"}), Lie(sends=0, ends="stall"),
                                 Lie(waits=60.0), Lie(sends=1000)])
def test_never_a_hang_beyond_the_timeout(lying, misled, lie):
    store, url, identity = opened(misled, timeout=0.2)
    lying.always(lie)
    for call in (lambda: store.read(url, 0, 400_000, identity), lambda: list(store.blocks(url, identity))):
        began = time.monotonic()
        with pytest.raises(StoreError, match="for 0.2 s failed as well; see whether the server.*--data.timeout"):
            call()
        assert 0.1 < time.monotonic() - began < 10


@pytest.mark.parametrize("lie", [Lie(status=503, headers={"Retry-After": "60"}), Lie(sends=50_000, ends="stall")])
def test_a_request_to_stop_ends_it(lying, misled, lie):
    store, url, identity = opened(misled)
    lying.always(lie)
    began = time.monotonic()
    with pytest.raises(Stopped):
        list(run_threads(lambda size: store.read(url, 0, size, identity), [200_000], 1,
                         lambda: time.monotonic() - began > 0.1))
    assert time.monotonic() - began < 5


def test_an_endpoint_that_is_not_there(lying, misled):
    store, url, identity = opened(misled, timeout=0.3)
    lying.stop()
    with pytest.raises(StoreError, match=r"s3://bucket/a.tar gave no whole answer \(\w+\), and what else was tried"):
        store.stat(url)
    lying.start()
    assert store.stat(url) == identity


@pytest.mark.parametrize("status, message", [
    (403, r"is refused \(403\): set AWS_ACCESS_KEY_ID and .*AWS_PROFILE.*FSSPEC_S3_ANON=true"),
    (401, r"is refused \(401\)"),
    (404, "does not exist"), (412, "has changed"), (416, "has changed"), (400, "cannot be read: 400")])
def test_what_does_not_pass_is_told_at_once(lying, misled, status, message):
    store, url, identity = opened(misled)
    lying.always(Lie(status=status))
    with pytest.raises(StoreError, match=f"s3://bucket/a.tar {message}") as caught:
        store.read(url, 0, 5, identity)
    assert isinstance(caught.value, MissingError) == (status == 404)
    assert len(lying.requests) == 1 and "secret" not in str(caught.value)


def fresh(code, **environment):
    """What python prints in a process whose environment has no more of AWS, fsspec and Google than this."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_", "GOOGLE_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={
        **base, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "NO_GCE_CHECK": "true", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STAT = """
import time
from vir.data.stores.choose import open_store
from vir.data.stores.store import StoreError
store, began = open_store({0!r}, 30.0), time.monotonic()
try:
    print(store.stat({0!r}).size)
except StoreError as error:
    print(f"{{time.monotonic() - began}} s: {{error}}")
"""


def test_without_credentials(s3):
    code = STAT.format(s3.url(KEY))
    endpoint = {"AWS_ENDPOINT_URL": s3.endpoint}
    told = fresh(code, **endpoint)
    told = told.split(" s: ", 1)[1]
    assert told.startswith(f"{s3.url(KEY)} is refused (NoCredentialsError): set AWS_ACCESS_KEY_ID and "), told
    assert fresh(code, **endpoint, FSSPEC_S3_ANON="true") == str(len(CONTENT))
    style = json.dumps({"config_kwargs": {"s3": {"addressing_style": "path"}}})
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    assert fresh(code, FSSPEC_S3=style, FSSPEC_S3_ENDPOINT_URL=s3.endpoint, **keys) == str(len(CONTENT))


def test_a_library_that_looks_long_for_credentials():
    with HttpServer({}) as metadata:  # Google's library asks it where it has found nothing else
        metadata.always(Lie(waits=60.0))
        told = fresh(STAT.format("gs://bucket/a.tar").replace("30.0", "1.0"), NO_GCE_CHECK="", HOME=os.devnull,
                     GCE_METADATA_HOST=f"127.0.0.1:{metadata.port}", GCE_METADATA_IP=f"127.0.0.1:{metadata.port}")
    took, told = told.split(" s: ", 1)
    assert "while credentials were looked for: run gcloud auth application-default login" in told
    assert "tried for 1 s failed" in told and float(took) < 2


def google(content, key="a b.tar", generation="1"):
    """The two answers of Google's server that are asked for, by path."""
    item = {"kind": "storage#object", "name": key, "bucket": "bucket", "generation": generation, "size": len(content),
            "updated": "2020-01-01T00:00:00Z", "timeCreated": "2020-01-01T00:00:00Z", "etag": f"etag-{generation}"}
    return {f"/storage/v1/b/bucket/o/{quote(key)}": json.dumps(item).encode(),
            f"/download/storage/v1/b/bucket/o/{quote(key)}": content}


def test_google_cloud_storage(monkeypatch):
    with HttpServer(google(CONTENT)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.port}")
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        store, url = ObjectStore("gs", TIMEOUT), "gs://bucket/a b.tar"
        identity = store.stat(url)
        assert (identity.size, identity.ranged) == (len(CONTENT), True) and identity.tag
        server.lie(Lie(status=503), Lie(sends=1000))
        assert store.read(url, 17, 1000, identity) == CONTENT[17:1017]
        assert b"".join(store.blocks(url, identity)) == CONTENT
        server.content.update(google(CONTENT[::-1], generation="2"))
        with pytest.raises(StoreError, match="has changed"):
            list(store.blocks(url, identity))
        server.always(Lie(status=403))
        with pytest.raises(StoreError, match=r"gs://bucket/a b.tar is refused \(.*FSSPEC_GS_TOKEN=anon"):
            store.read(url, 17, 1000, identity)
        server.always(Lie(status=404))
        with pytest.raises(MissingError, match="gs://bucket/a b.tar does not exist"):
            store.stat(url)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.pipe("/folder/a.tar", CONTENT)
    yield system
    system.rm("/folder", recursive=True)


def test_any_other_file_system(memory):
    store, url = ObjectStore("memory", TIMEOUT), "memory://folder/a.tar"
    identity = store.stat(url)
    assert identity.size == len(CONTENT) and store.read(url, 5, 100, identity) == CONTENT[5:105]
    assert b"".join(store.blocks(url, identity)) == CONTENT
    assert store.names("memory://folder") == ["a.tar"]
    with pytest.raises(MissingError, match="memory://folder/b.tar does not exist"):
        store.stat("memory://folder/b.tar")
    blocks = store.blocks(url, identity)
    next(blocks)
    memory.pipe("/folder/a.tar", CONTENT)  # the same bytes at another time may be other ones
    with pytest.raises(StoreError, match="memory://folder/a.tar has changed on the server"):
        next(blocks)
    memory.pipe("/folder/a.tar", CONTENT[:50])
    with pytest.raises(StoreError, match="sent 45 bytes when asked for 100, and what else was tried for 0.2 s"):
        ObjectStore("memory", 0.2).read(url, 5, 100, identity)


class Slow(type(fsspec.filesystem("memory"))):
    """Takes its time, and counts how many do so at once."""

    at_once = most = 0
    seconds = 0.04

    def cat_file(self, *arguments, **named):
        Slow.at_once += 1
        Slow.most = max(Slow.most, Slow.at_once)
        time.sleep(self.seconds)
        Slow.at_once -= 1
        return super().cat_file(*arguments, **named)


@pytest.mark.parametrize("scheme, most", [("memory", 4), ("sftp", 1)])
def test_connections_that_are_not_for_threads_are_used_by_one(memory, monkeypatch, scheme, most):
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: Slow)
    monkeypatch.setattr(Slow, "most", 0)
    store = ObjectStore(scheme, TIMEOUT)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda place: store.read("memory://folder/a.tar", place, 9, Identity(99, "")), range(8)))
    assert parts == [CONTENT[place:place + 9] for place in range(8)] and Slow.most == most


def test_a_library_that_hangs_is_left(memory, monkeypatch):
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: Slow)
    monkeypatch.setattr(Slow, "seconds", 3.0)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"gave no whole answer \(TimeoutError\), and what else was tried for 0.3 s"):
        ObjectStore("memory", 0.3).read("memory://folder/a.tar", 0, 9, Identity(99, ""))
    assert time.monotonic() - began < 2.5
    time.sleep(3.0 - (time.monotonic() - began) + 0.3)  # its thread ends


def test_which_store_has_which_url():
    assert isinstance(open_store("https://h/a", 5.0), HttpStore)
    assert isinstance(open_store("S3://b/a", 5.0), ObjectStore)
    assert open_store("http://a/b", 5.0) is open_store("HTTPS://c/d", 5.0) is not open_store("http://a/b", 6.0)
    assert open_store("s3://a/b", 5.0) is open_store("s3://c/d", 5.0) is not open_store("gs://c/d", 5.0)
    for scheme in ("file", "local", "simplecache", "reference", "github", "git", "jupyter", "dask", "zip", "x"):
        with pytest.raises(SettingsError, match=rf"'{scheme}://\*\*\*@h/a' is on no server that data is read from; "
                                                "known are abfs, .*, gs, .*https, .*s3, "):
            open_store(f"{scheme}://user:secret@h/a", 5.0)
    with pytest.raises(SettingsError, match="'/a/b' is on no server"):
        open_store("/a/b", 5.0)


def test_a_missing_package_is_named():
    """Those that are not installed here, and the extras as if they were not."""
    code = ("import sys\nsys.modules['s3fs'] = sys.modules['gcsfs'] = None\n"
            "from vir.data.stores.choose import open_store\nfrom vir.errors import SettingsError\n"
            "for url in ('s3://b/a', 'gs://b/a'):\n    try:\n        open_store(url, 5.0)\n"
            "    except SettingsError as error:\n        print(error)\n")
    assert fresh(code).splitlines() == [
        "s3:// needs a package that is not installed: pip install 'vir-at-scale[s3]'",
        "gs:// needs a package that is not installed: pip install 'vir-at-scale[gcs]'"]
    for scheme, package in PACKAGES.items():
        try:
            try_to_import(scheme)
        except SettingsError as error:
            assert str(error) == f"{scheme}:// needs a package that is not installed: pip install {package}"
