#!/usr/bin/env bash
# Set-up and all tests, on a machine with a GPU those of the mark gpu too:
#   bash tests/run.sh [--fast] [options of pytest, e.g. -k order]
# --fast leaves out what starts training processes: the rest takes under 4 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh test
flake8 .
isort --check --quiet .
mypy
if [ "${1:-}" = --fast ]; then
  shift
  exec python -m pytest -q -m "not launcher" "$@"
fi
CUDA_VISIBLE_DEVICES="" python tests/support/build_ops.py
python -m pytest -q "$@"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  python -m pytest -q -m gpu
fi
