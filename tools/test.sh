#!/usr/bin/env bash
# Everything that guards the repository: lint, format, types, the experiment files' targets, the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python tools/check_targets.py
exec .venv/bin/python -m pytest -n 2 "$@"
