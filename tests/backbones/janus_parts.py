"""Tiny Janus models with random weights, large enough that a wrong mask or position shows, and a tokenizer with Janus's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from umm_zoo.backbones.janus import Janus
from umm_zoo.backbones.token_codec import TokenCodec
from umm_zoo.backbones.tokenizer import SHIPPED
from umm_zoo.batch import Grid

TEXT = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
VQ = {
    "num_embeddings": 20,
    "embed_dim": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 16,
}
JANUS: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION, "vq_config": VQ}
TEXTS = ["a red circle", "a large blue square at the left"]
BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"


class Thirds(TokenCodec):
    """A codec of 27 colours, one per square of 4 pixels."""

    num_codes = 27
    downsampling = 4

    def codes(self, images: Tensor) -> Tensor:
        self.token_grid(*images.shape[-2:])
        levels = (nn.functional.avg_pool2d(images, 4) + 1).round().long()  # [M, 3, h, w]
        return (levels * torch.tensor([9, 3, 1]).view(3, 1, 1)).sum(1).flatten(1)[..., None]

    def images(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        h, w = self.grid_of(codes, grid)
        levels = codes[..., 0, None] // torch.tensor([9, 3, 1]) % 3 - 1.0
        return levels.mT.unflatten(2, (h, w)).repeat_interleave(4, 2).repeat_interleave(4, 3)


def spread(model: nn.Module) -> None:
    """Weights with outputs of about the size of their inputs; the library's 0.02 leaves a model so flat that nothing shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)


def janus(config: dict[str, Any] = JANUS, **arguments: Any) -> Janus:
    built = Janus.from_config(config, **arguments)
    spread(built)
    return built.eval()


def with_vq(**changed: Any) -> dict[str, Any]:
    return {**JANUS, "vq_config": {**VQ, **changed}}


def tokenizer_folder(folder: Path) -> str:
    """The shipped tokenizer with Janus's special tokens, which begins every text with one; 1,032 tokens."""
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    found = PreTrainedTokenizerFast(
        tokenizer_file=str(SHIPPED / "tokenizer.json"),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=names,
        clean_up_tokenization_spaces=False,
    )
    found.add_tokens([AddedToken(name, special=True) for name in ("<|User|>", "<|Assistant|>")], special_tokens=True)
    begins = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, found.bos_token_id)])
    found.backend_tokenizer.post_processor = begins
    found.save_pretrained(folder)
    return str(folder)


def with_tokenizer(folder: Path, **arguments: Any) -> Janus:
    """A tiny Janus with that tokenizer."""
    source = tokenizer_folder(folder)
    return janus({**JANUS, "text_config": {**TEXT, "vocab_size": 1040}, "image_token_id": 1027}, tokenizer=source, **arguments)
