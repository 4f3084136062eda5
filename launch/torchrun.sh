#!/usr/bin/env bash
# Train under torchrun, on this machine or, started on each, on several; options of torchrun and of vir.train:
#
#   bash launch/torchrun.sh --nproc_per_node 8 --config vir/recipes/vir_small_in1k.yaml ...
#   bash launch/torchrun.sh --nnodes 2:4 --rdzv_endpoint node1:29400 --max-restarts 3 --config ...
#
# --print shows the final command and starts nothing. PYTHON chooses the interpreter.
set -euo pipefail
export PYTHONPATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m vir.launch torchrun "$@"
