"""Several vir.train commands one after another in the ranks of one launch, because imports cost more than the steps.

usage: several_runs.py COMMANDS.json, in each rank   (a list of argument lists; codesRANK.json gets their exit codes)
"""

import json
import os
import sys
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from vir.train import main

if get_accelerator().device_name() == "cpu":  # slow there, but it computes, and scales the loss, as on a GPU
    get_accelerator().is_fp16_supported = lambda: True
codes = [main(argv) for argv in json.loads(Path(sys.argv[-1]).read_text())]
Path(sys.argv[-1]).with_name(f"codes{os.environ['RANK']}.json").write_text(json.dumps(codes))
