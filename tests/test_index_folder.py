"""Indexes of shards that lie elsewhere: the same as beside the shards, made once, whole or not there."""

import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from support.http_server import HttpServer, Lie
from support.s3_server import ENVIRONMENT, S3Server
from support.small_disk import small_disk  # noqa: F401
from support.waiting import wait_for
from vir import index as index_module
from vir.data import index_folder
from vir.data.executors import Stopped
from vir.data.foreign import index_shards
from vir.data.index_folder import Settings, fetch_split, index_beside, make_index, open_index, shard_names
from vir.data.shards import ShardSample, read_index, read_manifest, write_shard, write_split
from vir.errors import DataError, SettingsError

ROOT = Path(__file__).resolve().parent.parent


def picture(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tar_of(numbers, label=lambda number: ("cls", b"%d" % (number % 3)), size=60_000):
    """Bytes of a tar by Python's tarfile; the images are zeros, or pictures where size is 0."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in numbers:
            ending, text = label(number)
            for name, data in (("png", bytes(size) or picture(number)), (ending, text)):
                info = tarfile.TarInfo(f"k{number:03d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def shards(count=3, **options):
    """Content by path, as of a server."""
    return {f"/in/set-train-{i:02d}.tar": tar_of(range(4 * i, 4 * i + 4), **options) for i in range(count)}


def on_disk(folder, content):
    folder.mkdir(exist_ok=True)
    for path, data in content.items():
        (folder / path.rpartition("/")[2]).write_bytes(data)
    return folder


@pytest.fixture()
def server():
    with HttpServer(shards()) as server:
        yield server


@pytest.fixture()
def logged(caplog):
    caplog.set_level(logging.INFO, "vir")
    return caplog


def urls_of(server):
    return [server.url(path) for path in sorted(server.content) if path.endswith(".tar")]


def opened(urls, tmp_path, first=True, **options):
    return open_index(urls, tmp_path / "indexes", 20.0, first, jobs=1, **options)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


# ---- what is made

def test_it_is_the_index_of_the_same_tars_on_the_disk_by_few_bytes(server, tmp_path):
    found = opened(urls_of(server), tmp_path)
    folder = on_disk(tmp_path / "in", server.content)
    index_shards(str(folder), jobs=1)
    assert (found.folder / "index.npy").read_bytes() == (folder / "index.npy").read_bytes()
    assert (found.folder / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    assert found.urls == tuple(urls_of(server)) and found.folder.parent == tmp_path / "indexes"
    contents = list(server.content.values())
    assert found.identities == tuple((len(content), f'"{hashlib.md5(content).hexdigest()}"', True)
                                     for content in contents)
    assert server.bytes < sum(map(len, contents)) / 10


def test_processes_make_the_same_and_tell_what_is_wrong(tmp_path):
    with HttpServer(shards(5)) as server:
        found, urls = opened(urls_of(server), tmp_path), urls_of(server)
        whole = files_of(found.folder)
        make_index(urls, tmp_path / "indexes", 20.0, Settings(), jobs=2)
        assert files_of(found.folder) == whole
        server.content["/in/set-train-03.tar"] = tar_of([90])[:30_000]
        with pytest.raises(DataError, match="http://.*/in/set-train-03.tar: the member at byte 0 says .* cut off"):
            make_index(urls, tmp_path / "indexes", 20.0, Settings(), jobs=2)
        assert files_of(found.folder) == whole


@pytest.mark.parametrize("ranged", [True, False])
def test_checksums_and_servers_without_ranges_take_the_whole_shards_and_leave_none(ranged, tmp_path):
    with HttpServer(shards(size=0), ranged=ranged) as server:
        urls = urls_of(server)
        make_index(urls, tmp_path / "indexes", 20.0, Settings(checksums=ranged or None), 1)
        found = opened(urls, tmp_path)
        folder = on_disk(tmp_path / "in", server.content)
    index_shards(str(folder), jobs=1, checksums=ranged)
    assert files_of(found.folder).keys() == {"index.npy", "manifest.json", "shards.json"}
    assert (found.folder / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    assert {identity.ranged for identity in found.identities} == {ranged}


def test_no_secret_is_kept_and_another_signature_finds_it_again(server, tmp_path):
    signed = [server.url(path, "anna:hush") + "?sig=a/hush/z" for path in sorted(server.content)]
    found = opened(signed, tmp_path)
    assert read_manifest(found.folder).split == "in"
    assert found.urls == tuple(signed)
    assert not any(b"hush" in content or b"anna" in content for content in files_of(found.folder).values())
    server.forget()
    again = opened([url.replace("?sig=a/hush/z", "?sig=other") for url in signed], tmp_path, first=False)
    assert again.folder == found.folder and again.identities == found.identities and server.requests == []


def test_local_tars_in_several_folders_and_names_that_come_twice(tmp_path, monkeypatch):
    content = shards(2)
    paths = [on_disk(tmp_path / name, {"/a.tar": data}) / "a.tar" for name, data in zip("xy", content.values())]
    monkeypatch.chdir(tmp_path)
    found = opened(["x/a.tar", "y/a.tar"], tmp_path)
    assert found.urls == tuple(map(str, paths))
    assert found.identities == tuple((path.stat().st_size, str(path.stat().st_mtime_ns), True) for path in paths)
    assert [shard.name for shard in read_manifest(found.folder).shards] == ["00000-a.tar", "00001-a.tar"]
    assert read_index(found.folder)["label"].tolist() == [number % 3 for number in range(8)]
    assert not (tmp_path / "x/index.npy").exists()
    assert shard_names(["http://h/x/a.tar?b/c.tar", "s3://b/d.tar"]) == ["a.tar", "d.tar"]


# ---- class lists

def test_names_in_the_txt_are_the_classes(tmp_path):
    with HttpServer(shards(label=lambda number: ("txt", [b"dog", b"ant", b"cat"][number % 3]))) as server:
        found = opened(urls_of(server), tmp_path)
    assert read_manifest(found.folder).classes == ("ant", "cat", "dog")
    assert read_index(found.folder)["label"].tolist() == [[2, 0, 1][number % 3] for number in range(12)]


def test_the_class_list_and_the_other_settings_of_vir_index_outlive_a_change(server, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    pattern = server.url("/in/set-train-{00..02}.tar")
    assert index_module.main([pattern, "--classes", str(tmp_path / "classes.txt"), "--name", "pets", "--split", "fold1",
                              "--index-dir", str(tmp_path / "indexes"), "--jobs", "1"]) == 0
    found = opened(urls_of(server), tmp_path)
    assert "12 images of 4 classes in 3 shards, 0.8 MB" in (told := capsys.readouterr().out)
    assert told.strip().endswith(f"index and manifest written to {found.folder}")
    server.content["/in/set-train-01.tar"] = tar_of(range(100, 107))
    changed = opened(urls_of(server), tmp_path)
    manifest = read_manifest(changed.folder)
    assert (manifest.classes, manifest.name, manifest.split) == (("ant", "bee", "cat", "dog"), "pets", "fold1")
    assert manifest.num_samples == 15


# ---- what changes, what is refused

def test_a_shard_that_changed_is_seen_by_the_first_alone(server, tmp_path, logged):
    found = opened(urls_of(server), tmp_path)
    before = files_of(found.folder)
    server.content["/in/set-train-01.tar"] = tar_of(range(100, 104))  # as long as before
    assert opened(urls_of(server), tmp_path, first=False).identities == found.identities
    assert files_of(found.folder) == before
    anew = opened(urls_of(server), tmp_path)
    assert "set-train-01.tar has changed since its index was made, 1 shard in all" in logged.text
    assert read_index(anew.folder)["key"].tolist()[4:8] == [b"k100", b"k101", b"k102", b"k103"]
    assert [old == new for old, new in zip(found.identities, anew.identities)] == [True, False, True]
    server.forget()
    assert opened(urls_of(server), tmp_path) == anew and len(server.requests) == 3


def test_a_shard_that_is_missing_is_named_without_its_secrets(server, tmp_path):
    urls = [*urls_of(server), server.url("/in/gone.tar", "anna:hush") + "?sig=hush"]
    with pytest.raises(DataError, match="/in/gone.tar.*404") as caught:
        opened(urls, tmp_path)
    assert "hush" not in str(caught.value)
    with pytest.raises(DataError, match=f"cannot read {tmp_path}/gone.tar: No such file.*complete the shards"):
        opened([str(tmp_path / "gone.tar")], tmp_path)


def test_what_is_refused(server, tmp_path, monkeypatch):
    urls = urls_of(server)
    with pytest.raises(SettingsError, match="in/set-train-00.tar is on a server and a.tar is not: .* all local"):
        opened([*urls, "a.tar"], tmp_path)
    with pytest.raises(SettingsError, match="the shard http.*/set-train-00.tar is named 2 times"):
        opened([urls[0], *urls], tmp_path)
    server.content["/in/set-train-02.tar"] = tar_of([1])
    with pytest.raises(DataError, match="the key 'k001' is in set-train-00.tar and in set-train-02.tar"):
        opened(urls, tmp_path)
    server.content["/in/set-train-02.tar"] = tar_of([])
    with pytest.raises(DataError, match="shards without samples: 'http://.*/in/set-train-02.tar'; remove them"):
        opened(urls, tmp_path)
    server.content["/in/set-train-02.tar"] = tar_of([90])[:30_000]
    with pytest.raises(DataError, match="http://.*/in/set-train-02.tar: the member at byte 0 says .* cut off"):
        opened(urls, tmp_path)
    assert [path.name for path in (tmp_path / "indexes").glob("*/*") if path.name[0] != "."] == []
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot keep an index in .*/file/.*: Not a directory; .*--data.index_dir"):
        open_index(urls, tmp_path / "file", 20.0, first=True)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert index_folder.default_index_dir() == Path("/somewhere/vir-at-scale/indexes")


@pytest.mark.parametrize("damage", ["index", "manifest", "shards", "no index"])
def test_a_damaged_folder_is_made_anew(server, tmp_path, damage):
    found = opened(urls_of(server), tmp_path)
    whole = files_of(found.folder)
    path = found.folder / {"index": "index.npy", "no index": "index.npy", "manifest": "manifest.json",
                           "shards": "shards.json"}[damage]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.unlink() if damage == "no index" else path.write_bytes(content if damage != "shards" else content[:50])
    assert opened(urls_of(server), tmp_path) == found and files_of(found.folder) == whole


def test_vir_index_refuses_what_it_cannot_do(server, tmp_path, capsys):
    def told(*arguments):
        code = index_module.main([*arguments, "--index-dir", str(tmp_path / "indexes"), "--jobs", "1"])
        return code, capsys.readouterr().err
    assert told(server.url("/in/set-train-00.tar"), "--also", "timm")[0] == 2
    code, error = told(server.url("/in/*.tar"))
    assert code == 2 and "servers do not know; name the shards by braces" in error
    code, error = told(server.url("/in", "a:hush"))
    assert code == 3 and "does not tell what a folder holds; name the tars by braces" in error and "hush" not in error
    code, error = told(server.url("/in/set-train-00.tar"), "--classes", str(tmp_path / "none.txt"))
    assert code == 3 and "none.txt" in error
    for value in ("-5", "0", "nan", "inf"):
        code, error = told(server.url("/in/set-train-00.tar"), "--timeout", value)
        assert code == 2 and f"--timeout is {float(value)}; it must be more than 0 seconds, and not infinite" in error


def test_vir_index_of_local_tars_in_two_folders(tmp_path, capsys):
    for name, data in zip("xy", shards(2).values()):
        on_disk(tmp_path / name, {f"/{name}.tar": data})
    pattern = f"{tmp_path}/x/x.tar::{tmp_path}/y/*.tar"
    assert index_module.main([pattern, "--index-dir", str(tmp_path / "indexes"), "--jobs", "1"]) == 0
    found = opened([f"{tmp_path}/{name}/{name}.tar" for name in "xy"], tmp_path, first=False)
    assert f"written to {found.folder}" in capsys.readouterr().out


# ---- object stores

def test_a_folder_and_a_split_in_a_bucket(split, tmp_path, capsys):
    content = shards()
    with S3Server() as server:
        for path, data in (content | split).items():
            server.upload(path[1:].replace("%20", " "), data)
        server.upload("in/README", b"no shard")
        assert index_module.main([server.url("in/"), "--index-dir", str(tmp_path / "indexes"), "--jobs", "1"]) == 0
        urls = [server.url(path[1:]) for path in sorted(content)]
        found = opened(urls, tmp_path, first=False)
        assert f"written to {found.folder}" in capsys.readouterr().out
        assert opened(urls, tmp_path) == found and {len(identity.tag) for identity in found.identities} == {34}
        assert index_module.main([server.url("own"), "--index-dir", str(tmp_path / "indexes"), "--jobs", "1"]) == 3
        assert "/own has a manifest.json beside its shards, which training takes" in capsys.readouterr().err
        own = fetch_split(server.url("own"), tmp_path / "indexes", 20.0, True)
        assert own.urls == tuple(server.url(f"own/own train-{i}.tar") for i in range(2))
        assert files_of(own.folder)["index.npy"] == split["/own/index.npy"]
        assert fetch_split(server.url("in"), tmp_path / "indexes", 20.0, True) is None
    index_shards(str(on_disk(tmp_path / "in", content)), jobs=1)
    assert files_of(found.folder)["index.npy"] == (tmp_path / "in/index.npy").read_bytes()


# ---- many processes, and kills

CODE = """
import sys
from pathlib import Path
from vir.data.index_folder import index_beside, open_index
if __name__ == "__main__":
    if sys.argv[1] == "beside":
        folder = Path(sys.argv[2])
        print(index_beside(folder, sorted(path.name for path in folder.glob("*.tar")), jobs=1))
    else:
        print(open_index(sys.argv[3:], Path(sys.argv[2]), 20.0, first=sys.argv[1] == "first", jobs=1).folder)
"""


def started(*arguments):
    return subprocess.Popen([sys.executable, "-c", CODE, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def ended(process):
    try:
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out.strip()


def test_of_several_processes_one_makes_it(server, tmp_path):
    server.latency = 0.05
    urls = urls_of(server)
    processes = [started(who, tmp_path / "indexes", *urls) for who in ("first", "other", "other")]
    (folder,) = set(map(ended, processes))
    # Headers are asked for once; each of the processes may ask for the state of the shards.
    parts = [request for request in server.requests if request.range not in ("bytes=0-0", None)]
    assert len(parts) == len({(request.path, request.range) for request in parts}) > 3
    assert read_manifest(Path(folder)).num_samples == 12


class TestTheLock:
    """Of an index folder that all nodes of a cluster share."""

    def test_who_writes_nothing_does_not_wait_for_it(self, server, split, tmp_path):
        server.content |= split
        found, own = opened(urls_of(server)[:3], tmp_path), fetched(server, tmp_path)
        until = time.monotonic() + 10

        def late():
            return time.monotonic() > until

        with index_folder._locked(found.folder / ".vir-index.lock", late), \
                index_folder._locked(own.folder / ".vir-index.lock", late):
            assert opened(list(found.urls), tmp_path, is_stopping=late) == found
            assert fetch_split(server.url("/own/"), tmp_path / "indexes", 20.0, True, late) == own

    @pytest.mark.parametrize("kind", ["tars", "split"])
    def test_who_waits_for_it_has_asked_before_and_looks_again(self, server, split, tmp_path, kind):
        def first():
            if kind == "tars":
                return opened(urls_of(server)[:3], tmp_path)
            return fetched(server, tmp_path)

        server.content |= split if kind == "split" else {}
        folder = first().folder
        for path in folder.iterdir():
            path.unlink()
        server.forget()
        with ThreadPoolExecutor(3) as pool:
            with index_folder._locked(folder / ".vir-index.lock", lambda: False):
                found = [pool.submit(first) for _ in range(3)]
                wait_for(lambda: sum(request.range == "bytes=0-0" for request in list(server.requests)) >= 9)
                # Each for three shards, or for a manifest and two shards.
                time.sleep(0.2)
            assert len({answer.result(20) for answer in found}) == 1
        parts = [request for request in server.requests if request.range not in ("bytes=0-0", None)]
        made = [request for request in parts if "manifest" not in request.path]
        assert len(made) == len({(request.path, request.range) for request in made}) >= 1

    def test_a_prepared_folder_that_can_only_be_read_is_enough(self, server, split, small_disk):  # noqa: F811
        server.content |= split
        urls = urls_of(server)[:3]

        def both():
            return opened(urls, small_disk), fetched(server, small_disk)

        found = both()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True, timeout=10)
        assert both() == found
        with pytest.raises(DataError, match="cannot keep an index in .*: Read-only file system"):
            opened(urls[:1], small_disk)


def test_a_stop_request_ends_the_fetching_of_an_index(split, tmp_path):
    with HttpServer(split, latency=0.3) as server, pytest.raises(Stopped):
        fetch_split(server.url("/own/"), tmp_path / "indexes", 20.0, True,
                    lambda: any(request.path == "/own/index.npy" for request in list(server.requests)))
    assert not list((tmp_path / "indexes").glob("*/manifest.json"))


def test_ctrl_c_ends_vir_index_at_a_server_that_stalls(tmp_path):
    with HttpServer({}) as server:
        server.always(Lie(waits=30))
        process = subprocess.Popen(
            [sys.executable, "-m", "vir.index", "s3://bucket/in/", "--timeout", "4", "--index-dir", str(tmp_path)],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {
                **{name: value for name, value in ENVIRONMENT.items() if value is not None},
                "AWS_ENDPOINT_URL": server.url("")})
        wait_for(lambda: server.requests)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped by SIGINT; nothing was written" in error


@pytest.mark.parametrize("name", ["dir#1", "dir?1"])
def test_keys_of_object_stores_have_any_characters(name):
    fsspec.filesystem("memory").pipe(f"/{name}/a-train-0.tar", b"x")
    assert index_folder.inside(f"memory://{name}/", "x.tar") == f"memory://{name}/x.tar"
    urls = index_folder.find_urls(f"memory://{name}", 5.0)
    assert urls == [f"memory://{name}/a-train-0.tar"] and index_folder.find_urls(urls[0], 5.0) == urls
    assert index_folder._identity(urls[0], 5.0).size == 1
    assert shard_names([f"s3://b/{name}/x.tar", f"s3://b/{name}/y.tar?versionId=a/b"]) == ["x.tar", "y.tar"]
    assert index_folder.inside("https://h/d/?sig=1", "a b#.tar") == "https://h/d/a%20b%23.tar?sig=1"


def test_a_killed_maker_leaves_nothing_that_is_taken_for_whole(server, tmp_path):
    urls = urls_of(server)
    found = opened(urls[:1], tmp_path)  # another folder; the server works
    server.forget()
    server.always(Lie(waits=0.3))
    process = started("first", tmp_path / "indexes", *urls)
    until = time.monotonic() + 30
    while sum(request.range != "bytes=0-0" for request in list(server.requests)) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (folder,) = set((tmp_path / "indexes").iterdir()) - {found.folder}
    assert not (folder / "manifest.json").exists()
    (folder / ".index.npy.17-0123abcd.tmp").touch()  # as if it had been killed later
    server.always(None)
    assert opened(urls, tmp_path, first=False).folder == folder  # its lock is free
    assert read_manifest(folder).num_samples == 12 and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("step", range(8))
def test_a_kill_between_any_two_steps_of_making_it_anew(server, tmp_path, monkeypatch, step):
    urls = urls_of(server)
    settings = Settings(classes=("ant", "bee", "cat"))
    make_index(urls, tmp_path / "indexes", 20.0, settings, 1)
    server.content["/in/set-train-01.tar"] = tar_of(range(100, 104))
    steps = iter(range(100))

    class Killed(BaseException):
        pass

    def dying(act):
        def wrapped(*arguments, **options):
            if next(steps) == step:
                raise Killed
            return act(*arguments, **options)
        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        try:
            opened(urls, tmp_path)
        except Killed:
            pass
        else:
            assert step == 7  # more than there are
    taken = opened(urls, tmp_path, first=False)
    manifest, rows = read_manifest(taken.folder), read_index(taken.folder)
    assert hashlib.sha256((taken.folder / "index.npy").read_bytes()).hexdigest() == manifest.index_sha256
    assert (b"k100" in rows["key"]) == (taken.identities == index_folder._identities(urls, 20.0, lambda: False))
    last = opened(urls, tmp_path)
    assert read_index(last.folder)["key"][4] == b"k100" and read_manifest(last.folder).classes == settings.classes


def test_who_is_waited_for_is_told(tmp_path, logged):
    folder = tmp_path / "x"
    folder.mkdir()
    waiting = threading.Event()

    def stop():
        return waiting.is_set() or "waiting for" in logged.text

    with index_folder._locked(folder / ".lock", lambda: False):
        timer = threading.Timer(20, waiting.set)
        timer.start()
        with pytest.raises(Stopped), index_folder._locked(folder / ".lock", stop):
            pass
        timer.cancel()
    assert f"waiting for process {os.getpid()} on " in logged.text and f"the index in {folder}" in logged.text


def test_a_signal_ends_it_with_nothing_written(tmp_path):
    with HttpServer({"/a.tar": tar_of(range(60), size=20_000)}) as server:
        server.always(Lie(waits=0.03))
        with pytest.raises(Stopped):
            opened([server.url("/a.tar")], tmp_path, is_stopping=lambda: len(server.requests) > 4)
        assert len(server.requests) < 40  # of 61
    assert [path.name for path in (tmp_path / "indexes").glob("*/*") if path.name[0] != "."] == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vir-task")]


def test_beside_the_tars_for_all_ranks_at_once(tmp_path):
    folder = on_disk(tmp_path / "in", shards())
    processes = [started("beside", folder) for _ in range(3)]
    assert list(map(ended, processes)) == ["True"] * 3
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".tar") == ["index.npy", "manifest.json"]
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert index_beside(folder, []) and (folder / "manifest.json").stat().st_mtime_ns == made


def test_beside_tars_where_nobody_may_write(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(30, "Read-only file system", str(path))

    folder = on_disk(tmp_path / "in", shards(1))
    monkeypatch.setattr(index_folder, "lock", refuse)
    assert not index_beside(folder, ["set-train-00.tar"]) and len(list(folder.iterdir())) == 1


# ---- a split of our own on a server

@pytest.fixture()
def split(tmp_path):
    """Of vir-convert's kind: content by path."""
    folder = tmp_path / "source"
    folder.mkdir()
    parts = [write_shard(folder / f"own train-{i}.tar", [
        ShardSample(f"k{i}{j}", picture(j), "png", 8 + j, 9, j, f"{j}.png") for j in range(3)]) for i in range(2)]
    write_split(folder, parts, name="own", split="train", classes=["a", "b", "c"], seed=1, samples_per_shard=3,
                conversion={"x": 1})
    return {f"/own/{path.name.replace(' ', '%20')}": path.read_bytes() for path in folder.iterdir()}


def fetched(server, tmp_path, first=True):
    return fetch_split(server.url("/own/"), tmp_path / "indexes", 20.0, first)


def test_a_split_on_a_server_is_fetched_once(split, tmp_path):
    with HttpServer(split) as server:
        found = fetched(server, tmp_path)
        assert files_of(found.folder)["manifest.json"] == split["/own/manifest.json"]
        assert files_of(found.folder)["index.npy"] == split["/own/index.npy"]
        assert found.urls == tuple(server.url(f"/own/own%20train-{i}.tar") for i in range(2))
        assert [identity.size for identity in found.identities] == [len(split[f"/own/own%20train-{i}.tar"])
                                                                    for i in range(2)]
        server.forget()
        assert fetched(server, tmp_path, first=False) == found and server.requests == []
        assert fetched(server, tmp_path) == found and server.bytes_of["/own/index.npy"] == 0
        (found.folder / "index.npy").write_bytes(split["/own/index.npy"][:-1] + b"?")
        assert fetched(server, tmp_path) == found
        assert files_of(found.folder)["index.npy"] == split["/own/index.npy"]
        assert fetch_split(server.url("/none"), tmp_path / "indexes", 20.0, True) is None


def test_a_manifest_that_changed_brings_the_new_index(split, tmp_path):
    with HttpServer(dict(split)) as server:
        fetched(server, tmp_path)
        other = tmp_path / "other"
        other.mkdir()
        parts = [write_shard(other / "new.tar", [ShardSample("n", picture(1), "png", 9, 9, 0, "n.png")])]
        write_split(other, parts, name="own", split="train", classes=["a"], seed=1, samples_per_shard=3)
        server.content |= {f"/own/{path.name}": path.read_bytes() for path in other.iterdir()}
        found = fetched(server, tmp_path)
    assert found.urls == (server.url("/own/new.tar"),) and len(found.identities) == 1
    assert files_of(found.folder)["index.npy"] == (other / "index.npy").read_bytes()


def test_splits_on_servers_that_are_refused(split, tmp_path):
    with HttpServer(dict(split)) as server:
        server.content["/own/own%20train-1.tar"] += b"\0"
        size = len(split["/own/own%20train-1.tar"])
        with pytest.raises(DataError, match=f"train-1.tar has {size + 1:,} bytes, .* says {size:,}; copy"):
            fetched(server, tmp_path)
        server.content = dict(split) | {"/own/index.npy": split["/own/index.npy"][:-1] + b"?"}
        with pytest.raises(DataError, match="/own/index.npy is damaged or of another split: its sha256"):
            fetched(server, tmp_path)
        del server.content["/own/index.npy"]
        with pytest.raises(DataError, match="/own/index.npy is missing, beside a manifest.json"):
            fetched(server, tmp_path)
        server.content = dict(split) | {"/own/manifest.json": split["/own/manifest.json"].replace(b'"b"', b'"d"')}
        with pytest.raises(DataError, match="http://.*/own/manifest.json contradicts itself"):
            fetched(server, tmp_path)
        server.content = dict(split)
        del server.content["/own/own%20train-0.tar"]
        with pytest.raises(DataError, match="train-0.tar.*404"):
            fetched(server, tmp_path)
    assert not list((tmp_path / "indexes").glob("*/manifest.json"))


def test_a_manifest_without_end_is_not_read(split, tmp_path, monkeypatch):
    monkeypatch.setattr(index_folder, "MAX_MANIFEST_BYTES", 1000)
    with HttpServer({"/own/manifest.json": b" " * 1001}) as server, \
            pytest.raises(DataError, match="manifest.json has more than the 1,000 bytes that it may have"):
        fetched(server, tmp_path)
