"""Files that a kill or a power cut leaves either as they were or complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, Callable


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Fill a file under a temporary name through `write(file)`, flush it, and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text_atomically(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
