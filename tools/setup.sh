#!/usr/bin/env bash
# Make .venv (Python 3.11) with the tested versions, once; later calls return at once while setup.cfg and the pins are unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.installed
wanted=$(cat setup.cfg tools/constraints.txt | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3.11}" -m venv .venv 2>/dev/null || python3 -m venv .venv
  echo "installing into .venv (a few minutes the first time) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt "torch==2.13.0"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e ".[dev,remote,lora,parquet]"
  echo "$wanted" > "$stamp"
fi
