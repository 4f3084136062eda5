"""Converts an ImageNet folder into WebDataset shards; see vir/convert.py, which vir-convert runs too."""

from __future__ import annotations

import sys

from vir.convert import main

if __name__ == "__main__":
    sys.exit(main())
