#!/usr/bin/env bash
# Test the oldest and the newest Python that pyproject.toml claims, as far as they are installed.
#
#   scripts/test_pythons.sh [--all]
#
# By default without PyTorch and what builds on it: each interpreter compiles every module and runs the tests of
# recipes, prompts, scores, files and command lines, in about half a minute. --all installs everything
# (several GB) and runs the whole suite.
#
#   PYTHONS="3.10 3.13"   versions to look for, on the PATH and below ~/.pyenv
set -euo pipefail
cd "$(dirname "$0")/.."

light=(
  tests/recipe tests/data/test_prompts.py tests/data/test_shapes_world.py tests/evaluate/test_frechet.py
  tests/evaluate/test_per_chunk.py tests/evaluate/test_suite.py
  tests/evaluate/vbench/test_prompts.py tests/runs/test_paths.py tests/utils/test_contact_sheet.py
  tests/utils/test_records.py tests/utils/test_safe_child.py tests/test_readme.py
)

find_python() {  # the path of an interpreter of version $1, or nothing
  local candidate
  for candidate in "$(command -v "python$1")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
}

light_requirements() {  # what pyproject.toml asks for, without PyTorch and what builds on it
  "$1/bin/python" - << 'LIST'
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
import re
heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "tensorboard"}
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in [*project["dependencies"], "pyarrow", "pytest", "pytest-xdist"]:
    if re.split("[<>=]", requirement)[0] not in heavy:
        print(requirement)
LIST
}

for version in ${PYTHONS:-3.10 3.13}; do
  python=$(find_python "$version")
  if [ -z "$python" ]; then
    echo "Python $version is not installed here: skipped" >&2
    continue
  fi
  echo "== Python $version ($python)" >&2
  venv=.venv-$version
  if [ "${1:-}" = --all ]; then
    VENV=$venv PYTHON=$python scripts/setup.sh dev
    OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n "${WORKERS:-auto}"
  else
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    light_requirements "$venv" | xargs "$venv/bin/python" -m pip install --quiet --disable-pip-version-check
    "$venv/bin/python" -m compileall -q anyflow_cli tests scripts benchmarks
    OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -n "${WORKERS:-auto}" -p no:cacheprovider "${light[@]}"
  fi
done
