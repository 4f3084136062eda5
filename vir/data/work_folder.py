"""The folder of a split while it is written: OUTPUT/SPLIT.partial, with what lets a conversion go on after any kill.

    conversion.json        settings and source: what the bytes depend on; and a token
    TOKEN-000000.tar       a finished shard; TOKEN-000000.done is its commit mark, with its rows of the index
    .lock                  held by the conversion that is at work

It is renamed to OUTPUT/SPLIT when all is whole. Processes of another machine can outlive a conversion that was killed.
The token keeps their files apart from those of another conversion; those of the same one have the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vir.data.shards import PARTIAL, SplitManifest, count_of, read_manifest
from vir.errors import DataError, VirError
from vir.files import TEMPORARY, flush, lock, read_regular, replace_text, unlock

JOURNAL = "conversion.json"
LOCK = ".lock"
DONE = ".done"
SCRATCH = ".vir-scratch"
"""In it shards are tried, or written anew."""

_WORKING = re.compile(r"[0-9a-f]{16}-[0-9]{6,}\.(tar|done)|\.[0-9a-f]{16}-[0-9]{6,}\.(tar|done)\..*\.tmp")
"""Names of what a task, or one that was killed, leaves in the folder beside the shards."""

_MAX_JOURNAL_BYTES = 1 << 20


class NotToContinueError(DataError):
    """A conversion that was interrupted cannot be continued with this source and these settings."""


def new_token() -> str:
    return secrets.token_hex(8)


def working_name(token: str, number: int) -> str:
    """Of a shard until all are finished."""
    return f"{token}-{number:06d}.tar"


def finished_shards(folder: Path) -> int:
    """How many shards of the split that is to become `folder` an interrupted conversion has finished."""
    tars = folder.with_name(folder.name + PARTIAL).glob("[!.]*.tar")
    return sum(not _WORKING.fullmatch(path.name) or path.with_suffix(DONE).exists() for path in tars)


@contextmanager
def claimed(folder: Path, record: Mapping[str, Any], shards: int) -> Iterator[tuple[Path, str]]:
    """The partial folder of this conversion of so many shards, new or as it was interrupted, with its lock; its token.

    An exception leaves it, with a word of how to go on, if a shard is finished; otherwise it is removed.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    made = [path for path in (partial, *partial.parents) if not path.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        held = lock(partial / LOCK)
    except BlockingIOError as error:
        raise DataError(f"{partial} is in use: another conversion is writing there; wait for it, end it, or choose "
                        "another --output") from error
    except OSError as error:
        raise DataError(f"cannot write to {folder.parent}: {error.strerror}; choose another --output") from error
    try:
        yield partial, _begin(partial, record)
    except NotToContinueError:
        raise
    except BaseException as error:
        finished = finished_shards(folder)
        if not finished:
            _remove(partial, made)
        elif isinstance(error, VirError):
            raise type(error)(f"{error}. {finished:,} of {count_of(shards)} are finished and kept: the same command "
                              "continues") from error
        raise
    finally:
        unlock(held)


def _begin(partial: Path, record: Mapping[str, Any]) -> str:
    """Writes the journal, or compares it with that of the conversion that was interrupted here; gives its token."""
    try:
        before = _journal(partial)
        if before is None:
            strangers = [path.name for path in partial.iterdir() if path.name != LOCK and
                         not path.name.startswith(f".{JOURNAL}.") and not _WORKING.fullmatch(path.name)]
            if strangers:
                raise NotToContinueError(
                    f"{partial} holds {strangers[0]!r} but no {JOURNAL}: it is not of a conversion that could be "
                    f"continued; remove it (rm -r {partial}) and convert again")
            before = {**record, "token": new_token()}
            replace_text(partial / JOURNAL, json.dumps(before, indent=1) + "\n")
        for left in partial.glob(f".*{TEMPORARY}"):  # of a process that was killed; the lock says that none is at work
            left.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write in {partial}: {error.strerror}; free some space, or choose another --output") \
            from error
    _refuse_another(partial, before, record)
    return str(before.get("token"))


def _refuse_another(partial: Path, before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    if differences := _differences(before, record):
        raise NotToContinueError(
            f"{partial} is of another conversion, which was interrupted: {differences}. Give the same source and "
            f"settings to continue it, or remove it (rm -r {partial}) to start over")


def _journal(partial: Path) -> Mapping[str, Any] | None:
    """The record of the conversion that was interrupted; None if nothing has begun."""
    path = partial / JOURNAL
    try:
        before = json.loads(read_regular(path, _MAX_JOURNAL_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise NotToContinueError(f"cannot read {path}: {error}; remove {partial} and convert again") from error
    if not isinstance(before, dict):
        raise NotToContinueError(f"{path} is damaged; remove {partial} and convert again")
    return before


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two records, for messages; "" if nothing does."""
    def shown(key: str) -> str:
        if key == "images":
            return f"the source had {before.get(key)} images, has {now[key]}"
        if key == "source":
            return "the names, classes or places of the source's images are others"
        if key == "fix":
            return f"--on-error fix was {'given' if before.get(key) else 'not given'}, now it is the other way round"
        if key == "encoders":
            return f"the versions of what encodes were {before.get(key)}, are {now[key]}"
        return f"--{key.replace('_', '-')} was {before.get(key)}, is {now[key]}"
    return "; ".join(shown(key) for key in now if before.get(key) != now[key])


def complete(folder: Path, record: Mapping[str, Any]) -> SplitManifest:
    """The manifest of a split that the same conversion has written; DataError if it was another one."""
    again = "remove it to convert again, or choose another --output"
    if not folder.is_dir():
        raise DataError(f"{folder} exists already and is no folder; {again}")
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        raise DataError(f"{folder} exists already; {again}") from error
    if manifest.conversion is None:
        raise DataError(f"{folder} exists already; {again}")
    # Whatever would encode now, it is written.
    if differences := _differences(manifest.conversion, {**record, "encoders": manifest.conversion.get("encoders")}):
        raise DataError(f"{folder} exists already, from another conversion ({differences}); {again}")
    with suppress(OSError):  # the folder may be read-only by now
        _sweep(folder)
    return manifest


def found_before(folder: Path, record: Mapping[str, Any]) -> int:
    """How many shards the conversion will find finished. Raises DataError where it would be refused."""
    if os.path.lexists(folder):
        return len(complete(folder, record).shards)
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.is_dir() and (before := _journal(partial)) is not None:
        _refuse_another(partial, before, record)
    return finished_shards(folder)


def name_shards(partial: Path, token: str, manifest: SplitManifest) -> None:
    """Gives the shards the names in the manifest. A kill at any moment leaves what the next call can finish."""
    for number, shard in zip(dealt_numbers(manifest, len(manifest.shards) + len(_empty(manifest))), manifest.shards):
        if not (partial / shard.name).exists():
            os.rename(partial / working_name(token, number), partial / shard.name)


def publish(partial: Path, folder: Path) -> None:
    """Gives the folder its name, without what only the conversion needed."""
    flush(partial)
    os.rename(partial, folder)
    _sweep(folder)
    flush(folder.parent)


def _sweep(folder: Path) -> None:
    """Removes what a conversion leaves beside a split: its own marks, and what a process of another machine that
    outlived it has written since."""
    for path in folder.iterdir():
        if path.name in (JOURNAL, LOCK) or path.name.startswith(f".{JOURNAL}.") or _WORKING.fullmatch(path.name):
            path.unlink(missing_ok=True)


def dealt_numbers(manifest: SplitManifest, count: int) -> list[int]:
    """Which of so many dealt shards have images, in order: they have the names of the manifest."""
    empty = set(_empty(manifest))
    return [number for number in range(count) if number not in empty]


def _empty(manifest: SplitManifest) -> list[int]:
    empty = (manifest.conversion or {}).get("empty_shards")
    return empty if isinstance(empty, list) else []


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """A folder in `place` that is empty, and gone after the block; one that a kill has left is taken up."""
    scratch = place / SCRATCH
    try:
        if scratch.is_symlink():
            raise OSError(errno.EEXIST, f"{SCRATCH} is a link")
        scratch.mkdir(exist_ok=True)
        held = lock(scratch / LOCK)
    except BlockingIOError as error:
        raise DataError(f"{scratch} is in use by another vir-convert or vir-verify; wait for its end") from error
    except OSError as error:
        raise DataError(f"cannot write in {place}: {error.strerror}; make it writable, or give another folder") \
            from error
    try:
        for left in scratch.iterdir():
            if left.name != LOCK:
                left.unlink()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        unlock(held)


def _remove(partial: Path, made: Sequence[Path]) -> None:
    """What this conversion has made and nothing was written to: the partial folder and those above it."""
    for path in made:
        if path == partial:
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # something else lies there
                path.rmdir()


if __name__ == "__main__":
    raise SystemExit("vir.data.work_folder is a part of the library; the program is vir-convert")
