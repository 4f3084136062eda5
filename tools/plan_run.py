"""Tells what a run needs before machines are asked for; see vir/plan.py, which vir-plan runs too."""

from __future__ import annotations

import sys

from vir.plan import command

if __name__ == "__main__":
    sys.exit(command())
