#!/usr/bin/env bash
# Set up, make the shapes world, train the visual-instruction baseline, score it. Extra arguments go to fit.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
# writes what is missing, so a stopped first attempt is completed
.venv/bin/python -m data_pipelines.shapes data/shapes --train 8000 --tasks captions,dialogues,questions,pairs
exec .venv/bin/python -m umm_zoo.fit experiments/llava/shapes.yaml "$@"
