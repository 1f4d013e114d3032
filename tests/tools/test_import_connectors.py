"""The importers of MetaQuery's and OpenUni's released weights, on tiny checkpoints written under the released names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.methods.bridge_parts import CODEC, SANA, VLM
from tests.references.connector_reference import metaquery, metaquery_weights, openuni, openuni_weights
from tools import import_metaquery, import_openuni
from umm_zoo import generate
from umm_zoo.backbones.sana import Sana
from umm_zoo.batch import Grid, Tokens
from umm_zoo.methods.metaquery import MetaQuery

State = dict[str, Tensor]


def decoder() -> State:
    with torch.device("meta"):
        own = Sana.from_config(SANA).model.state_dict()
    return {name: torch.randn(tensor.shape) for name, tensor in own.items()}


def metaquery_release(count: int = 5, path: str = "model.", **sizes: int) -> State:
    weights = metaquery_weights(**{"in_dim": 32, "out_dim": 12, "depth": 2, "heads": 4, "hidden_dim": 40} | sizes)
    state = {f"model.connector.{name}": tensor for name, tensor in weights.items()}
    state |= {f"model.transformer.{name}": tensor for name, tensor in decoder().items()}
    state[f"model.mllm_backbone.{path}embed_tokens.weight"] = torch.randn(20 + 2 + count, 32)
    state[f"model.mllm_backbone.{path}layers.0.mlp.up_proj.weight"] = torch.randn(3, 3)
    return state | {"vae.encoder.conv_in.weight": torch.randn(2, 2)}


def openuni_release(proj_type: str = "enc_proj", width: int = 0) -> State:
    state = openuni_weights(32, 12, 2, 40, proj_type, width) | {"meta_queries": torch.randn(5, 32)}
    state |= {f"transformer.{name}": tensor for name, tensor in decoder().items()}
    return state | {"lmm.language_model.model.norm.weight": torch.randn(4), "vae.encoder.conv_in.weight": torch.randn(2, 2)}


def experiment(folder: Path, queries: str, **connector: object) -> Path:
    blocks = "umm_zoo.blocks."
    method = {
        "_target_": "umm_zoo.methods.metaquery.MetaQuery",
        "vlm": {"_target_": "umm_zoo.backbones.qwen2_5_vl.Qwen25VL.from_config", "config": VLM},
        "queries": {"_target_": f"{blocks}queries.{queries}", "width": 32, "num_queries": 5},
        "pathway": {"_target_": f"{blocks}pathways.FrozenPathway"},
        "connector": {"in_dim": 32, "out_dim": 12, "depth": 2, "heads": 4, "hidden_dim": 40} | connector,
        "decoder": {"_target_": "umm_zoo.backbones.sana.Sana.from_config", "config": SANA},
        "codec": {"_target_": "umm_zoo.backbones.codecs.KLCodec.from_config", "config": CODEC},
        "objective": {"_target_": "umm_zoo.objectives.flow_matching.FlowMatching", "num_steps": 2},
        "image_size": 8,
    }
    tree = {
        "method": method,
        "training": {
            "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 1e-3},
            "trained": ["queries", "connector", "decoder"],
        },
        "data": {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 32},
        "trainer": {"max_steps": 1},
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    return file


METAQUERY = "umm_zoo.blocks.metaquery_connector.MetaQueryConnector"
OPENUNI = "umm_zoo.blocks.openuni_connector.OpenUniConnector"


@pytest.mark.parametrize("path", ["model.", "language_model.model.", "model.language_model."])  # of three library versions
def test_metaquery_is_imported_as_a_run(tmp_path: Path, path: str) -> None:
    state, file = metaquery_release(path=path), experiment(tmp_path, "MarkedQueries", _target_=METAQUERY)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_metaqueries": 5}))
    out = tmp_path / "new" / "metaquery.ckpt"
    assert import_metaquery.main([str(tmp_path), "--out", str(out), "--experiment", str(file)]) == 0
    loaded = MetaQuery.load(out)
    rows = state[f"model.mllm_backbone.{path}embed_tokens.weight"]
    assert torch.equal(loaded.queries.marker, rows[20]) and torch.equal(loaded.queries.table, rows[22:])  # 21 ends the image
    assert torch.equal(loaded.decoder.model.state_dict()["proj_out.weight"], state["model.transformer.proj_out.weight"])
    states = torch.randn(7, 32)
    expected = metaquery(metaquery_weights(32, 12, 2, 4, None, 40), states)
    found = loaded.connector(Tokens(states[None]), Grid(1, 7)).values[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert generate.main([str(out), "text-to-image", "a cat", "--steps", "1", "--out", str(tmp_path / "images")]) == 0
    assert (tmp_path / "images" / "results.jsonl").is_file()


@pytest.mark.parametrize(("proj_type", "width"), [("enc_proj", 0), ("proj_enc", 0), ("proj_enc_proj", 36)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_openuni_is_imported_as_a_run(tmp_path: Path, proj_type: str, width: int, wrapped: bool) -> None:
    state = openuni_release(proj_type, width)
    file = experiment(tmp_path, "LearnedQueries", _target_=OPENUNI, proj_type=proj_type, width=width or None)
    torch.save({"state_dict": state, "meta": {"epoch": 1}} if wrapped else state, tmp_path / "openuni.pth")
    arguments = ["--out", str(tmp_path / "openuni.ckpt"), "--experiment", str(file)]
    assert import_openuni.main([str(tmp_path / "openuni.pth"), *arguments]) == 0
    loaded = MetaQuery.load(tmp_path / "openuni.ckpt")
    assert torch.equal(loaded.queries.table, state["meta_queries"])
    assert torch.equal(loaded.decoder.model.state_dict()["proj_out.weight"], state["transformer.proj_out.weight"])
    states = torch.randn(7, 32)
    expected = openuni(openuni_weights(32, 12, 2, 40, proj_type, width), states, 4, proj_type)
    found = loaded.connector(Tokens(states[None]), Grid(1, 7)).values[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def changed(state: State, drop: str = "", **more: Tensor) -> State:
    return {name: tensor for name, tensor in state.items() if name != drop} | more


@pytest.mark.parametrize(
    ("release", "message"),
    [
        (lambda: changed(metaquery_release(), other=torch.ones(1)), "1 names that no part of the release has, such as 'other'"),
        (lambda: changed(metaquery_release(), "model.connector.4.weight"), "1 tensors missing in the weights, such as '4.weight'"),
        (lambda: changed(metaquery_release(), "model.connector.1.weight"), "no 'model.connector.1.weight'"),
        (
            lambda: changed(metaquery_release(), **{"model.connector.5.weight": torch.ones(1)}),
            "too many in the weights, such as '5.weight'",
        ),
        (
            lambda: changed(metaquery_release(), **{"model.connector.3.bias": torch.ones(9)}),
            "'3.bias' of [9] in the weights, expected [12]",
        ),
        (
            lambda: changed(metaquery_release(), "model.mllm_backbone.model.embed_tokens.weight"),
            "0 tensors called embed_tokens.weight",
        ),
        (
            lambda: metaquery_release(count=0) | {"model.mllm_backbone.model.embed_tokens.weight": torch.ones(7, 32)},
            "matrix of 7 rows",
        ),
        (lambda: metaquery_release(depth=1), "tensors missing in the weights, such as 'connector.connector.0.layers.1."),
        (lambda: metaquery_release(heads=2), "self_attn.q_norm.gamma' of [2, 1, 16] in the weights, expected [4, 1, 8]"),
        (
            lambda: changed(metaquery_release(), "model.transformer.proj_out.bias"),
            "missing in the weights, such as 'decoder.model.proj_out.bias'",
        ),
        (lambda: changed(metaquery_release(), **{"model.transformer.x.lora_A.y.weight": torch.ones(1)}), "an adapter"),
    ],
)
def test_metaquery_weights_that_do_not_fit_are_one_line(tmp_path: Path, capsys, release: Callable[[], State], message: str) -> None:
    save_file(release(), tmp_path / "model.safetensors")
    file = experiment(tmp_path, "MarkedQueries", _target_=METAQUERY)
    arguments = [str(tmp_path / "model.safetensors"), "--num-queries", "5", "--experiment", str(file), "--out", str(tmp_path / "x")]
    assert import_metaquery.main(arguments) == 2 and not (tmp_path / "x").exists()
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("release", "message"),
    [
        (lambda: changed(openuni_release(), "meta_queries"), "no 'meta_queries'"),
        (lambda: changed(openuni_release(), "projector.bias"), "1 tensors missing in the weights, such as 'projector.bias'"),
        (lambda: changed(openuni_release(), "projector.weight"), "no 'projector.weight'"),
        (lambda: changed(openuni_release(), "connector.layers.1.mlp.fc2.bias"), "such as 'connector.layers.1.mlp.fc2.bias'"),
        (
            lambda: changed(openuni_release(), meta_queries_2=torch.ones(1)),
            "'meta_queries_2', expected one tensor called meta_queries",
        ),
        (lambda: changed(openuni_release(), head=torch.ones(1)), "such as 'head'"),
        (
            lambda: changed(openuni_release(), meta_queries=torch.ones(6, 32)),
            "'queries.table' of [6, 32] in the weights, expected [5, 32]",
        ),
        (lambda: openuni_release("proj_enc_proj", 36), "2 tensors missing in the weights, such as 'connector.projector.bias'"),
    ],
)
def test_openuni_weights_that_do_not_fit_are_one_line(tmp_path: Path, capsys, release: Callable[[], State], message: str) -> None:
    torch.save(release(), tmp_path / "openuni.pth")
    file = experiment(tmp_path, "LearnedQueries", _target_=OPENUNI)
    arguments = [str(tmp_path / "openuni.pth"), "--experiment", str(file), "--out", str(tmp_path / "x")]
    assert import_openuni.main(arguments) == 2 and not (tmp_path / "x").exists()
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class Foreign:
    """What a checkpoint of a trainer may hold beside tensors."""


@pytest.mark.parametrize("command", [import_metaquery.main, import_openuni.main])
def test_files_that_are_no_weights_are_one_line(tmp_path: Path, capsys, command) -> None:
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"state_dict": {}, "message_hub": Foreign()}, tmp_path / "objects.pth")
    torch.save({"meta_queries": 3}, tmp_path / "number.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("pointer.safetensors", "empty.pth", "objects.pth", "number.pth", "list.pth", "none.pth"):
        assert command([str(tmp_path / name)]) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name in error, error


def test_number_of_queries_must_be_said(tmp_path: Path, capsys) -> None:
    save_file(metaquery_release(), tmp_path / "model.safetensors")
    assert import_metaquery.main([str(tmp_path)]) == 2
    assert "--num-queries" in capsys.readouterr().err
    for text in ("{", "[]", '{"num_metaqueries": [5]}'):
        (tmp_path / "config.json").write_text(text)
        assert import_metaquery.main([str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1, text
    assert import_metaquery.main([str(tmp_path), "--num-queries", "5", "--out", str(tmp_path)]) == 2  # a folder stands there
    assert capsys.readouterr().err.count("\n") == 1
    assert import_metaquery.main([str(tmp_path), "--num-queries", "5"]) == 0
    assert "queries: 5 and a marker, width 32" in capsys.readouterr().out
