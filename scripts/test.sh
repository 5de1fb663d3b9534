#!/usr/bin/env bash
# Set up the environment, then run every check: files, ruff, mypy, the tests, and other versions of Python.
#
#   scripts/test.sh [PYTEST OPTIONS]    e.g. -m slow, or tests/flow -x; then without the other versions
#
#   WORKERS=auto        test processes; each uses one thread
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh dev
PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH"

python scripts/check_files.py
ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=1 pytest -n "${WORKERS:-auto}" "$@"
if [ $# = 0 ]; then scripts/test_pythons.sh; fi
