#!/usr/bin/env bash
# Set up the environment, then run the whole chain of commands: from the teacher to an evaluated any-step model.
#
#   scripts/quickstart.sh [OPTIONS]    OPTIONS go to every command, e.g. --recipe tiny-long or --runs /data/runs
#
# After an interruption, run it again: every command continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH"

for command in synthesize train-flowmap distill finetune sample evaluate; do
  echo "== anyflow $command $*" >&2
  anyflow "$command" "$@"
done
