"""Starts timm's own training script, as a rank of torchrun, with the timm that is installed.

    torchrun --module vir.benchmarks.timm_script STEPS.log path/to/train.py ARGUMENTS

STEPS.log gets what the script says of its steps, each line after the seconds of the clock when it was said. Started by
its path the script would import the timm that lies beside it.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from typing import Any


def main(argv: list[str]) -> None:
    steps, script, *arguments = argv
    if os.environ["RANK"] == "0":
        handler = logging.FileHandler(steps)
        handler.setFormatter(logging.Formatter("%(created).3f %(message)s"))
        logging.getLogger("train").addHandler(handler)
    if arguments[arguments.index("--device") + 1] == "cpu":
        _without_device_ids()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _without_device_ids() -> None:
    """The script names a device to DistributedDataParallel on CPU too, which that refuses there."""
    from timm.task import ClassificationTask

    prepare = ClassificationTask.prepare_distributed

    def prepared(task: Any, device_ids: Any = None, **arguments: Any) -> Any:
        return prepare(task, **arguments)

    setattr(ClassificationTask, "prepare_distributed", prepared)


if __name__ == "__main__":
    main(sys.argv[1:])
