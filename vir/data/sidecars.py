"""Files beside the shards of a split by which other programs read them: indexes, sample counts, shard lists.

    timm        _info.json                     sample counts, for timm's create_dataset("wds/...")
    dali        SHARD.idx                      members of each sample with offsets, for NVIDIA DALI
    energon     SHARD.tar.idx and .nv-meta/    offsets of samples, for NVIDIA Megatron Energon
    wids        shardindex.json                shard list with sample counts, for wids
    open_clip   sizes.json                     sample counts, for open_clip

Their bytes depend on the shards and the manifest alone (Energon's index.sqlite also on the version of SQLite).
"""

from __future__ import annotations

import json
import sqlite3
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vir.data.random_access import LocalFile
from vir.data.shards import ShardInfo, SplitManifest, read_manifest
from vir.data.tar import Member, padded, scan
from vir.data.tar_samples import IMAGES, split_name
from vir.errors import DataError, SettingsError
from vir.files import open_regular, replace_text, replacing

ENERGON_FOLDER = ".nv-meta"

_ROWS_AT_ONCE = 4096

# What `energon prepare` of version 7.4 makes; its readers select from these tables and columns by name.
_ENERGON_TABLES = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
                      byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER,
                           content_byte_size INTEGER);
"""
_ENERGON_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset,
                                                   content_byte_size);
"""


class _Part(NamedTuple):
    """A member that is a part of a sample."""

    is_first: bool
    """Of its sample."""
    key: str
    extension: str
    member: Member


def parse_kinds(text: str) -> tuple[str, ...]:
    """The kinds that a flag names, separated by commas. Raises SettingsError where one is unknown."""
    return _checked([kind.strip() for kind in text.split(",") if kind.strip()])


def write_sidecars(folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Writes the files of the given kinds beside the shards of a split that has a manifest; returns their paths.

    Files of the same name are replaced, each when its successor is whole. Only Energon's dataset.yaml, which is made to
    be edited, stays where there is one.

    Raises:
        SettingsError: a kind that is none of KINDS.
        DataError: no manifest, a shard that is damaged or not that of the manifest, a name that a format cannot hold,
            a folder that cannot be written.
    """
    folder, kinds = Path(folder).absolute(), _checked(kinds)
    if not kinds:
        return []
    manifest = read_manifest(folder)
    try:
        return [path for kind in kinds for path in _WRITERS[kind](folder, manifest)]
    except OSError as error:
        raise DataError(f"cannot write the files of {', '.join(kinds)} in {folder}: {error.strerror}; free some space, "
                        "or make the folder writable") from error


def _checked(kinds: Sequence[str]) -> tuple[str, ...]:
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise SettingsError(f"--also {unknown[0]!r} is none of {', '.join(KINDS)}")
    return tuple(dict.fromkeys(kinds))


def _write_timm(folder: Path, manifest: SplitManifest) -> list[Path]:
    has_cls = "cls" in _extensions_of_first(folder, manifest)
    split = {"name": manifest.split, "filenames": [shard.name for shard in manifest.shards],
             "shard_lengths": [shard.num_samples for shard in manifest.shards], "num_samples": manifest.num_samples,
             "alt_label": "" if has_cls else "label"}  # the field of the json that is the label
    return [_write_json(folder / "_info.json", {"name": manifest.name, "version": "1.0.0",
                                                "splits": {manifest.split: split}})]


def _write_open_clip(folder: Path, manifest: SplitManifest) -> list[Path]:
    return [_write_json(folder / "sizes.json", {shard.name: shard.num_samples for shard in manifest.shards})]


def _write_wids(folder: Path, manifest: SplitManifest) -> list[Path]:
    """Without md5 sums, which wids does not ask for: they would need all bytes of the shards."""
    shards = [{"url": shard.name, "nsamples": shard.num_samples, "filesize": shard.bytes} for shard in manifest.shards]
    return [_write_json(folder / "shardindex.json", {
        "__kind__": "wids-shard-index-v1", "wids_version": 1, "name": f"{manifest.name}-{manifest.split}",
        "shardlist": shards})]


def _write_dali(folder: Path, manifest: SplitManifest) -> list[Path]:
    """Index version 1.2: the number of samples, then for each a line of EXTENSION OFFSET SIZE NAME for each member."""
    paths = []
    for shard in manifest.shards:
        path = folder / f"{shard.name.removesuffix('.tar')}.idx"
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(f"v1.2 {shard.num_samples}")
            for part in _parts(folder, shard):
                name, extension = part.member.name, part.extension
                if name.split() != [name] or not extension:
                    raise DataError(f"{folder / shard.name} has a member {name!r}: DALI's index cannot hold a name "
                                    "with white space or an empty ending; leave out dali, or write the shards again")
                file.write(f"{chr(10) if part.is_first else ' '}{extension} {part.member.offset} {part.member.size} "
                           f"{name}")
            file.write("\n")
        paths.append(path)
    return paths


def _write_energon(folder: Path, manifest: SplitManifest) -> list[Path]:
    meta = folder / ENERGON_FOLDER
    meta.mkdir(exist_ok=True)
    paths = [_energon_offsets(folder, shard) for shard in manifest.shards]
    paths.append(_energon_database(meta / "index.sqlite", folder, manifest))
    info = {"energon_version": None, "shard_counts": {shard.name: shard.num_samples for shard in manifest.shards}}
    splits = {"split_parts": {manifest.split: [shard.name for shard in manifest.shards]}, "exclude": []}
    texts = {
        "index.uuid": str(uuid.UUID(hex=manifest.fingerprint[:32])),  # names the state of the data
        ".info.json": json.dumps(info, indent=2),
        ".info.yaml": yaml.safe_dump(info, sort_keys=False),  # for versions before 7
        "split.yaml": yaml.safe_dump(splits, sort_keys=False),
        "dataset.yaml": yaml.safe_dump(_energon_dataset(_extensions_of_first(folder, manifest)), sort_keys=False),
    }
    for name, text in texts.items():
        if name != "dataset.yaml" or not (meta / name).exists():
            replace_text(meta / name, text)
            paths.append(meta / name)
    return paths


def _energon_offsets(folder: Path, shard: ShardInfo) -> Path:
    """Where each sample begins, and where the last one ends, in 64-bit numbers."""
    path = folder / f"{shard.name}.idx"
    end = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for part in _parts(folder, shard):
            if part.is_first:
                file.write(struct.pack("<Q", part.member.start))
            end = _end(part.member)
        file.write(struct.pack("<Q", end))
    return path


def _energon_database(path: Path, folder: Path, manifest: SplitManifest) -> Path:
    """Samples by key and their members, for Energon's random access and joins."""
    try:
        with replacing(path) as temporary, closing(sqlite3.connect(temporary, isolation_level=None)) as database:
            database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_ENERGON_TABLES} BEGIN;")
            for number, shard in enumerate(manifest.shards):
                _fill(database, number, _parts(folder, shard))
            database.execute("COMMIT")
            database.executescript(_ENERGON_INDEXES)
    except sqlite3.IntegrityError as error:
        raise DataError(f"{folder} has a key twice ({error}); copy the split again, or index it again with vir-index"
                        ) from error
    except sqlite3.Error as error:
        raise DataError(f"cannot write {path}: {error}; free some space, or leave out energon") from error
    return path


def _fill(database: sqlite3.Connection, number: int, parts: Iterator[_Part]) -> None:
    """The rows of one shard."""
    samples: list[tuple[int, str, int, int, int]] = []
    members: list[tuple[int, int, str, int, int]] = []
    index, key, start, end = -1, "", 0, 0

    def flush() -> None:
        database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", samples)
        database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", members)
        samples.clear()
        members.clear()

    for part in parts:
        if part.is_first:
            if index >= 0:
                samples.append((number, key, index, start, part.member.start - start))
            index, key, start = index + 1, part.key, part.member.start
        members.append((number, index, part.extension, part.member.offset, part.member.size))
        end = _end(part.member)
        if len(members) >= _ROWS_AT_ONCE:
            flush()
    if index >= 0:
        samples.append((number, key, index, start, end - start))
    flush()


def _energon_dataset(extensions: Sequence[str]) -> dict[str, Any]:
    """How Energon makes its image classification samples of the members."""
    images = [extension for extension in extensions if extension.lower() in IMAGES]
    label = ({"label": "cls"} if "cls" in extensions else {"label": "json[label]"} if "json" in extensions else
             {"label_name": "txt"})
    return {"sample_type": {"__module__": "megatron.energon", "__class__": "ImageClassificationSample"},
            "field_map": {"image": ",".join(dict.fromkeys([*images, *IMAGES])), **label}}


def _extensions_of_first(folder: Path, manifest: SplitManifest) -> list[str]:
    """The endings of the members of the first sample."""
    extensions: list[str] = []
    for part in _parts(folder, manifest.shards[0]):
        if part.is_first and extensions:
            break
        extensions.append(part.extension)
    return extensions


def _parts(folder: Path, shard: ShardInfo) -> Iterator[_Part]:
    """The members of the samples of a shard, as the programs see them: hidden files and names without a dot are none.

    Raises:
        DataError: the shard is damaged, or has not the samples of the manifest.
    """
    path = folder / shard.name
    last, count = None, 0
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror}; copy the split again") from error
    with open(descriptor, "rb", buffering=0):
        for member in scan(LocalFile(descriptor), str(path)):
            key, extension = split_name(member.name)
            stem = key.rpartition("/")[2]
            if extension is None or not stem:
                continue
            if stem.startswith("__"):
                raise DataError(f"{path} has a member {member.name!r} that is no sample, but other programs take it "
                                "for one; write the shard again without it")
            is_first, last = key != last, key
            count += is_first
            yield _Part(is_first, key, extension, member)
    if count != shard.num_samples:
        raise DataError(f"{path} has {count} samples, the manifest says {shard.num_samples}: the shard was changed; "
                        "copy the split again, or index it again with vir-index")


def _end(member: Member) -> int:
    """Of its content and what fills the last block."""
    return member.offset + padded(member.size)


def _write_json(path: Path, content: dict[str, Any]) -> Path:
    replace_text(path, json.dumps(content, indent=1) + "\n")
    return path


_WRITERS: dict[str, Callable[[Path, SplitManifest], list[Path]]] = {
    "timm": _write_timm, "dali": _write_dali, "energon": _write_energon, "wids": _write_wids,
    "open_clip": _write_open_clip}

KINDS = tuple(_WRITERS)


if __name__ == "__main__":
    raise SystemExit("vir.data.sidecars is a part of the library; the programs are vir-index and vir-convert")
