"""Weights of ROSS's release (github.com/Haochen-Wang409/ross) to a checkpoint of this package, and back.

    python tools/import_ross.py CHECKPOINT_FOLDER --out ross.ckpt --experiment experiments/ross/paper/d-stage2.yaml
    python tools/import_ross.py mm_projector.bin mm_inv_projector.bin --out ross-stage1.ckpt
    python tools/import_ross.py ross.ckpt --export released.safetensors

The checkpoint holds denoiser, projector and, where the files have it, the language model under the names of ``methods.ROSS``: train
on with ``python -m umm_zoo.fit FILE after=ross.ckpt``. With ``--experiment`` it also holds that experiment, and then every command
that takes a finished run takes it. Every tensor that is not known is refused by name, and so is one that is missing. Vision tower
and codec are read from their own files and only counted here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools.released import read_files
from tools.ross_weights import HEADS, Release, State, built_for, export_state, head_to_ours, import_state, sort_parts
from umm_zoo.blocks.transformer import position_table
from umm_zoo.checkpoints.files import AtomicCheckpointIO, load_checkpoint, weights_of
from umm_zoo.errors import locating, user_errors
from umm_zoo.experiment.file import load_experiment


def describe(release: Release) -> list[str]:
    """Summary of a checkpoint, a line or two per part."""
    lines = ["denoiser: none in these files; the head would start untrained"]
    if release.head:
        with torch.device("meta"):
            head = built_for(head_to_ours(release.head))
        positions = release.head["pos_embed"][0]
        difference = (positions.double() - position_table(head.grid, head.width)).abs().max()
        lines = [
            f"denoiser: {len(release.head)} tensors, {_count(release.head):,} parameters, condition {head.condition_dim}, width "
            f"{head.width}, {head.channels} channels, {len(positions)} tokens, depth {len(head.blocks)}, heads {HEADS}",
            f"denoiser positions: largest difference from the sine-cosine table {float(difference):.3g}",
        ]
    lines.append("projector: none in these files")
    if release.projector:
        width, tower = release.projector["0.weight"].shape
        lines[-1] = f"projector: tower {tower} -> language model {width}, {_count(release.projector):,} parameters"
    for name, part in (("language model", release.language), ("vision tower", release.tower), ("codec", release.codec)):
        lines.append(f"{name}: {len(part)} tensors" if part else f"{name}: none in these files")
    return lines


def check_config(release: Release, config: Mapping[str, object]) -> None:
    """Compare the sizes that a checkpoint's ``config.json`` names with those of its tensors.

    Raises:
        ValueError: they disagree.
    """
    found: dict[str, int] = {}
    if head := release.head:
        tokens, inner = head["pos_embed"].shape[1], head["x_embedder.proj.weight"].shape[1]
        found = {"image_embed_len": tokens, "decode_image_size": 16 * math.isqrt(tokens), "mm_inv_hidden_size": inner}
        found["hidden_size"] = head["z_embedder.1.weight"].shape[1]
    if release.projector:
        found["mm_hidden_size"] = release.projector["0.weight"].shape[1]
    for name, value in found.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json: {name} is {config[name]}, the tensors say {value}")


def _count(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="a released folder, or files; with --export a checkpoint")
    parser.add_argument("--out", type=Path, help="write the checkpoint here; without it the files are only examined")
    parser.add_argument("--experiment", type=Path, help="the experiment that the checkpoint is to hold")
    parser.add_argument("--export", type=Path, help="go the other way: write the released names (.safetensors)")
    options = parser.parse_args(arguments)
    with user_errors() as outcome, locating(refusals=(ValueError, OSError)):
        if options.export:
            options.export.parent.mkdir(parents=True, exist_ok=True)
            released = export_state(weights_of(load_checkpoint(options.sources[0]))[0])
            save_file({name: tensor.contiguous() for name, tensor in released.items()}, options.export)
            return 0
        release = sort_parts(read_files(options.sources))
        config = options.sources[0] / "config.json"
        if config.is_file():
            check_config(release, json.loads(config.read_text()))
        checkpoint: dict[str, Any] = {"state_dict": import_state(release), "global_step": 0}
        print("\n".join(describe(release)))
        if options.experiment:
            checkpoint["experiment"] = load_experiment(options.experiment, []).resolved()
        if options.out:
            AtomicCheckpointIO().save_checkpoint(checkpoint, options.out)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
