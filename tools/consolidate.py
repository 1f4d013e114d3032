"""Make one safetensors file of a run's trained weights, from a single-file or a sharded checkpoint.

    python tools/consolidate.py runs/NAME                        writes runs/NAME/NAME.safetensors
    python tools/consolidate.py runs/NAME/checkpoints/step-00005000.ckpt --out weights.safetensors --dtype bfloat16

The experiment travels in the file's header, so ``Method.load("weights.safetensors")``, ``after: weights.safetensors`` and the
commands ``evaluate`` and ``generate`` take the file like a run folder. Averaged weights are written where the run keeps them
(the ``EMA`` callback); ``--raw-weights`` writes those in training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from umm_zoo.backbones.adapters import ADDITION, KEEP
from umm_zoo.checkpoints.files import DESCRIPTION, load_checkpoint, weights_of
from umm_zoo.checkpoints.folder import PARTIAL
from umm_zoo.checkpoints.seals import KEY, OPEN, seal
from umm_zoo.errors import UserError, user_errors
from umm_zoo.training.finished_run import add_raw_weights


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("--out", metavar="FILE", help="default: NAME.safetensors in the run folder or beside the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as they were trained")
    add_raw_weights(parser)
    arguments = parser.parse_args(argv)
    with user_errors() as outcome:
        source = Path(arguments.source)
        out = Path(arguments.out) if arguments.out else default_out(source)
        number, size, weights = consolidate(source, out, arguments.dtype, arguments.raw_weights)
        print(f"{out}: {number} tensors, {size / 1e6:.1f} MB, {weights} weights")
    return outcome.code


def default_out(source: Path) -> Path:
    """Default path of the file."""
    return source / f"{source.name}.safetensors" if (source / "checkpoints").is_dir() else source.with_suffix(".safetensors")


def consolidate(source: Path, out: Path, dtype: str | None = None, raw: bool = False) -> tuple[int, int, str]:
    """Write ``out``, whole or not at all; returns the number of tensors, the size in bytes, and which weights they are.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it has an adapter's additions.
    """
    checkpoint = load_checkpoint(source, mapped=True)
    if "experiment" not in checkpoint:
        raise UserError(source, "a checkpoint without its experiment", "a run folder or a checkpoint that umm_zoo.fit has written")
    state, weights = weights_of(checkpoint, raw)
    if additions := [key for key in state if ADDITION.search(key)]:
        found = f"weights with an adapter beside them ({len(additions)} tensors, such as '{additions[0]}')"
        raise UserError(source, found, "a run without one", KEEP)
    if dtype is not None:
        state = {key: value.to(getattr(torch, dtype)) if value.is_floating_point() else value for key, value in state.items()}
    # tied weights are written twice: a reader gets every key that the method has
    state = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    description = {key: checkpoint[key] for key in DESCRIPTION if key in checkpoint} | {"weights": weights}
    partial = out.with_name(out.name + PARTIAL)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, partial, metadata={"format": "pt", "umm_zoo": json.dumps(description), KEY: OPEN})
        seal(partial)
        os.replace(partial, out)
    except Exception as error:  # safetensors has its own class for what the disk says
        partial.unlink(missing_ok=True)
        raise UserError(out, f"could not be written: {error}") from error
    return len(state), out.stat().st_size, weights


if __name__ == "__main__":
    sys.exit(main())
