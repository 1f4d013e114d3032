#!/usr/bin/env bash
# Make .venv (Python 3.11) with the tested versions, once; later calls return at once while setup.cfg and the pins are unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.installed
wanted=$(cat setup.cfg tools/constraints.txt | cksum)  # cksum is on every system
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or half of one
    python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
    if ! "${python:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "error: found no Python 3.11 or later (python3.11 or python3); install one or give PYTHON=/path/to/python3.11" >&2
      exit 2
    fi
    "$python" -m venv .venv
  fi
  echo "installing into .venv (a few minutes the first time) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt "torch==2.13.0"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e ".[dev,remote,lora,parquet,serve,ui]"
  echo "$wanted" > "$stamp"
fi
