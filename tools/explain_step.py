"""Tells which samples a step of a run had; see vir/explain.py, which vir-explain runs too."""

from __future__ import annotations

import sys

from vir.explain import main

if __name__ == "__main__":
    sys.exit(main())
