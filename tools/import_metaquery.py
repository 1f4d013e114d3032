"""Weights of MetaQuery's release (github.com/facebookresearch/metaquery) to a checkpoint of this package.

    python tools/import_metaquery.py CHECKPOINT_FOLDER --out metaquery.ckpt --experiment experiments/metaquery/paper/stage1.yaml
    python tools/import_metaquery.py model.safetensors --num-queries 256

The checkpoint holds connector, queries with their marker and, where the files have it, the decoder under the names of
``methods.MetaQuery``: train on with ``python -m umm_zoo.fit FILE after=metaquery.ckpt``. With ``--experiment`` it also holds that
experiment, whose parts must fit, and then every command that takes a finished run takes it. Queries and marker are the last rows
of the language model's embedding matrix: ``<begin_of_img>``, ``<end_of_img>`` (left out, no query sees it), ``<img0>`` and so on;
how many, the folder's config.json says (``num_metaqueries``) or ``--num-queries``. Every tensor that is not known is refused by
name, and so is one that is missing. Language model and codec are read from their own files and only counted here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools.released import State, assert_fills, count, read_files, sort_parts, write_checkpoint
from umm_zoo.blocks.metaquery_connector import MetaQueryConnector
from umm_zoo.errors import UserError, locating, user_errors

PARTS = {
    "model.connector.": "connector",
    "model.transformer.": "decoder",
    "model.mllm_backbone.": "language model",
    "vae.": "codec",
}


def connector_for(weights: Mapping[str, Tensor]) -> MetaQueryConnector:
    """A connector with released weights (``0.layers.0.self_attn.q_proj.weight`` ... ``4.weight``), whose shapes say its sizes.

    Raises:
        UserError: names are missing or unknown, or a shape does not fit the others.
    """
    first = "0.layers.0.self_attn.{}_norm.gamma"
    sized = ("1.weight", first.format("q"), first.format("k"), "0.layers.0.mlp.gate_proj.weight")
    if missing := [name for name in sized if name not in weights]:
        raise UserError("weights", f"no 'model.connector.{missing[0]}'", "MetaQuery's connector")
    out_dim, in_dim = weights["1.weight"].shape
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("0.layers.")}
    heads, kv_heads, hidden_dim = (len(weights[name]) for name in sized[1:])
    with torch.device("meta"), locating(place="weights", refusals=(ValueError,)):
        block = MetaQueryConnector(in_dim, out_dim, 1 + max(layers), heads, kv_heads, hidden_dim)
    assert_fills("model.connector", weights, block.connector)
    block.connector.load_state_dict(dict(weights), assign=True)
    return block


def queries_of(language: Mapping[str, Tensor], num_queries: int) -> State:
    """``marker`` and ``table`` of ``MarkedQueries``, from the language model's tensors.

    Raises:
        UserError: no embedding matrix, or one with too few rows.
    """
    names = [name for name in language if name.endswith("embed_tokens.weight")]
    if len(names) != 1:
        raise UserError("weights", f"{len(names)} tensors called embed_tokens.weight", "one, whose last rows are the queries")
    rows = language[names[0]]
    if not 0 < num_queries < len(rows) - 2:
        raise UserError("weights", f"{num_queries} queries and an embedding matrix of {len(rows)} rows", "fewer queries than rows")
    new = rows[len(rows) - num_queries - 2 :]
    return {"marker": new[0].clone(), "table": new[2:].clone()}


def num_queries_in(source: Path) -> int | None:
    """``num_metaqueries`` in a folder's config.json; None where there is none."""
    config = source / "config.json"
    read = json.loads(config.read_text()) if config.is_file() else {}
    found = read.get("num_metaqueries") if isinstance(read, dict) else None
    if found is not None and not isinstance(found, int):
        raise UserError(config, f"num_metaqueries {found!r}", "a whole number")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="a released folder, or files")
    parser.add_argument("--out", type=Path, help="write the checkpoint here; without it the files are only examined")
    parser.add_argument("--experiment", type=Path, help="the experiment that the checkpoint is to hold")
    parser.add_argument("--num-queries", type=int, help="how many queries; default: what the folder's config.json says")
    options = parser.parse_args(arguments)
    with user_errors() as outcome, locating(refusals=(ValueError, OSError)):
        parts = sort_parts(read_files(options.sources), PARTS)
        num_queries = options.num_queries or num_queries_in(options.sources[0])
        if num_queries is None:
            raise UserError("--num-queries", "neither it nor a config.json with num_metaqueries", "the number of queries")
        connector, queries = connector_for(parts["connector"]), queries_of(parts["language model"], num_queries)
        depth = len(list(connector.connector[0].get_submodule("layers").children()))
        print(f"connector: {count(parts['connector'])}, {connector.in_dim} -> {connector.out_dim}, depth {depth}")
        print(f"queries: {num_queries} and a marker, width {len(queries['marker'])}")
        for name in ("decoder", "language model", "codec"):
            print(f"{name}: {count(parts[name])}")
        state = {f"connector.{name}": tensor for name, tensor in connector.state_dict().items()}
        state |= {f"queries.{name}": tensor for name, tensor in queries.items()}
        state |= {f"decoder.model.{name}": tensor for name, tensor in parts["decoder"].items()}
        write_checkpoint(state, options.experiment, options.out)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
