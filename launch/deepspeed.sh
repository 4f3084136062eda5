#!/usr/bin/env bash
# Training by the deepspeed launcher, on this machine or on those of a hostfile:
#
#   bash launch/deepspeed.sh [--hostfile H] [--interface eth0] [--max-restarts N] [--print] OPTIONS OF vir-train
#
# A signal to it reaches every rank on every node. It ends with the exit code of the run (docs/errors.md). The hostfile
# has a line `node1 slots=8` for each machine; ssh without a password, this project, its .venv and the run folder are at
# the same paths on all of them. --help tells the rest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$root/.venv/bin" ] || PATH=$root/.venv/bin:$PATH
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python -m vir.launch deepspeed "$@"
