"""Which kind of data lies at --data.train, and the reader of it: the one place that tells the kinds apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from vir.addresses import expand, is_remote, shown
from vir.config import DataConfig
from vir.data.access import Access, LocalShards
from vir.data.cache import parse_bytes
from vir.data.folder_reader import FolderReader
from vir.data.foreign import index_beside
from vir.data.index_folder import IndexFolder, default_index_dir, fetch_split, open_index
from vir.data.reader import Reader, ShardReader
from vir.data.remote_shards import CachedShards, RemoteShards
from vir.data.shards import MANIFEST, MAX_SHARDS, read_manifest
from vir.data.sources.archives import ARCHIVES
from vir.data.sources.folder import class_folders, some
from vir.data.sources.tars import tars_in
from vir.data.stores.choose import open_store
from vir.errors import DataError, SettingsError


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


def places(config: DataConfig) -> Places:
    """Raises SettingsError where the size of the cache is none."""
    return Places(index_dir=Path(config.index_dir) if config.index_dir else default_index_dir(), timeout=config.timeout,
                  cache=Path(config.cache) if config.cache else None, cache_bytes=parse_bytes(config.cache_bytes))


def open_reader(spec: str, places: Places, *, first: bool) -> Reader:
    """The images that `spec` names.

    Args:
        spec: a folder of shards, of tars or of one folder per class; or tars: paths, URLs, patterns with braces, globs
            of local files, joined by "::".
        first: whether this is the first process of its machine: it makes the checks that take time.

    Raises:
        DataError, SettingsError: nothing there that is known, or what is there is damaged or cannot be reached.
    """
    parts = expand(spec, MAX_SHARDS)
    remote = [part for part in parts if is_remote(part)]
    if not remote:
        return _open_local(parts, places, first)
    if len(remote) < len(parts):
        raise SettingsError(f"{shown(spec)} joins shards of this machine and of a server; give them as two data sets, "
                            "or copy the ones to the others")
    if len(parts) == 1 and not parts[0].split("?")[0].endswith(".tar"):
        return _open_remote_folder(parts[0], places, first)
    return _open_index(open_index(parts, places.index_dir, places.timeout, first), shown(spec), places, first)


def _open_local(parts: Sequence[str], places: Places, first: bool) -> Reader:
    if len(parts) == 1 and not parts[0].endswith(".tar") and "*" not in parts[0]:
        return _open_folder(Path(parts[0]), first)
    paths = _tars(parts)
    folder = paths[0].parent
    if (folder / MANIFEST).is_file() and [folder / shard.name for shard in read_manifest(folder).shards] == paths:
        return ShardReader(folder, check=first)
    index = open_index([str(path) for path in paths], places.index_dir, places.timeout, first)
    return ShardReader(index.folder, LocalShards(paths), "::".join(parts), check=first)


def _open_folder(folder: Path, first: bool) -> Reader:
    if folder.is_dir() and not (folder / MANIFEST).exists():
        tars = tars_in(folder)
        if tars and not set(tars) & set(ARCHIVES.values()):
            index_beside(folder, tars)
        elif not tars and class_folders(folder):
            return FolderReader(folder)
    return ShardReader(folder, check=first)


def _tars(parts: Sequence[str]) -> list[Path]:
    """The local tars that are named, in order."""
    found: list[Path] = []
    for part in parts:
        paths = sorted(glob(part)) if any(character in part for character in "*?[") else [part]
        if other := [path for path in paths if not path.endswith(".tar")]:
            raise SettingsError(f"{part} names {some(other)}, but of several names each is a .tar; give one folder, or "
                                "name the tars")
        if missing := [path for path in paths if not Path(path).is_file()] or not paths:
            raise DataError(f"no such file: {part if missing is True else missing[0]}; complete the shards, or name "
                            "those that are there")
        found += [Path(path).absolute() for path in paths]
    return found


def _open_remote_folder(url: str, places: Places, first: bool) -> Reader:
    """A folder that vir-convert wrote and somebody copied there, or one of other tars where the server lists them."""
    index = fetch_split(url, places.index_dir, places.timeout, first)
    if index is None:
        names = open_store(url, places.timeout).names(url)
        if names is None:
            raise DataError(f"{shown(url)} has no {MANIFEST}, and the server does not tell what else is there; name "
                            f"the shards, as {shown(url).rstrip('/')}/NAME-{{0000..1023}}.tar")
        if not (tars := [name for name in names if name.endswith(".tar")]):
            raise DataError(f"{shown(url)} has neither a {MANIFEST} nor tars, but {some(names)}; give the folder of one "
                            "split, or name the shards")
        index = open_index([f"{url.rstrip('/')}/{name}" for name in tars], places.index_dir, places.timeout, first)
    return _open_index(index, shown(url), places, first)


def _open_index(index: IndexFolder, name: str, places: Places, first: bool) -> Reader:
    remote = RemoteShards(index.urls, index.identities, places.timeout)
    if places.cache is None and (whole := [url for url, found in zip(index.urls, index.identities) if not found.ranged]):
        raise SettingsError(f"the server of {shown(whole[0])} sends whole files alone, not parts of them: give "
                            "--data.cache a folder on a disk of this machine, or copy the shards to it")
    access: Access = remote
    if places.cache is not None:
        hashes = [shard.sha256 for shard in read_manifest(index.folder).shards]
        access = CachedShards(remote, places.cache, places.cache_bytes, hashes)
    return ShardReader(index.folder, access, name, check=first)


if __name__ == "__main__":
    raise SystemExit("vir.data.opening is a part of the library; the program is vir-train")
