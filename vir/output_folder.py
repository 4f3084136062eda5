"""Folders of several files that belong together: they get their names when all of them are whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vir.errors import DataError, SettingsError
from vir.files import TEMPORARY, flush


def check_folder(folder: Path, names: Sequence[str], force: bool) -> None:
    """Raises SettingsError where files of these names cannot come into the folder: to ask before long work.

    Args:
        force: those that exist may be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder} is a file; give the name of a folder")
    if not force and (there := [name for name in names if (folder / name).exists()]):
        raise SettingsError(f"{folder} has {', '.join(there)} already; give another folder, or --force to replace")


@contextmanager
def filling(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder beside `folder`; the files of these names that are in it at the end of the block go there.

    The last one goes last, and what `folder` has under these names is removed before: a kill leaves no mixture that has
    it. Other files stay. After an error in the block nothing has changed.

    Raises:
        DataError: something could not be written.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        made = [name for name in names if (temporary / name).exists()]
        for name in made:
            flush(temporary / name)
        folder.mkdir(exist_ok=True)
        for name in reversed(names):
            (folder / name).unlink(missing_ok=True)
        for name in made:
            os.replace(temporary / name, folder / name)
        flush(folder)
        flush(folder.parent)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
