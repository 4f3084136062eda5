from pathlib import Path
from typing import Sequence
KINDS = ("timm", "dali", "energon", "wids", "open_clip")
def check_kinds(kinds: Sequence[str]) -> None: ...
def write_sidecars(folder: Path, kinds: Sequence[str]) -> list[Path]: return []
