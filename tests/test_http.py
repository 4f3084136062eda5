"""HTTP servers: each way in which they can lie, against the bytes that they have."""

import hashlib
import os
import random
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.http_server import HttpServer, Lie
from vir.data.executors import Stopped, run_threads
from vir.data.stores import connections, http, retries
from vir.data.stores.http import HttpStore
from vir.data.stores.retries import PassingError, persist, retry_after
from vir.data.stores.store import MAX_BLOCK, Identity, MissingError, StoreError

CONTENT = random.Random(0).randbytes(3_000_000)
PATH = "/shards/a.tar"
TIMEOUT = 20.0


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Short waits, no login of this user, no proxy of this host."""
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def impatient(monkeypatch):
    """Towards servers that are silent or slow."""
    for module in (http, connections, retries):
        monkeypatch.setattr(module, "WINDOW", 0.15)


@pytest.fixture
def server():
    with HttpServer({PATH: CONTENT}) as server:
        yield server


def opened(server, timeout=TIMEOUT):
    """A store, the URL, and its identity; nothing counted."""
    store, url = HttpStore(timeout), server.url(PATH)
    identity = store.stat(url)
    server.forget()
    return store, url, identity


def whole(store, url, identity):
    return b"".join(store.blocks(url, identity))


def test_honest_answers(server):
    store, url, identity = opened(server)
    assert identity == Identity(len(CONTENT), f'"{hashlib.md5(CONTENT).hexdigest()}"', ranged=True)
    for offset, size in ((0, 1), (17, 100_000), (len(CONTENT) - 5, 5), (0, len(CONTENT))):
        assert store.read(url, offset, size, identity) == CONTENT[offset:offset + size]
    assert whole(store, url, identity) == CONTENT
    assert store.names(url) is None
    assert server.bytes == 1 + 100_000 + 5 + 2 * len(CONTENT)
    assert len({request.connection for request in server.requests}) == 1
    assert {request.headers["accept-encoding"] for request in server.requests} == {"identity"}
    assert store.read(url, 5, 0, identity) == b"" and len(server.requests) == 5


def test_blocks_have_at_most_8_mb(server):
    server.content["/big"] = content = random.Random(1).randbytes(2 * MAX_BLOCK + 7)
    store, url = HttpStore(TIMEOUT), server.url("/big")
    blocks = list(store.blocks(url, store.stat(url)))
    assert [len(block) for block in blocks] == [MAX_BLOCK, MAX_BLOCK, 7] and b"".join(blocks) == content
    assert len(server.requests) == 2  # one answer for all blocks


def test_blocks_that_are_not_wanted_any_more_close_their_answer(server):
    store, url, identity = opened(server)
    blocks = store.blocks(url, identity)
    next(blocks)
    blocks.close()
    assert store.read(url, 3, 4, identity) == CONTENT[3:7]


def test_an_empty_object(server):
    server.content["/empty"] = b""
    store, url = HttpStore(TIMEOUT), server.url("/empty")
    identity = store.stat(url)
    assert identity.size == 0 and whole(store, url, identity) == store.read(url, 0, 0, identity) == b""


@pytest.mark.parametrize("offset, size", [(-1, 5), (len(CONTENT) - 3, 4), (5, -2)])
def test_a_part_that_is_not_there(server, offset, size):
    store, url, identity = opened(server)
    with pytest.raises(StoreError, match=f"has {len(CONTENT)} bytes, so none at {offset} to {offset + size}.*index"):
        store.read(url, offset, size, identity)
    assert not server.requests


PASSING = {
    "500": Lie(status=500), "503": Lie(status=503, headers={"Retry-After": "0"}), "429": Lie(status=429),
    "408": Lie(status=408), "425": Lie(status=425), "cut": Lie(sends=50_000), "reset": Lie(sends=50_000, ends="reset"),
    "nothing": Lie(sends=0), "stall": Lie(sends=50_000, ends="stall"), "silent": Lie(waits=0.35),
    "cut, not counted": Lie(sends=50_000, counted=False), "cut chunk": Lie(sends=50_000, chunked=True),
    "too long": Lie(more=b"x" * 10), "too long, not counted": Lie(more=b"x" * 10, counted=False),
    "too long, chunked": Lie(more=b"x" * 10, chunked=True), "too short": Lie(headers={"Content-Length": "99"}),
    "wrong range": Lie(shift=100), "no range": Lie(headers={"Content-Range": None}),
    "nonsense for a range": Lie(headers={"Content-Range": "bytes a-b/c"}), "all of it": Lie(ranged=False),
    "slow": Lie(bytes_per_second=20_000),
}


WAITING = ("stall", "silent", "slow")


@pytest.mark.parametrize("name", [name for name in PASSING if name not in WAITING])
def test_what_passes_is_tried_again(server, name):
    store, url, identity = opened(server)
    server.lie(PASSING[name], PASSING[name])
    assert store.read(url, 1000, 200_000, identity) == CONTENT[1000:201_000]
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", WAITING)
def test_whoever_is_silent_or_slow_is_asked_anew(server, name, impatient):
    store, url, identity = opened(server)
    server.lie(PASSING[name], PASSING[name])
    assert store.read(url, 1000, 200_000, identity) == CONTENT[1000:201_000]
    assert len(server.requests) >= 3
    server.lie(PASSING[name])
    assert whole(store, url, identity) == CONTENT
    assert len(server.requests) >= 5


@pytest.mark.parametrize("name", [name for name in PASSING if name not in (*WAITING, "all of it")])
def test_a_download_survives_what_passes(server, name):
    store, url, identity = opened(server)
    server.lie(PASSING[name], PASSING[name])
    assert whole(store, url, identity) == CONTENT
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", ["500", "silent", "no range", "wrong range"])
def test_stat_survives_what_passes(server, name, impatient):
    store, url, identity = opened(server)
    server.lie(PASSING[name])
    assert store.stat(url) == identity


@pytest.mark.parametrize("lie", [Lie(chunked=True), Lie(counted=False)])
def test_a_part_whose_length_is_not_announced(server, lie):
    store, url, identity = opened(server)
    server.always(lie)
    assert store.stat(url) == identity
    assert store.read(url, 5, 100_000, identity) == CONTENT[5:100_005]
    assert whole(store, url, identity) == CONTENT
    assert len(server.requests) == 3


def test_a_download_goes_on_from_the_broken_byte(server):
    store, url, identity = opened(server)
    server.lie(Lie(sends=1_000_000), Lie(sends=500_000, ends="reset"))
    assert whole(store, url, identity) == CONTENT
    starts = [int(re.match(r"bytes=(\d+)-", request.range)[1]) for request in server.requests]
    assert starts[:2] == [0, 1_000_000]
    assert 1_000_000 < starts[2] <= 1_500_000  # a reset throws away what was not yet read
    assert server.requests[1].headers["if-range"] == identity.tag


def test_many_breaks_cost_no_time_as_long_as_bytes_come(server):
    """30 breaks with backoff would take much longer than the timeout."""
    store, url, identity = opened(server, timeout=1.0)
    server.lie(*[Lie(sends=100_000)] * 29)
    began = time.monotonic()
    assert whole(store, url, identity) == CONTENT
    assert time.monotonic() - began < 10 and len(server.requests) == 30


@pytest.mark.parametrize("lie", [Lie(status=503), Lie(status=503, headers={"Retry-After": "3600"}),
                                 Lie(sends=0, ends="stall"), Lie(waits=30.0),
                                 Lie(bytes_per_second=5000), Lie(more=b"x", counted=False)])
def test_never_a_hang_beyond_the_timeout(server, lie, impatient):
    store, url, identity = opened(server, timeout=0.2)
    server.always(lie)
    for attempt in (lambda: store.read(url, 0, 400_000, identity), lambda: whole(store, url, identity)):
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"for 0.2 s failed as well; see whether the server.*--data.timeout"):
            attempt()
        assert 0.1 < time.monotonic() - began < 10


DRIPPED = {"head": Lie(drips=0.05),
           "503": Lie(status=503, body=b"x" * 1000, headers={"Content-Length": "1000"}, bytes_per_second=20)}


@pytest.mark.parametrize("name", DRIPPED)
def test_no_answer_byte_by_byte_lasts_beyond_the_timeout(server, name, impatient):
    store, url, identity = opened(server, timeout=0.25)
    server.always(DRIPPED[name])
    for attempt in (lambda: store.stat(url), lambda: store.read(url, 0, 9, identity)):
        began = time.monotonic()
        with pytest.raises(StoreError, match="for 0.25 s failed as well.*--timeout of vir-evaluate and vir-index"):
            attempt()
        assert time.monotonic() - began < 10


def test_a_body_that_is_not_needed_is_not_waited_for(server):
    server.content["/small"] = bytes(1000)
    server.always(Lie(ranged=False, bytes_per_second=20))
    began = time.monotonic()
    assert HttpStore(TIMEOUT).stat(server.url("/small")).size == 1000
    assert time.monotonic() - began < 10


def test_a_slow_server_is_waited_for_longer_each_time(server, impatient):
    store, url, identity = opened(server)
    server.always(Lie(waits=0.3))
    assert store.read(url, 5, 6, identity) == CONTENT[5:11]
    assert store.stat(url) == identity


STALLING = {"silent": Lie(waits=60.0), "asks to wait": Lie(status=503, headers={"Retry-After": "60"}),
            "in the body": Lie(sends=1000, ends="stall"), "drips": Lie(drips=0.3)}


@pytest.mark.parametrize("name", STALLING)
def test_a_request_to_stop_ends_it(server, name):
    store, url, identity = opened(server, timeout=60.0)
    server.always(STALLING[name])
    began = time.monotonic()
    with pytest.raises(Stopped):
        list(run_threads(lambda size: store.read(url, 0, size, identity), [100_000], 1,
                         lambda: time.monotonic() - began > 0.1))
    assert time.monotonic() - began < 5


def test_retry_after_is_kept_to(server):
    store, url, identity = opened(server)
    server.lie(Lie(status=429, headers={"Retry-After": "1"}))
    began = time.monotonic()
    assert store.read(url, 0, 5, identity) == CONTENT[:5]
    assert 1 <= time.monotonic() - began < 10


def test_retry_after_as_number_date_and_nonsense():
    assert [retry_after(text) for text in ("7", "0.5", None, "x", "-3", "nan", "inf")] == [7, 0.5, 0, 0, 0, 0, 0]
    assert 50 < retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60
    assert retry_after("Sun, 06 Nov 1994 08:49:37 GMT") == 0


def test_waits_grow_and_differ(monkeypatch):
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.25)
    waits = [[retries._backoff(number) for number in (1, 3, 5, 50)] for _ in range(100)]
    for first, third, fifth, last in waits:
        assert 0.125 <= first <= 0.25 and 0.5 <= third <= 1 and 2 <= fifth <= 4 and 7.5 <= last <= 15
    assert len({first for first, *_ in waits}) > 90


def test_what_is_not_passing_is_tried_once():
    attempts = []

    def attempt(left, patience):
        attempts.append(left)
        raise StoreError("no")
    with pytest.raises(StoreError, match="no"):
        persist(attempt, "http://h/x", 5.0)
    assert len(attempts) == 1 and 4 < attempts[0] <= 5


def test_the_time_that_is_left_shrinks(monkeypatch):
    left = []

    def attempt(seconds, patience):
        left.append(seconds)
        time.sleep(0.1)
        raise PassingError("broke")
    with pytest.raises(StoreError, match=r"https://\*\*\*@h/x broke, and what else was tried for 0.4 s"):
        persist(attempt, "https://user:pw@h/x", 0.4)
    assert left == sorted(left, reverse=True) and 3 <= len(left) <= 6


def test_the_patience_grows(monkeypatch):
    monkeypatch.setattr(retries, "WINDOW", 0.7)
    found = []

    def attempt(left, patience):
        found.append(patience)
        if len(found) < 4:
            raise PassingError("broke")
    persist(attempt, "https://h/x", 5.0)
    assert found[:3] == [0.7, 1.4, 2.8] and 4 < found[3] < 5  # no more than is left


FINAL = {
    "401": (Lie(status=401), r"is refused \(401\).*~/\.netrc"), "403": (Lie(status=403), r"is refused \(403\).*signed"),
    "404": (Lie(status=404), r"does not exist \(404\).*path"), "410": (Lie(status=410), r"does not exist \(410\)"),
    "400": (Lie(status=400), "its server answered 400"), "501": (Lie(status=501), "answered 501"),
    "204": (Lie(status=204), "answered 204"), "304": (Lie(status=304), "answered 304"),
    "gzip": (Lie(zipped=True), "Content-Encoding 'gzip'.*as it is"),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_does_not_pass_is_told_at_once(server, name):
    store, url, identity = opened(server)
    lie, message = FINAL[name]
    server.always(lie)
    calls = (lambda: store.stat(url), lambda: store.read(url, 5, 6, identity), lambda: whole(store, url, identity))
    for call in calls:
        with pytest.raises(StoreError, match=f"{re.escape(url)}.*{message}") as caught:
            call()
        assert isinstance(caught.value, MissingError) == (name in ("404", "410"))
    assert len(server.requests) == 3


@pytest.mark.parametrize("lie", [Lie(tag='"other"'), Lie(tag='W/"other"'), Lie(status=412), Lie(status=416),
                                 Lie(headers={"Content-Range": f"bytes 0-9/{len(CONTENT) + 1}"})])
def test_another_object_is_told_at_once(server, lie):
    store, url, identity = opened(server)
    server.always(lie)
    with pytest.raises(StoreError, match="has changed on the server since it was first seen; make its index anew"):
        store.read(url, 0, 10, identity)
    assert len(server.requests) == 1


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("ranged", [True, False])
def test_another_object_in_the_middle(server, tagged, ranged):
    server.tagged, server.ranged = tagged, ranged
    store, url, identity = opened(server)
    server.lie(Lie(sends=1_000_000))
    blocks = store.blocks(url, identity)
    server.content[PATH] = random.Random(2).randbytes(len(CONTENT) + (not tagged))  # the size alone tells
    server.lie(None)
    with pytest.raises(StoreError, match="has changed on the server"):
        next(blocks)
    server.content[PATH] = CONTENT


def test_a_change_between_two_answers_of_one_download(server):
    store, url, identity = opened(server)
    other = random.Random(3).randbytes(len(CONTENT))
    server.lie(Lie(sends=1_000_000), Lie(body=other[1_000_000:], tag='"other"'))
    with pytest.raises(StoreError, match="has changed on the server"):
        whole(store, url, identity)


def test_weak_and_missing_tags_are_no_change(server):
    store, url, identity = opened(server)
    server.lie(Lie(tag="W/" + identity.tag), Lie(headers={"ETag": None}), Lie(headers={
        "ETag": None, "Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT"}))
    assert [store.read(url, 0, 3, identity) for _ in range(3)] == [CONTENT[:3]] * 3


def test_the_time_of_the_last_change_stands_for_a_tag(server):
    server.always(Lie(headers={"ETag": None, "Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT"}))
    store, url, identity = opened(server)
    assert identity.tag == "Sun, 06 Nov 1994 08:49:37 GMT"
    assert store.read(url, 0, 3, identity) == CONTENT[:3]
    server.always(Lie(headers={"ETag": None, "Last-Modified": "Mon, 07 Nov 1994 08:49:37 GMT"}))
    with pytest.raises(StoreError, match="has changed"):
        store.read(url, 0, 3, identity)


def test_a_server_without_ranges(server):
    server.ranged = False
    store, url, identity = opened(server)
    assert identity == Identity(len(CONTENT), f'"{hashlib.md5(CONTENT).hexdigest()}"', ranged=False)
    with pytest.raises(StoreError, match=r"cannot be read in parts.*--data\.cache"):
        store.read(url, 0, 5, identity)
    server.lie(Lie(sends=1_000_000), Lie(sends=2_000_000, ends="reset"), Lie(counted=False))
    assert whole(store, url, identity) == CONTENT
    assert len(server.requests) == 3 and not any(request.range for request in server.requests)


@pytest.mark.parametrize("lie", [Lie(ranged=False, counted=False), Lie(ranged=False, chunked=True),
                                 Lie(headers={"Content-Range": "bytes 0-0/*"})])
def test_a_size_that_is_not_told(server, lie):
    server.always(lie)
    with pytest.raises(StoreError, match="does not tell how long it is.*Content-Length"):
        HttpStore(TIMEOUT).stat(server.url(PATH))


@pytest.mark.parametrize("ranged", [True, False])
def test_a_length_of_5000_digits(server, ranged):
    store, url, identity = opened(server, timeout=0.2)
    server.always(Lie(ranged=ranged, headers={"Content-Length": "1" * 5000}))
    if ranged:
        assert store.stat(url) == identity
    else:
        with pytest.raises(StoreError, match="does not tell how long it is"):
            store.stat(url)
    server.always(Lie(status=302, headers={"Location": f"http://127.0.0.1:{'1' * 5000}/"}))
    with pytest.raises(StoreError, match="is redirected to something that is no URL"):
        store.read(url, 0, 9, identity)


@pytest.mark.parametrize("encoding", ["", "Identity", " identity "])
def test_an_encoding_that_is_none(server, encoding):
    server.always(Lie(headers={"Content-Encoding": encoding}))
    store, url, identity = opened(server)
    assert store.read(url, 5, 6, identity) == CONTENT[5:11]


def test_no_log_has_a_secret(server, caplog):
    server.always(Lie(headers={"X-Odd: 1\r\nno header at all\r\nX-Odd": "2"}))
    store, url = HttpStore(TIMEOUT), server.url(PATH) + "?X-Amz-Signature=secret"
    assert store.read(url, 5, 6, store.stat(url)) == CONTENT[5:11]
    assert "secret" not in caplog.text


def test_a_server_that_was_restarted(server):
    store, url, identity = opened(server)
    assert store.read(url, 0, 3, identity) == CONTENT[:3]
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.read, url, 3, 4, identity)
        time.sleep(0.3)
        assert not reading.done()
        server.start()
        assert reading.result(timeout=20) == CONTENT[3:7]


def test_a_host_that_is_not_there(server):
    server.stop()
    with pytest.raises(StoreError, match="is on a host that takes no connection, and what else was tried for 0.2 s"):
        HttpStore(0.2).stat(server.url(PATH))
    server.start()
    with pytest.raises(StoreError, match="is on a host whose name is not known"):
        HttpStore(0.2).stat("http://no-such-host.invalid/a.tar")


@pytest.mark.parametrize("url", ["http:///a.tar", "http://h:port/a.tar", "http://[1/a.tar", "http://h:99999/a.tar"])
def test_what_is_no_url(url):
    with pytest.raises(StoreError, match=re.escape(f"{url} has no host, or none that can be; write https://HOST/PATH")):
        HttpStore(TIMEOUT).stat(url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server, status):
    store, url, identity = opened(server)
    server.content["/b"] = CONTENT
    lie = Lie(status=status, headers={"Location": "/b?signed=1#part"})
    server.lie(lie, None, lie, None)
    assert store.stat(url) == identity and store.read(url, 7, 8, identity) == CONTENT[7:15]
    assert [request.path for request in server.requests] == [PATH, "/b?signed=1"] * 2
    assert {request.range for request in server.requests} == {"bytes=0-0", "bytes=7-14"}


def test_redirects_have_an_end(server):
    server.always(Lie(status=302, headers={"Location": PATH}))
    with pytest.raises(StoreError, match="is redirected more than 5 times; give the URL at the end"):
        HttpStore(TIMEOUT).stat(server.url(PATH))
    assert len(server.requests) == 6


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://h/a.tar", "s3://bucket/a.tar"])
def test_redirects_to_other_schemes_are_refused(server, target):
    server.always(Lie(status=302, headers={"Location": target}))
    with pytest.raises(StoreError, match=f"is redirected to {target}, which is refused: from https to https alone"):
        HttpStore(TIMEOUT).stat(server.url(PATH))
    assert len(server.requests) == 1


def test_a_redirect_to_what_is_no_url(server):
    server.always(Lie(status=302, headers={"Location": "http://[1/"}))
    with pytest.raises(StoreError, match="is redirected to something that is no URL"):
        HttpStore(TIMEOUT).stat(server.url(PATH))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost", "-keyout", path.with_name("key"), "-out", path],
                   check=True, capture_output=True, timeout=60)
    path.write_bytes(path.read_bytes() + path.with_name("key").read_bytes())
    return str(path)


def test_https_is_checked_and_not_left_for_http(server, certificate, monkeypatch):
    with HttpServer({PATH: CONTENT}, certificate=certificate, host="localhost") as safe:
        url = safe.url(PATH)
        with pytest.raises(StoreError, match="the certificate of its server is not trusted.*SSL_CERT_FILE"):
            HttpStore(TIMEOUT).stat(url)
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        store = HttpStore(TIMEOUT)
        identity = store.stat(url)
        assert store.read(url, 5, 6, identity) == CONTENT[5:11]
        safe.lie(Lie(status=302, headers={"Location": server.url(PATH)}))
        with pytest.raises(StoreError, match=f"is redirected to {server.url(PATH)}, which is refused"):
            store.read(url, 5, 6, identity)
        assert not server.requests
        server.lie(Lie(status=302, headers={"Location": url}))
        assert store.read(server.url(PATH), 5, 6, identity) == CONTENT[5:11]


def authorizations(server):
    return [request.headers.get("authorization") for request in server.requests]


BASIC = "Basic dXNlcjpwOnfDpA=="  # base64 of user:p:wä


def test_user_and_password_of_the_url(server):
    server.login = "user:p:wä"
    store, url = HttpStore(TIMEOUT), server.url(PATH, user="user:p%3Aw%C3%A4")
    identity = store.stat(url)
    assert store.read(url, 0, 4, identity) == CONTENT[:4]
    assert authorizations(server) == [BASIC] * 2 and {request.path for request in server.requests} == {PATH}
    with pytest.raises(StoreError, match=r"//\*\*\*@127.0.0.1.*is refused \(401\)"):
        store.stat(server.url(PATH, user="user:wrong"))


def test_netrc(server, tmp_path):
    server.login = "user:p:wä"
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1 login user password p:wä\nmachine other login a password b\n")
    assert HttpStore(TIMEOUT).stat(server.url(PATH)).size == len(CONTENT)
    file.write_text("machine 127.0.0.1 login user\npassword secret nonsense-secret\n")
    with pytest.raises(StoreError, match=f"cannot read {file}, line [0-9]+; mend it") as caught:
        HttpStore(TIMEOUT).stat(server.url(PATH))
    assert "secret" not in str(caught.value)


def test_netrc_and_environment_are_looked_at_once(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password p:wä\n")
    server.login, looks = "user:p:wä", []
    for module, name in ((connections.netrc, "netrc"), (connections, "getproxies"), (connections, "proxy_bypass")):
        monkeypatch.setattr(module, name, lambda *given, do=getattr(module, name): [looks.append(given), do(*given)][1])
    store, url, identity = opened(server)
    assert [store.read(url, place, 1, identity) for place in range(9)] == [CONTENT[i:i + 1] for i in range(9)]
    assert len(looks) == 3


def test_another_host_gets_no_password(server, tmp_path):
    with HttpServer({PATH: CONTENT}) as other:  # another port is another server
        (tmp_path / "netrc").write_text("default login user password secret\n")
        for url in (server.url(PATH), server.url(PATH, user="user:p:w%C3%A4")):
            server.lie(Lie(status=302, headers={"Location": other.url(PATH, user="a:b")}))
            assert HttpStore(TIMEOUT).stat(url).size == len(CONTENT)
        assert None not in authorizations(server) and authorizations(other) == [None, None]
        server.forget()
        server.lie(Lie(status=302, headers={"Location": PATH}))  # this one is the same
        HttpStore(TIMEOUT).stat(server.url(PATH, user="user:p:w%C3%A4"))
        assert authorizations(server) == [BASIC] * 2


def test_a_proxy_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url("", user="proxy-user:secret"))
    monkeypatch.setenv("no_proxy", "")
    server.content["http://data.invalid/a.tar"] = CONTENT  # a proxy gets the whole URL
    store, url = HttpStore(TIMEOUT), "http://data.invalid/a.tar"
    assert store.read(url, 1, 2, store.stat(url)) == CONTENT[1:3]
    assert server.requests[0].headers["proxy-authorization"] == "Basic cHJveHktdXNlcjpzZWNyZXQ="
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert HttpStore(TIMEOUT).stat(server.url(PATH)).size == len(CONTENT)
    monkeypatch.setenv("http_proxy", "http://proxy-user:secret@127.0.0.1:9")
    with pytest.raises(StoreError) as caught:
        HttpStore(0.2).stat(url)
    assert "secret" not in str(caught.value)


def test_https_through_a_proxy(server, certificate, monkeypatch):
    """Whose first bytes come late: what bounds its own answer does not bound the handshake that follows."""
    server.latency = 0.3
    with HttpServer({PATH: CONTENT}, certificate=certificate, host="localhost") as safe:
        for name, value in {"https_proxy": server.url(""), "no_proxy": "", "SSL_CERT_FILE": certificate}.items():
            monkeypatch.setenv(name, value)
        store, url = HttpStore(TIMEOUT), safe.url(PATH)
        assert store.read(url, 5, 6, store.stat(url)) == CONTENT[5:11]
        assert [(request.method, request.path) for request in server.requests] == [
            ("CONNECT", f"localhost:{safe.port}")]


SECRETS = "user:pass-secret@", "?X-Signature=query-secret", "#fragment-secret"


@pytest.mark.parametrize("lie", [*(PASSING[name] for name in ("503", "cut", "reset", "stall", "wrong range")),
                                 *(lie for lie, _ in FINAL.values()), Lie(tag='"x"'),
                                 Lie(status=302, headers={"Location": "file:///x?y=query-secret"})])
def test_no_message_has_a_secret(server, lie, impatient):
    store, _, identity = opened(server, timeout=0.05)
    url = server.url(PATH, user="user:pass-secret") + "?X-Signature=query-secret#fragment-secret"
    server.always(lie)
    for call in (lambda: store.stat(url), lambda: store.read(url, 0, 300_000, identity),
                 lambda: store.read(url, 0, 10 ** 9, identity)):
        try:
            call()
        except StoreError as error:
            assert "secret" not in str(error) and f"127.0.0.1:{server.port}{PATH}" in str(error)


def test_many_threads_share_a_store(server):
    store, url, identity = opened(server)
    offsets = [random.Random(number).randrange(len(CONTENT) - 9000) for number in range(400)]
    with ThreadPoolExecutor(32) as pool:
        parts = list(pool.map(lambda offset: store.read(url, offset, 9000, identity), offsets, timeout=60))
    assert parts == [CONTENT[offset:offset + 9000] for offset in offsets]
    assert len({request.connection for request in server.requests}) <= 40  # kept open, not opened anew


def test_a_forked_child_uses_connections_of_its_own(server):
    store, url, identity = opened(server)
    store.read(url, 0, 10, identity)
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if all(store.read(url, place, 5000, identity) == CONTENT[place:place + 5000]
                            for place in range(0, 100_000, 5000)) else 2
        finally:
            os._exit(code)
    for place in range(0, 100_000, 1000):
        assert store.read(url, place, 1000, identity) == CONTENT[place:place + 1000]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    by_connection = {}
    for request in server.requests:
        by_connection.setdefault(request.connection, set()).add(length(request.range))
    assert sorted(by_connection.values(), key=str) == [{10, 1000}, {5000}]


def length(text):
    first, last = map(int, text.removeprefix("bytes=").split("-"))
    return last - first + 1
