#!/usr/bin/env bash
# Set-up and all tests: bash tests/run.sh [options of pytest, e.g. -k order]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh test
flake8 .
isort --check --quiet .
python -m pytest -q "$@"
