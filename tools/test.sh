#!/usr/bin/env bash
# Everything that guards the repository: lint, format, types, the experiment files' targets, the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python tools/check_targets.py
exec .venv/bin/python -m pytest -n 2 "$@"
