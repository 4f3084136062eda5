"""Makes the index of shards that were made elsewhere; see vir/index.py, which vir-index runs too."""

from __future__ import annotations

import sys

from vir.index import main

if __name__ == "__main__":
    sys.exit(main())
