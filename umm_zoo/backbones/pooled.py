"""Decoders that also take one vector of the whole text, from the CLIP text encoders of their pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from umm_zoo.backbones.diffusers_decoder import DiffusersDecoder
from umm_zoo.backbones.loading import find_source, load_checkpoint, on_meta_device, one_line


class PooledDecoder(DiffusersDecoder):
    """Decoder whose network takes a vector of the whole text beside the condition's tokens.

    A bridge has no such vector. The decoder gives a constant in its place, zeros or that of the empty string, as UAE's release does
    with Stable Diffusion 3; it travels in the checkpoint, so that the text encoders are needed once.

    Attributes:
        pooled_parts: the pipeline's text encoders that give it, one behind the other: what follows ``text_encoder`` in their
            folder's name, and whether their projection belongs to it.

    Args:
        width: of the vector.
        pooled: ``[width]``, the constant; None is zeros.

    Raises:
        ValueError: the constant has another width.
    """

    pooled_parts: ClassVar[Sequence[tuple[str, bool]]]
    pooled: Tensor

    def __init__(self, width: int, pooled: Tensor | None = None) -> None:
        super().__init__()
        if pooled is not None and pooled.shape != (width,):
            raise ValueError(f"{type(self).__name__}.pooled: found {list(pooled.shape)}, expected [{width}]")
        self.register_buffer("pooled", torch.zeros(width) if pooled is None else pooled.float().clone())

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        variant: str | None = None,
        quantization: dict[str, Any] | None = None,
        pooled_from: str | Path | None = None,
    ) -> Self:
        """As ``DiffusersDecoder.from_pretrained``.

        Args:
            source, config, subfolder, dtype, gradient_checkpointing, variant, quantization: see there.
            pooled_from: the pipeline whose text encoders give the constant, that of the empty string; None is zeros.

        Raises:
            ValueError: they give a vector of another width.
        """
        decoder = super().from_pretrained(source, config, subfolder, dtype, gradient_checkpointing, variant, quantization)
        if pooled_from is not None and not on_meta_device():
            found = pooled_of_nothing(pooled_from, cls.pooled_parts, variant)
            if found.shape != decoder.pooled.shape:
                raise ValueError(f"pooled_from: found a vector of {len(found)} in {pooled_from}, expected {len(decoder.pooled)}")
            decoder.pooled.copy_(found)
        return decoder

    def pooled_for(self, noisy: Tensor) -> Tensor:
        """The constant for a batch of latents, ``[B, width]`` in their dtype."""
        return self.pooled.to(noisy.dtype).expand(len(noisy), -1)


@torch.no_grad()
def pooled_of_nothing(source: str | Path, parts: Sequence[tuple[str, bool]], variant: str | None = None) -> Tensor:
    """The pooled vector of the empty string, those of the text encoders side by side.

    Args:
        source: a pipeline's folder or name, with its text encoders and their tokenizers.
        parts: see ``PooledDecoder.pooled_parts``.
        variant: of their files.
    """
    source, found = find_source(source), []
    for suffix, projected in parts:
        with one_line(source, f"a pipeline with a tokenizer{suffix} and its text_encoder{suffix}"):
            tokenizer: Any = AutoTokenizer.from_pretrained(source, subfolder=f"tokenizer{suffix}", trust_remote_code=False)
        where: dict[str, Any] = {"subfolder": f"text_encoder{suffix}"} | ({"variant": variant} if variant else {})
        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        encoder: Any = load_checkpoint(kind, source, "float32", **where)
        length = encoder.config.max_position_embeddings
        ids = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        out = encoder.eval()(ids)
        found.append((out.text_embeds if projected else out.pooler_output)[0].float())
    return torch.cat(found)
