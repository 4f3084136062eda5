"""Export a weights file as ONNX or a torch.export program; see vir/export.py, which vir-export runs too."""

from __future__ import annotations

import sys

from vir.export import main

if __name__ == "__main__":
    sys.exit(main())
