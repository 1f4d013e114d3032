"""Weights of OpenUni's release (github.com/wusize/OpenUni) to a checkpoint of this package.

    python tools/import_openuni.py openuni_l.pth --out openuni.ckpt --experiment my-openuni.yaml

The checkpoint holds connector, queries and, where the file has it, the decoder under the names of ``methods.MetaQuery``: train on
with ``python -m umm_zoo.fit FILE after=openuni.ckpt``. With ``--experiment`` it also holds that experiment, whose parts must fit,
and then every command that takes a finished run takes it; no tensor says how many heads the connector has: 24 in OpenUni-L, 14 in
OpenUni-B. Every tensor that is not known is refused by name, and so is one that is missing. Language model and codec are read from
their own files and only counted here. What the release's trainer writes is made a file of tensors by scripts/deepspeed2torch.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools.released import assert_fills, count, read_files, sort_parts, write_checkpoint
from umm_zoo.blocks.openuni_connector import OpenUniConnector
from umm_zoo.errors import UserError, locating, user_errors

PARTS = {
    "connector.": "connector",
    "projector.": "projector",
    "meta_queries": "queries",
    "transformer.": "decoder",
    "lmm.": "language model",
    "vae.": "codec",
}


def connector_for(weights: Mapping[str, Tensor], heads: int = 1) -> OpenUniConnector:
    """A connector with released weights (``connector.*`` and ``projector.*``), whose shapes say all its sizes but its heads.

    Raises:
        UserError: names are missing or unknown, or a shape does not fit the others.
    """
    first = "connector.layers.0.mlp.fc1.weight"
    ends = [name for name in ("projector.weight", "projector.0.weight", "projector.1.weight") if name in weights]
    if first not in weights or len(ends) not in (1, 2):
        raise UserError("weights", f"no '{first if first not in weights else 'projector.weight'}'", "OpenUni's connector")
    hidden_dim, width = weights[first].shape
    out_dim, in_dim = len(weights[ends[-1]]), weights[ends[0]].shape[1]
    alone: Literal["enc_proj", "proj_enc"] = "enc_proj" if in_dim == width else "proj_enc"
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("connector.layers.")}
    with torch.device("meta"), locating(place="weights", refusals=(ValueError,)):
        form = alone if len(ends) == 1 else "proj_enc_proj"
        own = None if len(ends) == 1 else width
        block = OpenUniConnector(in_dim, out_dim, 1 + max(layers), heads, hidden_dim, form, own)
    assert_fills("connector and projector", weights, block)
    block.load_state_dict(dict(weights), assign=True)
    return block


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="released files, or a folder of them")
    parser.add_argument("--out", type=Path, help="write the checkpoint here; without it the files are only examined")
    parser.add_argument("--experiment", type=Path, help="the experiment that the checkpoint is to hold")
    options = parser.parse_args(arguments)
    with user_errors() as outcome, locating(refusals=(ValueError, OSError)):
        weights = read_files(options.sources)
        parts = sort_parts(weights, PARTS)
        if "" not in parts["queries"]:
            raise UserError("weights", "no 'meta_queries'", "OpenUni's queries")
        table = parts["queries"].pop("")
        if parts["queries"]:
            raise UserError("weights", f"'meta_queries{next(iter(parts['queries']))}'", "one tensor called meta_queries")
        connector = connector_for({name: t for name, t in weights.items() if name.startswith(("connector.", "projector."))})
        layers = connector.connector.layers
        print(
            f"connector: {count(connector.state_dict())}, {connector.in_dim} -> {connector.out_dim}, depth {len(layers)}, "
            f"{connector.proj_type}"
        )
        print(f"queries: {len(table)}, width {table.shape[1]}")
        for name in ("decoder", "language model", "codec"):
            print(f"{name}: {count(parts[name])}")
        state = {f"connector.{name}": tensor for name, tensor in connector.state_dict().items()} | {"queries.table": table}
        state |= {f"decoder.model.{name}": tensor for name, tensor in parts["decoder"].items()}
        write_checkpoint(state, options.experiment, options.out)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
