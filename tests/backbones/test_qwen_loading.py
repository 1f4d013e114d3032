"""Building Qwen2.5-VL at the published sizes, and saving and loading it in the library's format."""

import copy

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.backbones.vlm_parts import QWEN, user
from umm_zoo.backbones import qwen2_5_vl
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL

VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
TEXT = {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
PUBLISHED = {
    "3b": {
        "tie_word_embeddings": True,
        "text_config": {
            **TEXT,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
        "vision_config": {**VISION, "out_hidden_size": 2048},
    },
    "7b": {
        "tie_word_embeddings": False,
        "text_config": {
            **TEXT,
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "vision_config": {**VISION, "out_hidden_size": 3584},
    },
}


def counted_by_hand(config):
    """Parameters per part from the published architecture: biases on q, k, v and in the tower, none elsewhere."""
    text, vision = config["text_config"], config["vision_config"]
    d, f = text["hidden_size"], text["intermediate_size"]
    kv = d // text["num_attention_heads"] * text["num_key_value_heads"]
    layer = (d * d + d) + 2 * (d * kv + kv) + d * d + 3 * d * f + 2 * d
    tables = text["vocab_size"] * d * (1 if config["tie_word_embeddings"] else 2)
    v, g = vision["hidden_size"], vision["intermediate_size"]
    block = (3 * v * v + 3 * v) + (v * v + v) + 2 * (v * g + g) + (g * v + v) + 2 * v
    patches = 3 * vision.get("temporal_patch_size", 2) * vision["patch_size"] ** 2 * v
    merged = 4 * v
    return {
        "vision_tower": patches + vision["depth"] * block,
        "projector": v + (merged * merged + merged) + (merged * d + d),
        "language_model": tables + text["num_hidden_layers"] * layer + d,
    }


@pytest.mark.parametrize(("size", "total"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_published_sizes_without_memory_or_files(size, total, monkeypatch):
    monkeypatch.setattr(qwen2_5_vl, "load_tokenizer", lambda source: pytest.fail("read a tokenizer"))
    with torch.device("meta"):
        vlm = Qwen25VL.from_pretrained(f"nobody/has-{size}", PUBLISHED[size], dtype="bfloat16", attention="eager")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in vlm.parts().items()}
    assert counts == counted_by_hand(PUBLISHED[size])
    assert sum(counts.values()) == total
    assert vlm.width == PUBLISHED[size]["text_config"]["hidden_size"] and vlm.image_grid(512, 512) == (18, 18)
    assert {(p.device.type, p.dtype) for p in vlm.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_bit_equal(tmp_path, tied):
    vlm = Qwen25VL.from_config({**QWEN, "tie_word_embeddings": tied}, min_pixels=600)
    vlm.save(tmp_path)
    loaded = Qwen25VL.from_pretrained(str(tmp_path), {**QWEN, "tie_word_embeddings": tied})
    assert loaded.layout == vlm.layout and len(loaded.tokenizer) == len(vlm.tokenizer)
    assert loaded.state_dict().keys() == vlm.state_dict().keys()
    assert all(value.equal(vlm.state_dict()[name]) for name, value in loaded.state_dict().items())
    asked = ([[user("<image>?")]], torch.zeros(1, 3, 24, 24), [1])
    assert loaded.embed(*asked).embeddings.equal(vlm.embed(*asked).embeddings)
    assert loaded(loaded.embed(*asked)).hidden.equal(vlm(vlm.embed(*asked)).hidden)


def test_the_library_reads_what_is_saved(tmp_path):
    vlm = Qwen25VL.from_config(QWEN)
    vlm.save(tmp_path)
    library, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert library.config.image_token_id == vlm.tokenizer.get_vocab()["<|image_pad|>"]


def changed(*path, value):
    config = copy.deepcopy(QWEN)
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vision_config": {}}, "found .'vision_config'., expected 'text_config' too"),
        (changed("text_config", "num_layers", value=3), "config.text_config: found 'num_layers'"),
        (
            changed("text_config", "rope_parameters", "mrope_section", value=[16, 24, 24]),
            "expected a sum of 8, half of the head",
        ),
        (changed("vision_config", "out_hidden_size", value=48), "out_hidden_size: found 48, expected text_config.hidden_size, 32"),
        (changed("vision_config", "window_size", value=7), "window_size: found 7, expected 8 pixels"),
        (changed("vision_config", "num_heads", value=8), "expected a multiple of 4 x num_heads"),
        (changed("text_config", "vocab_size", value=100), "tokenizer: found ids up to 1023, expected fewer than .* 100"),
        (changed("image_token_id", value=3), "config.image_token_id: found 3, expected .*, the tokenizer's"),
    ],
)
def test_mistakes_in_a_config_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        Qwen25VL.from_config(config)


def test_another_checkpoint_than_the_one_stated_is_refused(tmp_path):
    Qwen25VL.from_config(QWEN).save(tmp_path)
    with pytest.raises(ValueError, match=r"config\.text_config\.num_hidden_layers: found 3, expected 2 as in"):
        Qwen25VL.from_pretrained(str(tmp_path), changed("text_config", "num_hidden_layers", value=3))


def test_frozen_model_with_gradient_checkpointing_keeps_no_graph():
    vlm = Qwen25VL.from_config(QWEN, gradient_checkpointing=True).requires_grad_(False)
    inputs = vlm.embed([[user("<image>?")]], torch.zeros(1, 3, 16, 16), [1])
    assert not inputs.embeddings.requires_grad and not vlm(inputs).hidden.requires_grad


def test_built_on_meta_cannot_be_run():
    with torch.device("meta"):
        vlm = Qwen25VL.from_config(QWEN, tokenizer="some-one/elsewhere")
    with pytest.raises(RuntimeError, match="meta device"):
        vlm.tokenizer  # noqa: B018
