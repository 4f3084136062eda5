"""Where the index of shards lies that is not beside them: a folder for each list of shards, made once for a node.

    INDEX_DIR/HASH/manifest.json    written last: with it the folder is whole
    INDEX_DIR/HASH/index.npy
    INDEX_DIR/HASH/shards.json      which bytes the shards had, and how the index was made

HASH is of the shards' addresses, without what is secret in them or changes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from vir.addresses import expand, is_remote, place, shown
from vir.data.executors import Stopped, run_threads, stopping
from vir.data.foreign import (
    IndexSummary,
    LocalTar,
    RemoteTar,
    checked_name,
    common_name,
    index_local,
    index_remote,
    index_tars,
    summary_of,
    write_foreign,
)
from vir.data.shards import (
    INDEX,
    MANIFEST,
    MAX_INDEX_KEY_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_SHARDS,
    NAME,
    SplitManifest,
    count_of,
    index_dtype,
    parse_manifest,
    read_manifest,
)
from vir.data.sources.folder import some
from vir.data.stores.choose import open_store
from vir.data.stores.store import MAX_CONNECTIONS, Identity, MissingError, Store
from vir.errors import DataError, SettingsError
from vir.files import TEMPORARY, flush, lock, read_regular, replace_text, replacing, sha256, unlock
from vir.log import log

T = TypeVar("T")

SHARDS = "shards.json"
_VERSION = 1
_LOCK = ".vir-index.lock"
_TELLS_EVERY_S = 60.0
_MAX_SHARDS_BYTES = 1 << 28
_MAX_INDEX_HEADER = 1 << 16
"""Of an npy, in bytes."""


@dataclass(frozen=True)
class IndexFolder:
    """The index of shards that lie elsewhere."""

    folder: Path
    """Holds manifest.json and index.npy."""
    urls: tuple[str, ...]
    """Where the shards of the manifest lie, in its order, with what is secret in them; paths of local ones."""
    identities: tuple[Identity, ...]
    """Of the shards, when the index was made or fetched."""


@dataclass(frozen=True)
class Settings:
    """How an index is made. None: as it was made before, else by default."""

    classes: tuple[str, ...] | None = None
    """In label order."""
    split: str | None = None
    name: str | None = None
    checksums: bool | None = None


class _Known(NamedTuple):
    """What shards.json says."""

    identities: tuple[Identity, ...]
    settings: Settings


def default_index_dir() -> Path:
    """Of this user; on a cluster it may be shared by nodes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vir-at-scale" / "indexes"


def folder_of(urls: Sequence[str], index_dir: Path) -> Path:
    """Where the index of these shards lies, whoever asks for them: names of users, passwords and signatures do
    not count."""
    return Path(index_dir).absolute() / hashlib.sha256("\n".join(map(_bare, urls)).encode()).hexdigest()[:32]


def has_index(urls: Sequence[str], index_dir: Path) -> bool:
    """Whether open_index would find one, of these shards as they are or as they were."""
    return (folder_of(_places(urls), index_dir) / MANIFEST).is_file()


def open_index(urls: Sequence[str], index_dir: Path, timeout: float, first: bool, jobs: int = 8,
               is_stopping: Callable[[], bool] = lambda: False) -> IndexFolder:
    """The index of tars on servers or in local folders, made now where there is none. May be called by many processes
    at once: one makes it, the others wait for it.

    Args:
        urls: of the shards, or paths, in order.
        timeout: seconds that a server may take without an answer.
        first: asks for all shards whether they are still those of the index, and makes it anew where they are not;
            one process of a node does it before the others come.
        jobs: processes.
        is_stopping: asked several times a second.

    Raises:
        DataError, SettingsError: each names the shard, the value and what to do.
        Stopped: `is_stopping` returned True.
    """
    urls = _places(urls)
    folder = folder_of(urls, index_dir)
    # All that takes time but the making itself is done without the lock, for all nodes may share the folder.
    identities = _identities(urls, timeout, is_stopping) if first else None
    while True:
        seen = _state(folder)
        known = _whole(folder, thorough=first)
        changed = [] if known is None or identities is None else _changed(urls, known.identities, identities)
        if known is not None and not changed and _state(folder) == seen:
            return IndexFolder(folder, urls, known.identities)
        with _writing(folder, is_stopping):
            if _state(folder) != seen:  # another process has made it
                continue
            if changed:
                log.info("%s has changed since its index was made, %s in all: it is made anew", shown(changed[0]),
                         count_of(len(changed)))
            identities = identities or _identities(urls, timeout, is_stopping)
            _build(folder, urls, identities, Settings(), timeout, jobs, is_stopping)
            return IndexFolder(folder, urls, identities)


def make_index(urls: Sequence[str], index_dir: Path, timeout: float, settings: Settings, jobs: int = 8,
               is_stopping: Callable[[], bool] = lambda: False) -> IndexSummary:
    """Makes the index of tars on servers or in local folders, also where there is one. Arguments and errors are those
    of open_index."""
    began = time.monotonic()
    urls = _places(urls)
    folder = folder_of(urls, index_dir)
    with _writing(folder, is_stopping):
        identities = _identities(urls, timeout, is_stopping)
        return summary_of(folder, _build(folder, urls, identities, settings, timeout, jobs, is_stopping), began)


def fetch_split(url: str, index_dir: Path, timeout: float, first: bool,
                is_stopping: Callable[[], bool] = lambda: False) -> IndexFolder | None:
    """The index of a folder on a server that has manifest and index beside its shards; None where it has no manifest.
    May be called by many processes at once: one fetches it, the others wait for it.

    Args:
        first: asks the server for its manifest and for all shards, and fetches the index anew where the manifest has
            changed; one process of a node does it before the others come.
        is_stopping: asked several times a second.

    Raises:
        DataError: manifest or index are damaged, a shard is missing or has another size than the manifest says.
        Stopped: `is_stopping` returned True.
    """
    folder = folder_of([url], index_dir)
    if not first and (known := _whole(folder)):
        return IndexFolder(folder, _shard_urls(url, read_manifest(folder)), known.identities)
    store = open_store(url, timeout)
    try:
        data = _asked(lambda: _read_small(store, inside(url, MANIFEST), MAX_MANIFEST_BYTES), is_stopping)
    except MissingError:
        return None
    manifest = parse_manifest(data, shown(inside(url, MANIFEST)))
    urls = _shard_urls(url, manifest)
    identities = _identities(urls, timeout, is_stopping)
    _refuse_other_sizes(urls, manifest, identities)
    found = IndexFolder(folder, urls, identities)
    while True:  # as in open_index
        seen = _state(folder)
        known = _whole(folder, thorough=first)
        is_same = known is not None and _holds(folder / MANIFEST, data)
        if known is not None and is_same and known.identities == identities and _state(folder) == seen:
            return found
        with _writing(folder, is_stopping):
            if _state(folder) != seen:
                continue
            if known is not None and not is_same:
                log.info("%s has changed: its index is fetched anew", shown(inside(url, MANIFEST)))
            if not is_same:
                _asked(lambda: _fetch_index(store, inside(url, INDEX), folder, manifest), is_stopping)
            _write_shards(folder, urls, identities, Settings())
            if not is_same:
                with replacing(folder / MANIFEST) as path:
                    path.write_bytes(data)
            return found


def index_beside(folder: Path, names: Sequence[str], jobs: int = 8,
                 is_stopping: Callable[[], bool] = lambda: False) -> bool:
    """Makes the index of a local folder of tars beside them, where there is none. May be called at once by all
    processes of all nodes that see the folder: one makes it, the others wait for it.

    Args:
        names: of all tars of the folder, in order.

    Returns:
        False: there is none, and nobody may write there.

    Raises:
        DataError, SettingsError: as vir.data.foreign.index_shards.
        Stopped: `is_stopping` returned True.
    """
    if (folder / MANIFEST).exists():
        return True
    try:
        with _locked(folder / _LOCK, is_stopping):
            try:
                if not (folder / MANIFEST).exists():
                    log.info("making the index of %s in %s", count_of(len(names)), folder)
                    index_tars(folder, names, jobs=jobs, is_stopping=is_stopping)
            finally:
                (folder / _LOCK).unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"cannot make the index of {folder}: {error.strerror or error}; free space or mend the "
                            "disk, or name the tars by a pattern with --data.index_dir elsewhere") from error
        return False
    return True


def inside(url: str, name: str) -> str:
    """The URL of a file in a folder."""
    if not _is_http(url):  # '?' and '#' are a part of the key
        return f"{url.rstrip('/')}/{name}"
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


def path_of(url: str) -> str:
    """What of a URL names the object on its server; a path as it is."""
    if not is_remote(url):
        return url
    if _is_http(url):
        return urlsplit(url).path
    path = url.partition("://")[2].partition("/")[2]
    tar, is_versioned, _ = path.partition(".tar?")
    return f"/{tar}.tar" if is_versioned else f"/{path}"


def _is_http(url: str) -> bool:
    return url.partition("://")[0].lower() in ("http", "https")


def find_urls(spec: str, timeout: float, is_stopping: Callable[[], bool] = lambda: False) -> list[str]:
    """The URLs of the tars that a text names: a folder, a tar, a pattern with braces, or several joined by `::`.

    Raises:
        DataError: a folder that holds none, that has a manifest, or whose server does not tell what it holds.
        SettingsError: as vir.addresses.expand; a glob.
        Stopped: `is_stopping` returned True.
    """
    urls = expand(spec, MAX_SHARDS)
    if globs := [url for url in urls if is_remote(url) and set("*[") & set(path_of(url))]:
        raise SettingsError(f"{shown(globs[0])!r} has '*' or '[', which servers do not know; name the shards by "
                            "braces, as in {0000..1023}, or give their folder")
    if len(urls) > 1 or path_of(urls[0]).endswith(".tar"):
        return urls
    names = _asked(lambda: open_store(urls[0], timeout).names(urls[0]), is_stopping)
    if names is None:
        raise DataError(f"the server of {shown(urls[0])} does not tell what a folder holds; name the tars by braces, "
                        "as in x-{0000..1023}.tar")
    if MANIFEST in names:
        raise DataError(f"{shown(urls[0])} has a {MANIFEST} beside its shards, which training takes; to index them "
                        "anew, name them by braces, or remove it")
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        raise DataError(f"{shown(urls[0])} holds no .tar; found {some(names)}")
    return [inside(urls[0], name) for name in tars]


def shard_names(urls: Sequence[str]) -> list[str]:
    """By which names a manifest knows the shards: those of the files, with a number before where two are alike.

    Raises:
        DataError: one cannot be printed.
    """
    names = [path_of(url).rstrip("/").rpartition("/")[2] for url in urls]
    if len(set(names)) < len(names) or not all(names):
        names = [f"{number:05d}-{name}" for number, name in enumerate(names)]
    if unsayable := [name for name in names if not name.isprintable()]:
        raise DataError(f"the name of the shard {unsayable[0]!r} is not UTF-8 or cannot be printed; rename it")
    return names


# ---- which shards


def _places(urls: Sequence[str]) -> tuple[str, ...]:
    """URLs as they are, or absolute paths."""
    remote = [is_remote(url) for url in urls]
    if any(remote) and not all(remote):
        raise SettingsError(f"{shown(urls[remote.index(True)])} is on a server and {urls[remote.index(False)]} is not: "
                            "the shards of a split are all remote, or all local; copy or name them so")
    if twice := [url for url, count in Counter(urls).items() if count > 1]:
        raise SettingsError(f"the shard {shown(twice[0])} is named {urls.count(twice[0])} times; name each once")
    return tuple(urls) if remote[0] else tuple(os.path.abspath(url) for url in urls)


def _bare(url: str) -> str:
    """Which file a URL or a path means."""
    return place(url).rstrip("/") if is_remote(url) else url


def _shard_urls(url: str, manifest: SplitManifest) -> tuple[str, ...]:
    return tuple(inside(url, shard.name) for shard in manifest.shards)


def _identities(urls: Sequence[str], timeout: float, is_stopping: Callable[[], bool]) -> tuple[Identity, ...]:
    ended = run_threads(partial(_identity, timeout=timeout), urls, min(MAX_CONNECTIONS, len(urls)), is_stopping)
    found = dict(ended)
    return tuple(found[number] for number in range(len(urls)))


def _identity(url: str, timeout: float) -> Identity:
    """Raises DataError where there is no such shard."""
    if is_remote(url):
        return open_store(url, timeout).stat(url)
    try:
        found = os.stat(url)
    except OSError as error:
        raise DataError(f"cannot read {url}: {error.strerror}; complete the shards, or name those that are there"
                        ) from error
    return Identity(found.st_size, str(found.st_mtime_ns))


def _changed(urls: Sequence[str], before: Sequence[Identity], now: Sequence[Identity]) -> list[str]:
    return [url for url, old, new in zip(urls, before, now) if (old.size, old.tag) != (new.size, new.tag)]


# ---- the folder


def _state(folder: Path) -> list[tuple[int, int, int] | None]:
    """Another one whenever somebody has written in the folder."""
    states: list[tuple[int, int, int] | None] = []
    for name in (MANIFEST, SHARDS):
        try:
            found = os.stat(folder / name)
            states.append((found.st_ino, found.st_size, found.st_mtime_ns))
        except OSError:
            states.append(None)
    return states


def _holds(path: Path, data: bytes) -> bool:
    with suppress(OSError):  # it has just gone
        return path.read_bytes() == data
    return False


def _whole(folder: Path, thorough: bool = False) -> _Known | None:
    """What is known of the shards, where the folder is whole.

    Args:
        thorough: reads the index for its checksum.
    """
    known = _read_shards(folder)
    if known is None or not known.identities or not (folder / MANIFEST).is_file() or not (folder / INDEX).is_file():
        return None
    if thorough:
        try:
            manifest = read_manifest(folder)
            if len(manifest.shards) != len(known.identities) or sha256(folder / INDEX) != manifest.index_sha256:
                raise DataError(f"{folder / INDEX} is not that of {MANIFEST}")
        except (DataError, OSError) as error:
            log.warning("the index in %s is damaged (%s): it is made anew", folder, error)
            return None
    return known


def _read_shards(folder: Path) -> _Known | None:
    """None where there are none, or they are damaged: then they are made anew."""
    try:
        content = json.loads(read_regular(folder / SHARDS, _MAX_SHARDS_BYTES))
        if content["version"] != _VERSION:
            return None
        identities = tuple(Identity(int(size), str(tag), bool(ranged)) for _, size, tag, ranged in content["shards"])
        settings = Settings(**content["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return _Known(identities, settings if settings.classes is None else
                  replace(settings, classes=tuple(settings.classes)))


def _write_shards(folder: Path, urls: Sequence[str], identities: Sequence[Identity], settings: Settings) -> None:
    shards = [[shown(url), *identity] for url, identity in zip(urls, identities)]
    content = {"version": _VERSION, "settings": asdict(settings), "shards": shards}
    replace_text(folder / SHARDS, json.dumps(content, indent=1) + "\n")


def _uncommit(folder: Path) -> None:
    """From here on the folder is not whole, whatever comes."""
    (folder / MANIFEST).unlink(missing_ok=True)
    flush(folder)


@contextmanager
def _writing(folder: Path, is_stopping: Callable[[], bool]) -> Iterator[None]:
    """Makes the folder and keeps others from writing there. Raises DataError in place of an OSError; Stopped."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / _LOCK, is_stopping):
            for left_over in folder.glob(f".*{TEMPORARY}"):  # of one that was killed
                left_over.unlink(missing_ok=True)
            yield
    except OSError as error:
        raise DataError(f"cannot keep an index in {folder}: {error.strerror or error}; free space, or choose another "
                        "folder with --data.index_dir (--index-dir of vir-index and vir-evaluate)") from error


@contextmanager
def _locked(path: Path, is_stopping: Callable[[], bool]) -> Iterator[None]:
    """Waits until no other living process has the lock, and tells for whom.

    Raises:
        OSError: the file cannot be written.
        Stopped: `is_stopping` returned True.
    """
    tells = time.monotonic() + 1.0
    while True:
        try:
            descriptor = lock(path)
            break
        except BlockingIOError:
            if is_stopping():
                raise Stopped from None
            if time.monotonic() >= tells:
                log.warning("waiting for %s, which makes the index in %s", _holder(path), path.parent)
                tells = time.monotonic() + _TELLS_EVERY_S
            time.sleep(random.uniform(0.05, 0.25))
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        unlock(descriptor)


def _holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        if told := read_regular(path, 1024).decode():
            return told
    return "another process"


# ---- how it is made


def _build(folder: Path, urls: Sequence[str], identities: Sequence[Identity], given: Settings, timeout: float,
           jobs: int, is_stopping: Callable[[], bool]) -> SplitManifest:
    """Indexes the shards, and makes the folder whole; until they are all indexed it stays as it is."""
    if jobs < 1:
        raise SettingsError(f"--jobs must be at least 1, got {jobs}")
    known = _read_shards(folder)
    settings = given if known is None else _merged(given, known.settings)
    names = shard_names(urls)
    split, name = _names_for(urls, names, settings)
    log.info("making the index of %s, beginning with %s, in %s", count_of(len(urls)), shown(urls[0]), folder)
    checksums = bool(settings.checksums)
    if is_remote(urls[0]):
        tars = [RemoteTar(url, timeout, identity, file) for url, identity, file in zip(urls, identities, names)]
        classes, shards = index_remote(tars, checksums, settings.classes, jobs, folder, is_stopping)
    else:
        paths = [LocalTar(Path(url), file) for url, file in zip(urls, names)]
        classes, shards = index_local(paths, checksums, settings.classes, jobs, is_stopping)
    _uncommit(folder)
    _write_shards(folder, urls, identities, settings)
    return write_foreign(folder, shards, name, split, classes)


def _merged(given: Settings, before: Settings) -> Settings:
    chosen = {key: value for key, value in vars(given).items() if value is not None}
    return replace(before, **chosen)


def _names_for(urls: Sequence[str], names: Sequence[str], settings: Settings) -> tuple[str, str]:
    """Names of split and data set.

    Raises:
        SettingsError: the given ones cannot be names.
    """
    above = path_of(urls[0]).rpartition("/")[0].rpartition("/")[2]
    split = checked_name("--split", settings.split or (above if NAME.fullmatch(above) else "train"))
    return split, checked_name("--name", settings.name or common_name(names, split))


# ---- how it is fetched


def _asked(ask: Callable[[], T], is_stopping: Callable[[], bool]) -> T:
    """What `ask` returns. It runs in a thread, where stopping() tells it to end. Raises Stopped."""
    (_, answer), = run_threads(lambda ask: ask(), [ask], 1, is_stopping)
    return answer


def _read_small(store: Store, url: str, limit: int) -> bytes:
    """All of an object that should have at most `limit` bytes."""
    data = bytearray()
    for block in store.blocks(url, store.stat(url)):
        data += block
        if len(data) > limit:
            raise DataError(f"{shown(url)} has more than the {limit:,} bytes that it may have; copy the split again")
    return bytes(data)


def _refuse_other_sizes(urls: Sequence[str], manifest: SplitManifest, identities: Sequence[Identity]) -> None:
    for url, shard, identity in zip(urls, manifest.shards, identities):
        if identity.size != shard.bytes:
            raise DataError(f"{shown(url)} has {identity.size:,} bytes, the {MANIFEST} beside it says {shard.bytes:,}; "
                            "copy the split to the server again")


def _fetch_index(store: Store, url: str, folder: Path, manifest: SplitManifest) -> None:
    """Raises DataError where it is missing, or not the one that the manifest names."""
    limit = manifest.num_samples * index_dtype(MAX_INDEX_KEY_BYTES).itemsize + _MAX_INDEX_HEADER
    digest, size = hashlib.sha256(), 0
    try:
        identity = store.stat(url)
    except MissingError as error:
        raise DataError(f"{shown(url)} is missing, beside a {MANIFEST}; copy the split to the server again") from error
    with replacing(folder / INDEX) as path:
        with path.open("wb") as file:
            for block in store.blocks(url, identity):
                if stopping():
                    raise Stopped
                digest.update(block)
                size += len(block)
                if size > limit:
                    break
                file.write(block)
        if digest.hexdigest() != manifest.index_sha256:
            raise DataError(f"{shown(url)} is damaged or of another split: its sha256 is not the one that the "
                            f"{MANIFEST} beside it names; copy the split to the server again")
        _uncommit(folder)


if __name__ == "__main__":
    raise SystemExit("vir.data.index_folder is a part of the library; the program is vir-index")
