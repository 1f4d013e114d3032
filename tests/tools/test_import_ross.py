"""The importer of the released weights, on tiny checkpoints written under the released names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.references.ross_reference import denoise, denoiser_weights
from tools import import_ross, ross_weights
from umm_zoo.batch import Tokens
from umm_zoo.blocks.transformer import position_table
from umm_zoo.experiment.build import build
from umm_zoo.experiment.file import load_experiment
from umm_zoo.methods.ross import ROSS


def denoiser(**changes: int) -> dict[str, Tensor]:
    sizes = {"condition_dim": 24, "grid": 3, "channels": 8, "width": 32, "depth": 3} | changes
    weights = denoiser_weights(**sizes, generator=torch.Generator().manual_seed(0))
    return {f"model.mm_inv_projector.net.{name}": tensor for name, tensor in weights.items()}


def projector(width: int = 24, tower: int = 20) -> dict[str, Tensor]:
    shapes = {"0.weight": (width, tower), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    return {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in shapes.items()}


def full_checkpoint() -> dict[str, Tensor]:
    others = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
        "model.pixel_decoder.pixel_decoder.encoder.conv_in.weight",
    ]
    return denoiser() | projector() | {name: torch.randn(4) for name in others}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(dtype):
    frozen = ("model.vision_tower.", "model.pixel_decoder.")
    state = {name: tensor.to(dtype) for name, tensor in full_checkpoint().items() if not name.startswith(frozen)}
    imported = ross_weights.import_state(ross_weights.sort_parts(state))
    assert equal(ross_weights.export_state(imported), state)
    assert len(imported) == 43 + 4 + 4


def test_sizes_are_read_from_the_shapes():
    head = ross_weights.head_from_release(ross_weights.sort_parts(denoiser(width=48, depth=2, grid=4)).head)
    assert (head.condition_dim, head.grid, head.channels, head.width, len(head.blocks)) == (24, 4, 8, 48, 2)
    assert head.blocks[0].attention.heads == 16


def test_full_checkpoint_is_sorted_into_its_parts():
    release = ross_weights.sort_parts(full_checkpoint())
    assert (len(release.head), len(release.projector), len(release.tower), len(release.codec)) == (43, 4, 1, 1)
    assert set(release.language) == {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match=r"2 names that no part .*: model\.mm_other\.weight, model\.visual\.bias"):
        ross_weights.sort_parts(full_checkpoint() | {"model.visual.bias": torch.ones(1), "model.mm_other.weight": torch.ones(1)})
    extra = denoiser() | {"model.mm_inv_projector.net.blocks.0.attn.q_norm.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"1 unknown tensors: blocks\.0\.attn\.q_norm\.weight"):
        ross_weights.import_state(ross_weights.sort_parts(extra))


def test_missing_names_are_listed():
    state = denoiser()
    for name in ("blocks.1.mlp.fc1.bias", "t_embedder.mlp.0.weight"):
        del state[f"model.mm_inv_projector.net.{name}"]
    with pytest.raises(ValueError, match=r"2 tensors are missing: blocks\.1\.mlp\.fc1\.bias, t_embedder\.mlp\.0\.weight"):
        ross_weights.import_state(ross_weights.sort_parts(state))
    with pytest.raises(ValueError, match=r"mm_projector: 1 tensors are missing: 2\.bias"):
        ross_weights.sort_parts({k: v for k, v in projector().items() if not k.endswith("2.bias")})


def test_gaps_in_the_language_model_are_listed():
    """As when a shard of a checkpoint was not downloaded."""
    layers = {f"model.layers.{i}.{n}.weight": torch.ones(2) for i in (0, 2) for n in ("mlp.up_proj", "self_attn.q_proj")}
    state = {"model.embed_tokens.weight": torch.ones(2), "model.norm.weight": torch.ones(2)} | layers
    with pytest.raises(ValueError, match=r"2 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight, model\.layers\.1\.self"):
        ross_weights.sort_parts(state)
    del state["model.norm.weight"], state["model.layers.2.mlp.up_proj.weight"], state["model.layers.2.self_attn.q_proj.weight"]
    with pytest.raises(ValueError, match=r"language model: 1 tensors are missing: model\.norm\.weight"):
        ross_weights.sort_parts(state)


def test_wrong_shapes_are_refused():
    state = denoiser() | {"model.mm_inv_projector.net.blocks.2.mlp.fc1.weight": torch.zeros(64, 32)}
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.fc1\.weight: found \[64, 32\], expected \[128, 32\]"):
        ross_weights.import_state(ross_weights.sort_parts(state))


@pytest.mark.parametrize("name", ["pos_embed", "ln_pre.weight"])
def test_other_denoiser_is_refused(name):
    with pytest.raises(ValueError, match="the release's other denoiser"):
        ross_weights.sort_parts(denoiser() | {f"model.mm_inv_projector.{name}": torch.ones(1)})


def test_report_compares_positions_and_says_what_is_absent():
    state = denoiser()
    state["model.mm_inv_projector.net.pos_embed"] = position_table(3, 32).float()[None].clone()
    state["model.mm_inv_projector.net.pos_embed"][0, 4, 5] += 0.25
    lines = import_ross.describe(ross_weights.sort_parts(state))
    assert "condition 24, width 32, 8 channels, 9 tokens, depth 3, heads 16" in lines[0]
    assert lines[1].endswith("table 0.25") and "projector: none" in lines[2]
    assert "denoiser: none" in import_ross.describe(ross_weights.sort_parts(projector()))[0]


def test_two_files_of_stage_one(tmp_path):
    torch.save(projector(), tmp_path / "mm_projector.bin")
    torch.save(denoiser(), tmp_path / "mm_inv_projector.bin")
    out, back = tmp_path / "out" / "ours.ckpt", tmp_path / "back.safetensors"
    files = [str(tmp_path / name) for name in ("mm_projector.bin", "mm_inv_projector.bin")]
    assert import_ross.main([*files, "--out", str(out)]) == 0
    assert import_ross.main([str(out), "--export", str(back)]) == 0
    written = torch.load(files[0], weights_only=True) | torch.load(files[1], weights_only=True)
    assert equal(load_file(back), written)


def test_folder_with_a_config_that_disagrees(tmp_path, capsys):
    save_file(full_checkpoint(), tmp_path / "model.safetensors")
    config = {"image_embed_len": 9, "decode_image_size": 48, "mm_inv_hidden_size": 8, "mm_hidden_size": 20, "hidden_size": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert import_ross.main([str(tmp_path)]) == 0
    (tmp_path / "config.json").write_text(json.dumps(config | {"decode_image_size": 56}))
    assert import_ross.main([str(tmp_path)]) == 2
    assert "decode_image_size is 56, the tensors say 48" in capsys.readouterr().err


def test_absent_file_is_one_line(tmp_path, capsys):
    assert import_ross.main([str(tmp_path / "none.bin")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


EXPERIMENT = """
method:
  _target_: umm_zoo.methods.ross.ROSS
  vlm:
    _target_: umm_zoo.backbones.llava.LlavaBackbone.from_config
    config:
      vision_config: {model_type: clip_vision_model, hidden_size: 20, intermediate_size: 8, num_hidden_layers: 2,
        num_attention_heads: 2, image_size: 12, patch_size: 4}
      text_config: {model_type: qwen2, hidden_size: 24, intermediate_size: 28, num_hidden_layers: 1, num_attention_heads: 2,
        num_key_value_heads: 1, max_window_layers: 1}
  target:
    _target_: umm_zoo.blocks.targets.CodecLatents
    grid: 3
    codec:
      _target_: umm_zoo.backbones.codecs.KLCodec.from_config
      config: {latent_channels: 2, block_out_channels: [4], norm_num_groups: 2, down_block_types: [DownEncoderBlock2D],
        up_block_types: [UpDecoderBlock2D]}
  head: {_target_: umm_zoo.blocks.denoisers.DenoiserHead, condition_dim: 24, grid: 3, channels: 8, width: 32}
  objective: {_target_: umm_zoo.objectives.gaussian.GaussianNoisePrediction}
training:
  optimizer: {_target_: umm_zoo.training.optimization.AdamW, lr: 1.0e-3}
  trained: [projector, language_model, head]
data: {_target_: data_pipelines.shards.data.ShardData, image_size: 12}
trainer: {max_steps: 1}
"""


def test_imported_checkpoint_is_a_run(tmp_path):
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    experiment = load_experiment(tmp_path / "tiny.yaml", [])
    own = build(experiment.method)
    own.train_only(experiment.training["trained"])
    state = denoiser() | projector()
    for name, tensor in own.vlm.language_model.state_dict().items():
        state[name] = torch.randn_like(tensor)
    save_file(state, tmp_path / "model.safetensors")
    arguments = ["--out", str(tmp_path / "ross.ckpt"), "--experiment", str(tmp_path / "tiny.yaml")]
    assert import_ross.main([str(tmp_path / "model.safetensors"), *arguments]) == 0
    loaded = ROSS.load(tmp_path / "ross.ckpt")
    written = torch.load(tmp_path / "ross.ckpt", weights_only=True)
    assert set(written["state_dict"]) == own.checkpoint_keys() and written["global_step"] == 0  # generate and evaluate name it
    assert torch.equal(loaded.vlm.projector.linear_2.weight, state["model.mm_projector.2.weight"])
    assert torch.equal(loaded.vlm.language_model.lm_head.weight, state["lm_head.weight"])
    noisy, states = torch.randn(8, 3, 3), torch.randn(9, 24)
    weights = {name.removeprefix("model.mm_inv_projector.net."): tensor for name, tensor in denoiser().items()}
    expected = denoise(weights, noisy, 17, states)
    found = loaded.head(noisy[None], torch.tensor([17]), Tokens(states[None]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
