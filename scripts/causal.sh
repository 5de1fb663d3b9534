#!/usr/bin/env bash
# Train and evaluate the small causal model (recipe tiny-causal), and draw its figures. In order:
#
#   1. data, stage 1, stage 2
#   2. the consistency baseline, from the same start and for as many steps as stage 2 (as in tiny-causal-best)
#   3. scores of all three at 1 to 32 steps, from text and from a given picture, with the teacher at 50x2
#   4. a streamed video
#   5. figures: quality chunk by chunk before and after stage 2, image-to-video and video-to-video sheets,
#      and the progress of the streamed video
#
#   scripts/causal.sh [OPTIONS]    OPTIONS go to every command, e.g. --runs DIR, --set data.path=runs/tiny-long/data
#
# After an interruption, run it again: every command continues where it stopped. For the baseline of the paper's
# Table 2 run `anyflow train-flowmap -r tiny-causal --objective consistency-ode`, then `distill` without --model.
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=tiny-causal runs=runs before=
for word in "$@"; do
  if [[ $before == --runs ]]; then runs=$word; fi
  if [[ $word == --runs=* ]]; then runs=${word#*=}; fi
  before=$word
done
home=$runs/$recipe
run() {
  local command=$1
  shift
  echo "== anyflow $command --recipe $recipe $*" >&2
  anyflow "$command" --recipe $recipe "$@"
}
figure() {
  python scripts/figures.py "$1" "${@:3}" --out "$home/figures/$2.png"
  echo "$home/figures/$2.png"
}

[[ "$*" == *data.path=* ]] || run synthesize "$@"
run train-flowmap "$@"
run distill "$@"
run distill --simulation consistency --set distill.joint=false --model "$home/train-flowmap" "$@"

score() {
  run evaluate --model "$home/$1" --nfe 1,2,4,8,32 --out "$home/evaluate/$2" "${@:3}"
}
alone=(--set evaluate.teacher=false)  # one set of teacher videos is enough
score distill distill "$@"
score train-flowmap train-flowmap "${alone[@]}" "$@"
score distill-consistency distill-consistency --sampler consistency "${alone[@]}" "$@"
score distill-consistency distill-consistency-euler "${alone[@]}" "$@"
for model in distill train-flowmap; do
  run evaluate --task i2v --model "$home/$model" --nfe 1,4,32 --out "$home/evaluate/$model-i2v" "$@"
done
for other in train-flowmap distill-consistency; do
  run evaluate --compare "$home/evaluate/$other" "$home/evaluate/distill" --out "$home/evaluate/against-$other" "$@"
done

[[ -e $home/stream/samples.json ]] || run sample --prompt "a small red circle moving left" --model "$home/distill" \
  --stream --frames 161 --nfe 4,32 --out "$home/stream" "$@"
figure along along "before stage 2=$home/evaluate/train-flowmap" "after stage 2=$home/evaluate/distill" \
  "consistency=$home/evaluate/distill-consistency" --steps 4 32
figure along along-i2v "before stage 2=$home/evaluate/train-flowmap-i2v" \
  "after stage 2=$home/evaluate/distill-i2v" --steps 1 4 32
figure given i2v --runs "$runs" --recipe $recipe --frames 1
figure given v2v --runs "$runs" --recipe $recipe --frames 9
figure stream stream "$home/stream"
