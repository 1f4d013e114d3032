#!/usr/bin/env bash
# Train the shipped tiny parts again and write them to experiments/tiny/weights/ with their cards: bash tools/train_tiny.sh [PART ...]
# The order matters where one part stands on another (llava looks through tower). Without arguments: all that are shipped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
world() { # FOLDER and arguments; does nothing where the same shards are there already
  "$python" -m data_pipelines.shapes "$@"
}
shipped="codec tower clip clip2 clip8 ssl1 ssl2 deit llava vlm sana sd3"
parts="$shipped tower_coarse" # some experiments ask for the last one
for name in "$@"; do # all names first, before hours of training
  known=no
  for part in $parts; do [ "$name" = "$part" ] && known=yes; done
  [ $known = yes ] || { echo "error: found no part '$name', expected $parts" >&2; exit 2; }
done
bash tools/setup.sh
[ $# -gt 0 ] || set -- $shipped
release() { # RUN PART [OPTION ...]: the part anew, with its scores on the test split, and what can be read from it where a layer is set
  local run=$1 out=experiments/tiny/weights/$2
  shift 2
  "$python" -m umm_zoo.export "$run" "$out" --again --dtype float16 --test "$@"
  [ -z "$layer" ] ||
    "$python" tools/probe_parts.py "$out" --attribute colour shape size mark --layer "$layer" --limit 4000 --steps 400 --card
}
for name in "$@"; do
  part=() layer=-2
  case $name in # a decoder is one part of what its run makes images with, and has no features
    sana | sd3) part=(--part decoder) layer= ;;
    codec | llava | vlm) layer=-1 ;;
  esac
  if [ "$name" = sana ] || [ "$name" = sd3 ]; then
    world data/draw --seed 3 --train 20000 --val 600 --test 600 --tasks text_to_image,geneval
    "$python" -m data_pipelines.precompute "experiments/tiny/$name.yaml" --half
  elif [ "$name" = llava ]; then
    world data/coarse --seed 2 --train 8000 --val 1000 --test 1000 --mark-share 0 --tasks captions,dialogues,questions --samples-per-shard 2000
  else
    world data/tiny --seed 1 --train 20000 --val 1000 --test 1000 --tasks captions,questions,dialogues,lookups,pairs,two_images,readings,imagined --samples-per-shard 2000
  fi
  "$python" -m umm_zoo.fit "experiments/tiny/$name.yaml" --again
  release "runs/tiny/$name" "$name" "${part[@]}"
  if [ "$name" = codec ]; then # its decoder goes on from what was just exported, and takes its place
    "$python" -m umm_zoo.fit experiments/tiny/codec-decoder.yaml --again
    release runs/tiny/codec-decoder codec
  fi
done
