"""A tiny Harmon on patches of the shapes world, and batches of rows that read beside rows that generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.harmon import HarmonBackbone
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.batch import Batch
from umm_zoo.blocks.denoisers import MLPRegressionHead
from umm_zoo.blocks.masked_autoencoder import MaskedDecoder, MaskedEncoder
from umm_zoo.blocks.masking import CosineUnmasking, MaskRatio
from umm_zoo.blocks.token_head import TokenMLPHead
from umm_zoo.methods.harmon import Harmon
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.regression import MeanSquaredError
from umm_zoo.outputs import Wanted

PARTS = ["encoder", "mlp_in", "mlp_out", "language_model", "decoder", "head"]
TEXT = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
#: Of each row: images, answer, text to generate from.
ROWS: list[tuple[int, str | None, str | None]] = [
    (1, "red", None),
    (0, None, "a large blue square at the left"),
    (0, "blue " * 7, None),
    (0, None, "red"),
    (2, None, None),
    (0, None, "two small green circles"),
]


class Means(LatentCodec):
    """Latents are the means of squares of 4 pixels."""

    def __init__(self) -> None:
        super().__init__(3, 4, 1.0, 0.0)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return nn.functional.avg_pool2d(images, 4), None

    def expand(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(4, 2).repeat_interleave(4, 3)


def backbone(num_buffers: int = 5, **more: Any) -> HarmonBackbone:
    torch.manual_seed(0)
    encoder = MaskedEncoder(3, 4, 16, 2, 2, num_buffers=num_buffers, dropout=0.0)
    return HarmonBackbone({**TEXT, "initializer_range": 0.2}, encoder, Means(), max_length=256, **more)


def method(num_rounds: int = 4, decoder: MaskedDecoder | None = None, **arguments: Any) -> Harmon:
    own = backbone()
    torch.manual_seed(1)
    decoder = decoder or MaskedDecoder(16, 4, 12, 2, 2, num_buffers=5, dropout=0.0)
    settings = {"head": TokenMLPHead(12, 3, 16, 2), "objective": FlowMatching(num_steps=3), "image_size": 16, **arguments}
    made = Harmon(own, decoder, unmasking=CosineUnmasking(num_rounds), **settings)
    for parameter in made.head.parameters():  # its first output is zero, whatever the condition
        nn.init.normal_(parameter, std=0.3)
    made.train_only(PARTS)
    made.wanted = Wanted(max_new_tokens=3)
    return made.train()


class FirstTokens(MaskRatio):
    """Every row hides its first six tokens."""

    def ratios(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.full((rows,), 0.375)

    def masks(self, rows: int, num_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.arange(num_tokens).expand(rows, -1) < 6


def still(dropout: float = 0.0, **more: Any) -> Harmon:
    """Harmon of which nothing but the dropped prompts is random."""
    return method(head=MLPRegressionHead(12, 3), objective=MeanSquaredError(), ratio=FirstTokens(), dropout=dropout, **more)


def rows(chosen: list[tuple[int, str | None, str | None]] = ROWS, size: tuple[int, int] = (16, 16)) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def noise(count: int) -> list[Tensor]:
        return list(torch.rand(count, 3, *size, generator=generator) * 2 - 1)

    conversations = []
    shown, targets = noise(sum(images for images, _, _ in chosen)), iter(noise(sum(text is not None for *_, text in chosen)))
    for images, answer, text in chosen:
        turns = [{"role": "user", "text": "<image>" * images + ("Which colour?" if text is None else text)}]
        conversations.append(turns + ([] if answer is None else [{"role": "assistant", "text": answer}]))
    return Batch(
        keys=[f"row{number}" for number in range(len(chosen))],
        conversations=conversations,  # type: ignore[arg-type]
        images=shown,
        image_counts=[images for images, _, _ in chosen],
        targets=[None if text is None else next(targets) for *_, text in chosen],
    )
