"""The NVIDIA driver of this machine."""

from __future__ import annotations

import re
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")
"""Where it tells its version."""


def driver_version(driver: Path = DRIVER) -> str:
    """Such as 550.54.15; empty where there is none, "of unknown version" where it says something else."""
    try:
        said = driver.read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", said)
    return found[1] if found else "of unknown version"


if __name__ == "__main__":
    raise SystemExit("vir.driver is a part of the library; the program is vir-train")
