"""Checks machines before a run on them; see vir/check.py, which vir-check runs too."""

from __future__ import annotations

import sys

from vir.check import main

if __name__ == "__main__":
    sys.exit(main())
