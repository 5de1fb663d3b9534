#!/usr/bin/env bash
# From nothing but Python and git to an any-step model: set up, then every command of the chain in its order.
#
#   scripts/quickstart.sh [OPTIONS]    OPTIONS go to every command, e.g. --recipe tiny-long or --runs /data/runs
#
# Each command continues what a stopped one left, so the script can simply be started again.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH"

for command in synthesize train-flowmap distill finetune sample evaluate; do
  echo "== anyflow $command $*" >&2
  anyflow "$command" "$@"
done
