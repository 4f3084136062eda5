"""Several vir.train commands one after another in the ranks of one launch, because imports cost more than the steps.

usage: deepspeed … tests/several_runs.py COMMANDS.json   (a list of argument lists)
"""

import json
import sys
from pathlib import Path

from vir.train import main

codes = [main(argv) for argv in json.loads(Path(sys.argv[-1]).read_text())]
sys.exit(max(codes))
