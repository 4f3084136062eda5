#!/usr/bin/env bash
# Training by torchrun, on this machine or, by the same command on each of them, on several:
#
#   bash launch/torchrun.sh [--nproc_per_node N] [--max-restarts N] [--print] OPTIONS OF vir-train
#   bash launch/torchrun.sh --nnodes 2:4 --rdzv_endpoint node1:29400 [--max-restarts N] OPTIONS OF vir-train
#
# A signal to one of these scripts reaches every rank on every node. It ends with the exit code of the run
# (docs/errors.md). --help tells the rest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$root/.venv/bin" ] || PATH=$root/.venv/bin:$PATH
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python -m vir.launch torchrun "$@"
