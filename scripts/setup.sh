#!/usr/bin/env bash
# Make the virtual environment that the other scripts use, and install the package into it in editable form.
#
#   scripts/setup.sh [EXTRAS]      EXTRAS as pip writes them, e.g. dev or parquet
#
#   VENV=.venv          where the environment lives
#   PYTHON=python3      the interpreter it is made from (3.10 to 3.13)
#
# An environment that already has what pyproject.toml asks for is left as it is, so the scripts start at once the
# next time.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:-}
venv=${VENV:-.venv}
python=${PYTHON:-python3}

if [ ! -x "$venv/bin/python" ]; then
  if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $python is not Python 3.10, 3.11, 3.12 or 3.13." >&2
    echo "hint: name one that is, e.g. PYTHON=python3.12 $0" >&2
    exit 2
  fi
  if ! "$python" -m venv "$venv" >&2; then
    rm -rf "$venv"
    echo "error: $python cannot make a virtual environment." >&2
    echo "hint: install its venv module (on Debian and Ubuntu: apt install python3-venv)." >&2
    exit 1
  fi
fi

stamp="$venv/.anyflow-${extras:-base}"
if [ ! -e "$stamp" ] || ! cmp -s pyproject.toml "$stamp"; then
  echo "Installing anyflow into $venv (the first time this fetches PyTorch)" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}" >&2
  cp pyproject.toml "$stamp"
fi
