"""Turn a ZeRO checkpoint into one portable weights file; see vir/consolidate.py, which vir-consolidate runs too."""

from __future__ import annotations

import sys

from vir.consolidate import main

if __name__ == "__main__":
    sys.exit(main())
