#!/usr/bin/env bash
# The first hour on a GPU, on a machine with one GPU and Python >= 3.10:
#
#   bash tests/gpu.sh [--minutes 25] [--output runs/gpu] [--rehearse]
#
# Where this project's dependencies are installed in $PYTHON (default python3), they are used. Else .venv is made: from
# ./wheels without a network where that folder is there, beside what $PYTHON has (a torch of the machine, say), or by
# launch/setup.sh. The folder is made elsewhere, by the same version of Python:
#
#   pip wheel --wheel-dir wheels ".[test,gpu]" "setuptools>=68"
#
# --rehearse does every step on CPU at the smallest size, in about two minutes. --output gets gpu.md, gpu.json, logs,
# runs and a trace; all are kept whatever becomes of the later steps.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import deepspeed, jsonargparse, mlxtend, pytest, pytest_timeout, timm, torchvision, webdataset' 2>/dev/null; then
  if [ -d wheels ]; then
    "$python" -m venv --system-site-packages .venv
    .venv/bin/python -m pip install --quiet --no-index --find-links wheels --editable ".[test,gpu]"
    export PATH="$PWD/.venv/bin:$PATH"
  else
    source launch/setup.sh test,gpu
  fi
  python=.venv/bin/python
fi
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m support.gpu_hour "$@"
