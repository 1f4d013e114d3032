#!/usr/bin/env bash
# The GPU report: parts of the paper's size with random weights on one GPU, in eight minutes. Nothing is downloaded: it needs this
# repository, an environment with its packages (.venv, or the python on PATH) and a torch that sees the GPU.
#
#   bash tools/gpu_report.sh [FOLDER] [--minutes N]      through any job system; FOLDER is $OUT, else tools/results/gpu
#
# Every result is written as soon as it is there, and finished ones are skipped: after a stop the same command goes on. What
# FOLDER then holds (one JSON file a part, and report.md) is to be committed below tools/results/. Without a GPU it runs a CPU mode of
# one or two layers a stack and one step each, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${OUT:-tools/results/gpu}"
if [[ $# -gt 0 && $1 != --* ]]; then folder="$1"; shift; fi
python=.venv/bin/python
[[ -x $python ]] || python="$(command -v python3 || command -v python)"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "$python" tools/gpu_report.py --out "$folder" "$@"
