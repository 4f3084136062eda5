#!/usr/bin/env bash
# Set-up and all tests, on a machine with a GPU those of the mark gpu too:
#   bash tests/run.sh [--fast] [options of pytest, e.g. -k order]
# --fast leaves out what starts training processes: the rest takes about 7 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh test
flake8 .
isort --check --quiet .
mypy

code=5 # no test was run
pytest_and_go_on() {
  local ended=0
  python -m pytest -q "$@" || ended=$?
  if [ $ended != 5 ] && { [ $code = 5 ] || [ $code = 0 ]; }; then code=$ended; fi
}

what=all
if [ "${1:-}" = --fast ]; then
  what=fast
  shift
else
  CUDA_VISIBLE_DEVICES="" python tests/support/build_ops.py
fi
# Several files at a time, each with one thread; then what starts training, two at a time: it imports and waits much.
OMP_NUM_THREADS=1 pytest_and_go_on -n 3 --dist loadfile -m "not launcher" "$@"
if [ $what = all ]; then
  pytest_and_go_on -n 2 --dist loadfile --no-loadscope-reorder -m launcher "$@"
  if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    pytest_and_go_on -m gpu
  fi
fi
exit $code
