"""One consolidation in a process of its own, ours or DeepSpeed's, whose imports and start do not count.

usage: python -m vir.benchmarks.consolidation_run SIDE CHECKPOINT OUTPUT [LIMIT]

Ends by printing the seconds, and the anonymous memory of before in bytes. OUTPUT is a folder; LIMIT the bytes of memory
that the process may have for itself.
"""

from __future__ import annotations

import mmap
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

OURS, SAFE, DEFAULT = "vir-consolidate", "zero_to_fp32 --safe_serialization", "zero_to_fp32"
SIDES = (OURS, SAFE, DEFAULT)


def main(argv: list[str]) -> int:
    side, checkpoint, output, *limit = argv
    act = _ours(Path(checkpoint), Path(output)) if side == OURS else _theirs(checkpoint, output, side == SAFE)
    if limit:
        _hold_to(int(limit[0]))
    before, began = anonymous("self"), time.perf_counter()
    act()
    print(time.perf_counter() - began, before, flush=True)
    os._exit(0)  # taking apart what was imported is not measured


def anonymous(process: int | str) -> int:
    """Bytes in memory that no file backs; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def _ours(checkpoint: Path, output: Path) -> Callable[[], object]:
    from vir.checkpoints.consolidate import consolidate

    return lambda: consolidate(checkpoint, output / "model.safetensors")


def _theirs(checkpoint: str, output: str, safe: bool) -> Callable[[], object]:
    import huggingface_hub.serialization  # noqa: F401  imported when first used
    import safetensors.torch  # noqa: F401
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    folder, tag = os.path.split(checkpoint)
    return lambda: convert_zero_checkpoint_to_fp32_state_dict(folder, output, safe_serialization=safe, tag=tag)


def _hold_to(limit: int) -> None:
    """Of memory that no file backs. Linux counts a private mapping of a file to it, which torch makes unless told
    otherwise, as if all of it were written to."""
    import torch

    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
