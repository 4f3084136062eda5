"""Which kind of data lies at --data.train, and the reader of it: the one place that tells the kinds apart."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vir import distributed
from vir.addresses import expand, is_remote, shown
from vir.config import DataConfig, parse_bytes
from vir.data.access import Access, LocalShards
from vir.data.folder_reader import FolderReader
from vir.data.foreign import find_paths, is_glob
from vir.data.index_folder import (
    IndexFolder,
    default_index_dir,
    fetch_split,
    find_urls,
    has_index,
    index_beside,
    open_index,
    path_of,
)
from vir.data.reader import Reader, ShardReader
from vir.data.remote_shards import CachedShards, RemoteShards
from vir.data.shards import MANIFEST, MAX_SHARDS, read_manifest
from vir.data.sources.archives import ARCHIVES
from vir.data.sources.folder import class_folders, some
from vir.data.sources.tars import tars_in
from vir.errors import DataError, SettingsError
from vir.log import log


class NoIndexError(DataError):
    """Shards have no index, and none shall be made."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """What of the data is kept on this machine, and how long a server is waited for."""

    index_dir: Path
    """For the indexes of shards that have none beside them."""
    timeout: float
    """Seconds without an answer of a server."""
    cache: Path | None = None
    """A folder for whole shards from servers."""
    cache_bytes: int = 0
    """The most that it may hold."""
    is_stopping: Callable[[], bool] = lambda: False
    """Asked several times a second while an index is made."""
    makes_indexes: bool = True
    """False: that of shards is read as it is, and NoIndexError raised where there is none."""


def places(data: DataConfig, is_stopping: Callable[[], bool] = lambda: False) -> Places:
    """Raises SettingsError where the size of the cache is none, or one of the folders is a URL."""
    for name in ("cache", "index_dir"):
        if is_remote(getattr(data, name)):
            raise SettingsError(f"--data.{name} {shown(getattr(data, name))} is a URL; give a folder of this machine")
    return Places(index_dir=Path(data.index_dir) if data.index_dir else default_index_dir(), timeout=data.timeout,
                  cache=Path(data.cache) if data.cache else None,
                  cache_bytes=parse_bytes(data.cache_bytes, "--data.cache_bytes"), is_stopping=is_stopping)


def open_reader(spec: str, places: Places, *, first: bool) -> Reader:
    """The images that `spec` names.

    Args:
        spec: a folder of shards, of tars or of one folder per class; or tars: paths, URLs, patterns with braces, globs
            of local files, joined by "::".
        first: whether this is the first process of its machine: it makes the checks that take time.

    Raises:
        DataError, SettingsError: nothing there that is known, or what is there is damaged or cannot be reached.
        Stopped: as `places` was asked to.
    """
    parts = expand(spec, MAX_SHARDS)
    if not any(map(is_remote, parts)):
        return _open_local(spec, parts, places, first)
    index = None
    if len(parts) == 1 and not path_of(parts[0]).endswith(".tar"):
        index = fetch_split(parts[0], places.index_dir, places.timeout, first, places.is_stopping)
    if index is None:
        index = _index(find_urls(spec, places.timeout, places.is_stopping), places, first)
    return _open_remote(index, shown(spec), places, first)


def check_agreement(flag: str, reader: Reader) -> None:
    """Each process has listed the images, or found their index, by itself. Collective.

    Raises:
        DataError: a folder that is being changed, machines that see other images at the same path.
    """
    said = distributed.gather((reader.fingerprint, socket.gethostname()))
    if other := [rank for rank, (fingerprint, _) in enumerate(said) if fingerprint != said[0][0]]:
        raise DataError(f"{flag} {reader.name} has other images for rank {other[0]} ({said[other[0]][1]}) than for "
                        f"rank 0 ({said[0][1]}); see that it is the same on all machines and that nothing changes it, "
                        "and start again")


def _open_local(spec: str, parts: Sequence[str], places: Places, first: bool) -> Reader:
    folder = Path(parts[0])
    if len(parts) == 1 and folder.is_dir():
        return _open_folder(folder, places, first)
    if len(parts) == 1 and not parts[0].endswith(".tar") and not is_glob(parts[0]):
        return ShardReader(folder, check=first)  # which tells what is there instead
    return _open_tars(_tars(spec), places, first)


def _open_folder(folder: Path, places: Places, first: bool) -> Reader:
    tars = tars_in(folder)
    if (folder / MANIFEST).exists():
        if first:
            _tell_of_more(folder, tars)
    elif tars and not set(tars) & set(ARCHIVES.values()):
        if not (places.makes_indexes and index_beside(folder, tars, is_stopping=places.is_stopping)):
            return _open_tars([folder / name for name in tars], places, first)
    elif not tars and (found := class_folders(folder)):
        if inner := [name for name in found[:3] if _is_split(folder / name)]:
            raise DataError(f"{folder} holds {some(found)}, in which the images or shards lie; give one of them, as "
                            f"{folder / inner[0]}")
        return FolderReader(folder)
    return ShardReader(folder, check=first)  # where it is no split, it tells what is there instead


def _tell_of_more(folder: Path, tars: Sequence[str]) -> None:
    """Of tars from elsewhere that have come after their index."""
    manifest = read_manifest(folder)
    more = sorted(set(tars) - {shard.name for shard in manifest.shards})
    if more and not manifest.is_converted:
        log.warning("%s holds tars that are not in its index, and are not read: %s; vir-index %s takes them in", folder,
                    some(more), shlex.quote(str(folder)))


def _is_split(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or bool(tars_in(folder)) or bool(class_folders(folder))


def _open_tars(paths: Sequence[Path], places: Places, first: bool) -> Reader:
    folder = paths[0].parent
    if (folder / MANIFEST).is_file() and [folder / shard.name for shard in read_manifest(folder).shards] == paths:
        return ShardReader(folder, check=first)
    index = _index([str(path) for path in paths], places, first)
    return ShardReader(index.folder, LocalShards(paths), str(folder), check=first, is_hashed=True)


def _index(tars: Sequence[str], places: Places, first: bool) -> IndexFolder:
    if not places.makes_indexes and not has_index(tars, places.index_dir):
        raise NoIndexError(f"{shown(tars[0])} and the shards with it have no index yet; make it by vir-index first")
    return open_index(tars, places.index_dir, places.timeout, first and places.makes_indexes,
                      is_stopping=places.is_stopping)


def _tars(spec: str) -> list[Path]:
    """The local tars that are named, in order."""
    paths = find_paths(spec)
    if other := [path for path in paths if not path.endswith(".tar")]:
        raise SettingsError(f"{spec} names {some(other)}, but where several are named each is a .tar; give one folder, "
                            "or name the tars")
    return [Path(path).absolute() for path in paths]


def _open_remote(index: IndexFolder, name: str, places: Places, first: bool) -> Reader:
    hashes = [shard.sha256 for shard in read_manifest(index.folder).shards]
    cache = places.cache if places.cache is not None and _can_keep(index, hashes, first) else None
    if cache is None and (whole := [url for url, found in zip(index.urls, index.identities) if not found.ranged]):
        raise SettingsError(f"the server of {shown(whole[0])} sends whole files alone, not parts of them: give "
                            "--data.cache (vir-evaluate: --cache) a folder on a disk of this machine, or copy the "
                            "shards to it")
    remote = RemoteShards(index.urls, index.identities, places.timeout)
    access: Access = remote if cache is None else CachedShards(remote, cache, places.cache_bytes, hashes)
    return ShardReader(index.folder, access, name, check=first, is_hashed=True)


def _can_keep(index: IndexFolder, sha256s: Sequence[str | None], first: bool) -> bool:
    """Whether a cache can tell the shards from later ones of the same names and sizes; where not, the first process
    tells. SettingsError: they cannot be read in another way."""
    shards = zip(index.urls, index.identities, sha256s)
    unknown = [(url, found.ranged) for url, found, sha256 in shards if not found.tag and sha256 is None]
    if not unknown:
        return True
    reason = (f"the server of {shown(unknown[0][0])} sends neither ETag nor Last-Modified, so a cache could not see "
              "that a shard was replaced")
    if not all(is_ranged for _, is_ranged in unknown):
        raise SettingsError(f"{reason}, and sends whole files alone; make the index by vir-index --checksums, have the "
                            "server send an ETag, or copy the shards to this machine")
    if first:
        log.warning("%s: all is read in parts from the server; to use --data.cache, make the index by vir-index "
                    "--checksums, or have the server send an ETag", reason)
    return False


if __name__ == "__main__":
    raise SystemExit("vir.data.opening is a part of the library; the program is vir-train")
