"""Tiny vision-language models and conversations for them."""

from __future__ import annotations

from typing import Any

import torch

from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
LLAVA = {"vision_config": CLIP, "text_config": LLAMA}
# One token per 8 pixels, so a 32-pixel image is a grid of 4 x 4; attention windows of 2 x 2 tokens in the first vision block.
QWEN = {
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    },
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "text": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "text": text}


CONVERSATIONS = [
    [user("<image>\nWhat colour is the circle?"), assistant("red")],
    [user("<image>and<image>"), assistant("no"), user("Why?"), assistant("the second image is green.")],
    [user("Is it?"), assistant("yes")],
]
PROMPTS = [turns[:-1] for turns in CONVERSATIONS]
COUNTS = [1, 2, 0]


def llava(config: dict[str, Any] = LLAVA, **arguments: Any) -> LlavaBackbone:
    torch.manual_seed(0)
    return LlavaBackbone.from_config(config, **arguments)


def qwen(**arguments: Any) -> Qwen25VL:
    torch.manual_seed(0)
    built = Qwen25VL.from_config(QWEN, **arguments)
    for parameter in built.parameters():  # the library's 0.02 leaves a model so flat that a wrong mask would not show
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return built


def random_images(vlm: LibraryVLM, count: int = 3) -> torch.Tensor:
    side = vlm.image_size or 32
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count)) * 2 - 1


def library_answers(own: Any, images: torch.Tensor, max_new_tokens: int) -> list[str]:
    """Greedy answers of the library's own model to ``PROMPTS``."""
    inputs = own.embed(PROMPTS, images, COUNTS, for_generation=True)
    theirs = own._whole[0].generate(
        input_ids=inputs.token_ids,
        pixel_values=own.normalise(images),
        attention_mask=inputs.attention_mask.long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=own.tokenizer.eos_token_id,
        pad_token_id=0,
    )[:, inputs.token_ids.shape[1] :]
    return [own.tokenizer.decode(row, skip_special_tokens=True).strip() for row in theirs]
