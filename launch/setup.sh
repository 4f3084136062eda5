# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: activates .venv, after making it and installing this project with
# the extra named by $1. Skipped where setup.cfg and constraints.txt are those of the last installation with that extra
# or with `test`, which contains the others.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
  echo "$python is not Python 3.10 or newer; install one and name it: PYTHON=python3.11 bash $0" >&2
  exit 2
}
stamp=$(cat setup.cfg constraints.txt | cksum)
if [ "$(cat ".venv/installed-$1" 2>/dev/null)" != "$stamp" ] && [ "$(cat .venv/installed-test 2>/dev/null)" != "$stamp" ]; then
  echo "== installing into .venv (PyTorch, DeepSpeed and timm: several GB, once)"
  .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
  tested=(--constraint constraints.txt) # holds releases that need Python 3.11; on 3.10 pip chooses
  .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || tested=()
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${tested[@]}" --editable ".[$1]"
  printf '%s' "$stamp" >".venv/installed-$1"
fi
export PATH="$PWD/.venv/bin:$PATH"
