"""What programs write: asked for at the door; folders of several files get their names when all of them are whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vir.errors import DataError, SettingsError
from vir.files import TEMPORARY, flush, try_to_write


def check_folder(folder: Path, names: Sequence[str], force: bool) -> None:
    """Raises SettingsError where files of these names cannot come into the folder: to ask before long work.

    Args:
        force: files that exist may be replaced; what is no regular file may not.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise SettingsError(f"{folder} is a file; give the name of a folder")
    there = [name for name in names if os.path.lexists(folder / name)]
    if others := [name for name in there if not os.path.isfile(folder / name)]:
        raise SettingsError(f"{folder} has {', '.join(others)}, which is no regular file; give another folder, or "
                            "remove it")
    if there and not force:
        raise SettingsError(f"{folder} has {', '.join(there)} already; give another folder, or --force to replace")


def check_file(flag: str, path: Path | None) -> None:
    """Raises SettingsError where a file that is named by a flag cannot be written: to ask before long work."""
    try:
        if path is not None:
            try_to_write(path)
    except OSError as error:
        raise SettingsError(f"{flag} {path} cannot be written: {error.strerror}; give a file in a folder that is there"
                            ) from error


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """OSErrors of the block become the DataError that `what` cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {what}: {error}; free some space or choose another folder") from error


@contextmanager
def filling(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A hidden folder in `folder`; the files of these names that are in it at the end of the block go into `folder`.

    In it, because `folder` may be a disk of its own, or all that may be written. The last file goes last, and what
    `folder` has under these names is removed before, when the new ones are on disk: a kill leaves no mixture that has
    the last one. Other files stay. After an error in the block nothing has changed: folders that were made are gone.

    Raises:
        DataError: the folder or a name in it could not be made. What fails in the block is its own.
    """
    folder = Path(os.path.realpath(folder))
    new_folders = [one for one in (folder, *folder.parents) if not os.path.exists(one)]
    temporary = folder / f".{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(folder):
            _take_places(temporary, folder, names)
            for one in (folder, *(new.parent for new in new_folders)):
                flush(one)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for one in new_folders:
            with suppress(OSError):  # it has files, and so have those above it
                one.rmdir()


def _take_places(temporary: Path, folder: Path, names: Sequence[str]) -> None:
    made = [name for name in names if (temporary / name).exists()]
    for name in made:
        flush(temporary / name)
    for name in reversed(names):
        (folder / name).unlink(missing_ok=True)
    for name in made:
        os.replace(temporary / name, folder / name)
