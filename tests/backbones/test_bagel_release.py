"""Bagel's release: where its tensors go, how its tower reads images, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from umm_zoo.backbones.bagel_release import BagelImages, BagelLatents, BagelModel, NavitTower
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.blocks.sequence_plan import Item, SequencePlan
from umm_zoo.errors import UserError

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"vocab_size": 1024, "rope_theta": 1e6, "rms_norm_eps": 1e-6}  # type: ignore[dict-item]
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 7,
}


def table(side: int, width: int = 32) -> Tensor:
    """Sines and cosines of the column, then of the row, entry by entry."""
    rates = [10000 ** (-4 * k / width) for k in range(width // 4)]

    def of(place: int) -> list[Tensor]:
        return [torch.tensor([place * rate for rate in rates]).sin(), torch.tensor([place * rate for rate in rates]).cos()]

    return torch.stack([torch.cat(of(column) + of(row)) for row in range(side) for column in range(side)])


def tensors() -> dict[str, Tensor]:
    """Random tensors of all names of the release."""
    torch.manual_seed(0)
    shapes: dict[str, list[int]] = {
        "language_model.model.embed_tokens.weight": [1024, 32],
        "language_model.lm_head.weight": [1024, 32],
    }
    for ending in ("", "_moe_gen"):
        shapes[f"language_model.model.norm{ending}.weight"] = [32]
        for layer in range(2):
            begin = f"language_model.model.layers.{layer}."
            for name, size in (("q", 32), ("k", 16), ("v", 16)):
                shapes[f"{begin}self_attn.{name}_proj{ending}.weight"], shapes[f"{begin}self_attn.{name}_proj{ending}.bias"] = (
                    [size, 32],
                    [size],
                )
            shapes |= {f"{begin}self_attn.{name}_norm{ending}.weight": [8] for name in "qk"}
            shapes[f"{begin}self_attn.o_proj{ending}.weight"] = [32, 32]
            shapes |= {f"{begin}mlp{ending}.{name}_proj.weight": [48, 32] for name in ("gate", "up")}
            shapes[f"{begin}mlp{ending}.down_proj.weight"] = [32, 48]
            shapes |= {f"{begin}{name}_layernorm{ending}.weight": [32] for name in ("input", "post_attention")}
    vision = "vit_model.vision_model."
    shapes |= {f"{vision}embeddings.patch_embedding.weight": [24, 147], f"{vision}embeddings.patch_embedding.bias": [24]}
    shapes |= {f"{vision}embeddings.position_embedding.weight": [36, 24]}
    shapes |= {f"{vision}post_layernorm.{what}": [24] for what in ("weight", "bias")}
    for layer in range(2):
        begin = f"{vision}encoder.layers.{layer}."
        for name in ("q", "k", "v", "out"):
            shapes |= {f"{begin}self_attn.{name}_proj.weight": [24, 24], f"{begin}self_attn.{name}_proj.bias": [24]}
        shapes |= {f"{begin}layer_norm{number}.{what}": [24] for number in (1, 2) for what in ("weight", "bias")}
        shapes |= {f"{begin}mlp.fc1.weight": [40, 24], f"{begin}mlp.fc1.bias": [40]}
        shapes |= {f"{begin}mlp.fc2.weight": [24, 40], f"{begin}mlp.fc2.bias": [24]}
    shapes |= {
        "connector.fc1.weight": [32, 24],
        "connector.fc1.bias": [32],
        "connector.fc2.weight": [32, 32],
        "connector.fc2.bias": [32],
    }
    shapes |= {"vae2llm.weight": [32, 16], "vae2llm.bias": [32], "llm2vae.weight": [16, 32], "llm2vae.bias": [16]}
    for number, size in ((0, 256), (2, 32)):
        shapes |= {f"time_embedder.mlp.{number}.weight": [32, size], f"time_embedder.mlp.{number}.bias": [32]}
    made = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    return made | {"latent_pos_embed.pos_embed": table(8), "vit_pos_embed.pos_embed": table(6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bagel")
    save_file(tensors(), made / "ema.safetensors")
    for name, config in (("llm_config.json", TEXT), ("vit_config.json", VISION)):
        (made / name).write_text(json.dumps(config))
    load_tokenizer().save_pretrained(made)
    return made


def test_every_tensor_of_the_release_has_its_place(folder: Path) -> None:
    model, latents = (
        BagelModel.from_pretrained(str(folder), dtype="float32"),
        BagelLatents.from_pretrained(str(folder), 4, 32, 2, 8),
    )
    given = load_file(folder / "ema.safetensors")
    held = {own.data_ptr(): own for own in [*model.parameters(), *latents.parameters()]}
    assert sum(own.numel() for own in held.values()) == sum(own.numel() for own in given.values()) - 32 * (64 + 36)
    assert torch.equal(
        model.stack.layers[1].mlp_moe_gen.up_proj.weight, given["language_model.model.layers.1.mlp_moe_gen.up_proj.weight"]
    )
    assert torch.equal(latents.time_in[2].bias, given["time_embedder.mlp.2.bias"])


def test_latents_enter_with_their_time_and_place_and_leave_as_patches(folder: Path) -> None:
    latents, given = BagelLatents.from_pretrained(str(folder), 4, 32, 2, 8), load_file(folder / "ema.safetensors")
    x, time = torch.randn(1, 4, 2, 6), torch.tensor([0.3])
    angles = 0.3 * 10000 ** (-torch.arange(128) / 128)
    hidden = torch.nn.functional.silu(
        given["time_embedder.mlp.0.weight"] @ torch.cat([angles.cos(), angles.sin()]) + given["time_embedder.mlp.0.bias"]
    )
    token = torch.stack([x[0, c, p, 4 + q] for p in range(2) for q in range(2) for c in range(4)])  # of row 0, column 2
    expected = given["vae2llm.weight"] @ token + given["vae2llm.bias"] + table(8)[2]
    expected = expected + given["time_embedder.mlp.2.weight"] @ hidden + given["time_embedder.mlp.2.bias"]
    entered = latents.enter(x, time)
    torch.testing.assert_close(entered[0, 2], expected, atol=1e-5, rtol=1e-5)
    left = latents.leave(entered, x.shape[-2:])  # type: ignore[arg-type]
    velocity = given["llm2vae.weight"] @ entered[0, 2] + given["llm2vae.bias"]
    torch.testing.assert_close(torch.stack([left[0, c, p, 4 + q] for p in range(2) for q in range(2) for c in range(4)]), velocity)


def test_the_tower_is_siglip_s_where_an_image_is_a_square_of_all_places() -> None:
    torch.manual_seed(0)
    config = {**VISION, "num_hidden_layers": 2, "vision_use_head": False}
    library, own = SiglipVisionModel(SiglipVisionConfig(**config)).eval(), NavitTower(SiglipVisionConfig(**config)).eval()
    state = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in library.state_dict().items()}
    conv = state["vision_model.embeddings.patch_embedding.weight"]
    state["vision_model.embeddings.patch_embedding.weight"] = conv.permute(0, 2, 3, 1).flatten(1)
    own.load_state_dict(state, strict=False)
    images = torch.randn(2, 3, 42, 42)
    torch.testing.assert_close(own(images), library(images).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((100, 50), (448, 224)),
        ((480, 640), (476, 644)),
        ((2000, 500), (980, 252)),
        ((1080, 1920), (546, 980)),
        ((64, 1000), (56, 980)),
    ],
)
def test_images_are_resized_as_the_release_does(given: tuple[int, int], expected: tuple[int, int]) -> None:
    images = BagelImages({**VISION, "image_size": 980, "patch_size": 14}, 32, "nowhere")
    assert images.size(*given) == expected and images.image_grid(*given) == (expected[0] // 14, expected[1] // 14)


def test_images_of_any_shape_are_read_with_their_places(folder: Path) -> None:
    model = BagelModel.from_pretrained(str(folder), dtype="float32")
    wide, tall = model.encode_images([torch.rand(3, 42, 21), torch.rand(3, 21, 42)])
    assert (len(wide), len(tall)) == (6 * 3, 3 * 6) == (model.num_tokens(torch.rand(3, 42, 21)), 18)
    items = [Item("seen", num_tokens=18), Item("text", model.words("What?"))]
    plan = SequencePlan.of([items], model.marks)
    answers = model.answer(model.context(plan, model.embed(plan, {"seen": [wide]})), 3)
    assert len(answers) == 1


def test_a_table_of_another_size_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"max_side.*4 x 4 places.*8 x 8"):
        BagelLatents.from_pretrained(str(folder), 4, 32, 2, 4)


def test_a_missing_tensor_and_a_missing_file_are_user_errors(folder: Path, tmp_path: Path) -> None:
    kept = {name: own for name, own in tensors().items() if "layers.1.mlp_moe_gen.up_proj" not in name}
    for file in ("llm_config.json", "vit_config.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    save_file(kept, tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match=r"no tensor for 'stack\.layers\.1\.mlp_moe_gen\.up_proj\.weight'"):
        BagelModel.from_pretrained(str(tmp_path), dtype="float32")
    with pytest.raises(UserError, match=r"no llm_config\.json"):
        BagelModel.from_pretrained(str(tmp_path / "nowhere"))
