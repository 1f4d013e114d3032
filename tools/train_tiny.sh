#!/usr/bin/env bash
# Train the shipped tiny parts again and write them to experiments/tiny/weights/ with their cards: bash tools/train_tiny.sh [PART ...]
# The order matters where one part stands on another (llava looks through tower). Without arguments: all that are shipped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
world() { # FOLDER and arguments; does nothing where the same shards are there already
  "$python" -m data_pipelines.shapes "$@"
}
shipped="codec tower clip clip2 ssl1 ssl2 deit llava vlm sana sd3"
parts="$shipped tower_coarse" # some experiments ask for the last one
for name in "$@"; do # all names first, before hours of training
  known=no
  for part in $parts; do [ "$name" = "$part" ] && known=yes; done
  [ $known = yes ] || { echo "error: found no part '$name', expected $parts" >&2; exit 2; }
done
bash tools/setup.sh
[ $# -gt 0 ] || set -- $shipped
for name in "$@"; do
  probe=(--probe colour shape size mark)
  if [ "$name" = sana ] || [ "$name" = sd3 ]; then
    world data/draw --seed 3 --train 20000 --val 600 --test 600 --tasks text_to_image,geneval
    "$python" -m data_pipelines.precompute "experiments/tiny/$name.yaml" --half
    probe=()
  elif [ "$name" = llava ]; then
    world data/coarse --seed 2 --train 8000 --val 1000 --test 1000 --mark-share 0 --tasks captions,dialogues,questions --samples-per-shard 2000
  else
    world data/tiny --seed 1 --train 20000 --val 1000 --test 1000 --tasks captions,questions,dialogues,lookups,pairs,two_images,readings,imagined --samples-per-shard 2000
  fi
  "$python" -m umm_zoo.fit "experiments/tiny/$name.yaml" --again
  "$python" tools/export_part.py "runs/tiny/$name" --test "${probe[@]}"
  if [ "$name" = codec ]; then # its decoder goes on from what was just exported, and takes its place
    "$python" -m umm_zoo.fit experiments/tiny/codec-decoder.yaml --again
    "$python" tools/export_part.py runs/tiny/codec-decoder --out experiments/tiny/weights/codec --test --probe colour shape size mark
  fi
done
