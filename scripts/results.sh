#!/usr/bin/env bash
# Evaluate a recipe's model at 1 to 32 steps and copy its reports to docs/evaluate.
#
#   scripts/results.sh RECIPE NAME [OPTIONS]    OPTIONS are passed to `anyflow evaluate`, e.g. --model ADDRESS
#
# Existing videos are reused, so after an evaluation this only writes NAME.md, NAME-*.png and NAME.html there.
# The page has all videos in it and is too large for git; .gitignore leaves it out.
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=$1 name=$2
shift 2
found=runs/$recipe/evaluate
anyflow evaluate --recipe "$recipe" --nfe 1,2,4,8,16,32 --out "$found" "$@"
mkdir -p docs/evaluate
cp "$found/report.html" "docs/evaluate/$name.html"
cp "$found/scores.md" "docs/evaluate/$name.md"
for figure in scores chunks; do
  if [ -f "$found/$figure.png" ]; then cp "$found/$figure.png" "docs/evaluate/$name-$figure.png"; fi
done
ls "docs/evaluate/$name"*
