#!/usr/bin/env bash
# The causal result at tiny scale: data, both stages, the consistency baseline from the same start for as many steps,
# scores of all at 1 to 32 steps beside the teacher's at 50 x 2, and quality chunk by chunk before and after stage 2.
#
#   scripts/causal.sh [OPTIONS]    OPTIONS go to every command, e.g. --set data.path=runs/tiny-long/data
#
# Each command continues what a stopped one left, so the script can simply be started again. The baseline of the paper's
# Table 2 instead: `anyflow train-flowmap -r tiny-causal --objective consistency-ode`, then `distill` without --model.
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=tiny-causal
home=runs/$recipe
run() {
  echo "== anyflow $*" >&2
  anyflow "$@"
}

[[ "$*" == *data.path=* ]] || run synthesize --recipe $recipe "$@"
run train-flowmap --recipe $recipe "$@"
run distill --recipe $recipe "$@"
run distill --recipe $recipe --simulation consistency --model $home/train-flowmap "$@"
for model in train-flowmap distill distill-consistency; do
  run evaluate --recipe $recipe --model $home/$model --nfe 1,2,4,8,32 --out $home/evaluate/$model "$@"
done
run evaluate --recipe $recipe --compare $home/evaluate/train-flowmap $home/evaluate/distill "$@"
