#!/usr/bin/env bash
# Set up, then all checks: ruff, mypy and the tests.
#
#   scripts/test.sh [PYTEST OPTIONS]    e.g. -m slow, or tests/flow -x
#
#   WORKERS=auto        test processes; each uses one thread
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh dev
PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH"

ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=1 pytest -n "${WORKERS:-auto}" "$@"
