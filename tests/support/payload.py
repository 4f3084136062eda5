"""What somebody could put into a file so that whoever reads it runs it: each makes a folder, by which it is seen."""

import os
import sys
from pathlib import Path


class Payload:
    """Makes the folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def module(folder: Path, name: str, monkeypatch) -> tuple[Path, Path]:
    """A module on the path; the folders that it makes where it is imported, and where its class `Thing` is built."""
    imported, built = folder / f"{name}-was-imported", folder / f"{name}-was-built"
    (folder / f"{name}.py").write_text(
        f"import os\nos.mkdir({str(imported)!r})\n"
        f"class Thing:\n    def __init__(self, **given):\n        os.mkdir({str(built)!r})\n")
    monkeypatch.syspath_prepend(folder)
    assert name not in sys.modules
    return imported, built
