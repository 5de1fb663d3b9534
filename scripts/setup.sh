#!/usr/bin/env bash
# Create the virtual environment of the other scripts and install this package into it, in editable mode.
#
#   scripts/setup.sh [EXTRAS]      extras of pyproject.toml, e.g. dev or parquet
#
#   VENV=.venv          directory of the environment
#   PYTHON=python3      interpreter that creates it (3.10 to 3.13)
#
# If the environment is already up to date with pyproject.toml, this returns at once.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:-}
venv=${VENV:-.venv}
python=${PYTHON:-python3}

if [ ! -x "$venv/bin/python" ]; then
  if [ -n "$(ls -A "$venv" 2> /dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    echo "error: $venv is not a virtual environment, and it is not empty." >&2
    echo "hint: choose another directory, e.g. VENV=.venv $0" >&2
    exit 2
  fi
  if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $python is not Python 3.10, 3.11, 3.12 or 3.13." >&2
    echo "hint: choose another interpreter, e.g. PYTHON=python3.12 $0" >&2
    exit 2
  fi
  [ -e "$venv" ] || created=yes
  if ! "$python" -m venv "$venv" >&2; then
    [ -z "${created:-}" ] || rm -rf "$venv"
    echo "error: $python cannot create a virtual environment." >&2
    echo "hint: install its venv module (on Debian and Ubuntu: apt install python3-venv)." >&2
    exit 1
  fi
fi

stamp="$venv/.anyflow-${extras:-base}"
if [ ! -e "$stamp" ] || ! cmp -s pyproject.toml "$stamp"; then
  echo "Installing anyflow into $venv (the first time this downloads PyTorch)" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}" >&2
  cp pyproject.toml "$stamp"
fi
