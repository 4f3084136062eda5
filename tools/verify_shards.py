"""Checks every byte of converted shards; see vir/verify.py, which vir-verify runs too."""

from __future__ import annotations

import sys

from vir.verify import main

if __name__ == "__main__":
    sys.exit(main())
