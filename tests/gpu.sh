#!/usr/bin/env bash
# The first hour on a GPU, on a machine with one GPU and Python >= 3.10:
#
#   bash tests/gpu.sh [--minutes 25] [--output runs/gpu] [--rehearse]
#
# --output gets gpu.md, gpu.json, logs, runs and a trace; all are kept whatever becomes of the later steps. The same
# command again goes on: it does the steps that are not done. So, where a command may take 10 minutes: --minutes 9,
# three times. --rehearse does every step on CPU at the smallest size, in about two minutes.
#
# $PYTHON (default python3) is used where it has all modules that are needed; one line names those that it lacks. These
# are then installed, with a network into .venv by launch/setup.sh, without one from ./wheels into build/gpu-site, which
# is put before what $PYTHON has. So the folder must hold no more than is lacking, and no torch. It is made elsewhere by
# the same version of Python, of the packages that the hour needs beside torch and what comes with it:
#
#   pip wheel --no-deps --wheel-dir wheels deepspeed einops hjson msgpack ninja psutil py-cpuinfo pydantic \
#     pydantic-core annotated-types typing-inspection timm huggingface-hub accelerate safetensors webdataset \
#     braceexpand jsonargparse docstring-parser typeshed-client tensorboard absl-py grpcio markdown protobuf \
#     tensorboard-data-server werkzeug matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six \
#     mlxtend pytest iniconfig pluggy pytest-timeout numpy packaging pillow pyyaml torchvision tqdm setuptools fla-core
#
# without those that the machine has. torchvision must be of the machine's torch. Without fla-core, which needs torch
# and triton, one row of the operator is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/tests:$PWD/build/gpu-site${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -m support.gpu_hour.modules; then
  if [ -d wheels ]; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target build/gpu-site wheels/*.whl
    "$python" -m support.gpu_hour.modules || exit 2
  else
    source launch/setup.sh test,gpu
    python=.venv/bin/python
  fi
fi
exec "$python" -m support.gpu_hour "$@"
