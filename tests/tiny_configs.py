"""Configurations of networks small enough for tests, in the words of their libraries; what a test is about, it sets itself."""

from __future__ import annotations

from typing import Any


def clip(**changes: Any) -> dict[str, Any]:
    """A vision tower with 2 x 2 patches of 4 pixels."""
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 4, **changes}


def llama(**changes: Any) -> dict[str, Any]:
    """A language model of width 24."""
    sizes = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 3}
    return {"model_type": "llama", **sizes, **changes}


def qwen(width: int, sections: list[int], vision: dict[str, Any] | None = None, theta: float = 1e4, **text: Any) -> dict[str, Any]:
    """Qwen2.5-VL with 2 layers and a token per 8 pixels; ``sections`` and ``theta`` are those of its rotary positions."""
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    windows = {"window_size": 16, "fullatt_block_indexes": [0], "out_hidden_size": width}
    return {
        "tie_word_embeddings": True,
        "text_config": {"vocab_size": 1024, "hidden_size": width, **heads, "rope_parameters": rope, **text},
        "vision_config": {**eyes, **windows, **(vision or {})},
    }


def codec(channels: int, widths: tuple[int, int] = (4, 4), **changes: Any) -> dict[str, Any]:
    """A variational codec of factor 2."""
    types = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": list(widths), "layers_per_block": 1, "latent_channels": channels, "norm_num_groups": 2}
    return {**types, **sizes, **changes}


#: A codec of Sana's kind, Sana behind it and its text encoder.
DC = {
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [8, 16],
    "decoder_block_out_channels": [8, 16],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], []],
    "attention_head_dim": 8,
    "latent_channels": 8,
}
SANA = {
    "in_channels": 5, "out_channels": 5, "sample_size": 4, "num_attention_heads": 3, "attention_head_dim": 8,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16,
    "num_layers": 2, "mlp_ratio": 1.0,
}  # fmt: skip
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.0}
#: The two halves of a CLIP.
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12,
}  # fmt: skip
