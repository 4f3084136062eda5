# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: activates .venv, after making it and installing this project with
# the extra named by $1, by uv where that is installed, else by pip. Skipped where setup.cfg and constraints.txt are
# those of the last installation with that extra or with `test`, which contains the others.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
  echo "$python is not Python 3.10 or newer; install one and name it: PYTHON=python3.11 bash $0" >&2
  exit 2
}
stamp=$(cat setup.cfg constraints.txt | cksum)
if [ "$(cat ".venv/installed-$1" 2>/dev/null)" != "$stamp" ] && [ "$(cat .venv/installed-test 2>/dev/null)" != "$stamp" ]; then
  echo "== installing into .venv (PyTorch, DeepSpeed and timm: several GB, once)"
  uv=$(command -v uv || true)
  # A .venv that one of them has made serves the other, and one that was half made is mended.
  if ! .venv/bin/python -c '' 2>/dev/null; then
    if [ "$uv" ]; then uv venv --quiet --allow-existing --python "$python" .venv; else "$python" -m venv .venv; fi
  fi
  tested=(--constraint constraints.txt) # holds releases that need Python 3.11; on 3.10 the installer chooses
  .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || tested=()
  if [ ! "$uv" ] || ! uv pip install --quiet --python .venv/bin/python "${tested[@]}" --editable ".[$1]"; then
    [ ! "$uv" ] || echo "== uv could not install it, maybe for want of an index that pip knows; now by pip" >&2
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${tested[@]}" --editable ".[$1]"
  fi
  printf '%s' "$stamp" >".venv/installed-$1"
fi
export PATH="$PWD/.venv/bin:$PATH"
