"""Training of an image decoder with a text encoder of its own, before any bridge exists."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from umm_zoo.backbones.codecs import LatentCodec
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.batch import Batch, Tokens
from umm_zoo.errors import MistakeError
from umm_zoo.method import Method
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import guide
from umm_zoo.training.optimization import OptimizerFactory, Schedule


class TextToImage(Method):
    """Draw an image from its prompt: how Sana and SD3 were made, and how the tiny decoders of this repository are.

    States of the text encoder, brought to the root mean square that the decoder names as its own, are its condition. With
    probability ``drop_text`` a prompt is replaced by the empty one, for guidance (Ho and Salimans, 2022, arXiv 2207.12598). A later
    stage does not take the text encoder over: a bridge replaces it.

    Latents are read from ``batch.extras["latents"]`` where they were stored, otherwise made from ``batch.targets`` by the codec.

    Args:
        text_encoder: of prompts.
        decoder: the network that draws.
        codec: of its latents.
        objective: of the decoder, and its sampling.
        trained: names of trained parts (``text_encoder``, ``decoder``).
        optimizer: their optimiser.
        schedule: of the learning rate.
        drop_text: probability of an empty prompt; 0.1 in Sana's and everybody's recipe.
        guidance: scale while sampling; 4.5 in Sana's pipeline.

    Raises:
        ValueError: codec, text encoder and decoder do not fit each other.
    """

    stage_only: ClassVar[tuple[str, ...]] = ("text_encoder",)

    def __init__(
        self,
        text_encoder: TextEncoder,
        decoder: ImageDecoder,
        codec: LatentCodec,
        objective: FlowMatching,
        trained: list[str],
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        drop_text: float = 0.1,
        guidance: float = 4.5,
    ) -> None:
        super().__init__()
        if text_encoder.width != decoder.condition_dim:
            raise ValueError(f"text_encoder.width is {text_encoder.width}, decoder.condition_dim is {decoder.condition_dim}")
        if codec.latent_channels != decoder.latent_channels:
            raise ValueError(f"codec has {codec.latent_channels} latent channels, decoder has {decoder.latent_channels}")
        self.text_encoder, self.decoder, self.codec, self.objective = text_encoder, decoder, codec, objective
        self.drop_text, self.guidance = drop_text, guidance
        self.train_only(trained, optimizer, schedule)

    def parts(self) -> dict[str, nn.Module]:
        """``text_encoder``, ``decoder`` and ``codec``."""
        return {"text_encoder": self.text_encoder, "decoder": self.decoder, "codec": self.codec}

    def precomputable(self) -> dict[str, Precomputable]:
        """``latents`` of the images to draw, while the codec is frozen."""
        return {} if "codec" in self.trained else {"latents": Precomputable(self.codec, self.target_latents, "row")}

    def condition(self, texts: list[str]) -> Tokens:
        """What the decoder draws from, ``[B, N, E]``, at the decoder's own root mean square."""
        states = self.text_encoder(texts)
        scale = states.values.float().square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt() * self.decoder.condition_rms
        return Tokens((states.values.float() * scale).to(states.values.dtype), states.mask)

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's terms."""
        latents, texts = self._latents(batch), prompts(batch)
        dropped = (torch.rand(len(texts)) < self.drop_text).tolist()
        condition = self.condition(["" if drop else text for text, drop in zip(texts, dropped, strict=True)])
        return self.objective(self.decoder, latents, condition)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The objective's terms at fixed times and noise, and ``images`` ``[B, 3, H, W]`` drawn from the prompts."""
        latents, texts = self._latents(batch), prompts(batch)
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        losses = self.objective(self.decoder, latents, self.condition(texts), generator)
        size = (latents.shape[-2] * self.codec.downsampling, latents.shape[-1] * self.codec.downsampling)
        return {**losses, "generated": self.draw(texts, size, generator)}

    @torch.no_grad()
    def draw(
        self,
        texts: list[str],
        size: tuple[int, int],
        generator: torch.Generator | None = None,
        guidance: float | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Images of ``texts``.

        Args:
            texts: prompts.
            size: height and width in pixels, multiples of what a latent cell covers.
            generator: of the noise, on the method's device.
            guidance: scale, in place of the method's own.
            num_steps: of sampling, in place of the objective's own.

        Returns:
            ``[B, 3, H, W]`` in [-1, 1].
        """
        height, width = (side // self.codec.downsampling for side in size)
        branches = guide(self.condition([""] * len(texts)), self.condition(texts), self.guidance if guidance is None else guidance)
        shape = (len(texts), self.codec.latent_channels, height, width)
        latents = self.objective.sample(self.decoder, shape, branches, generator, num_steps=num_steps)
        return self.codec.decode(latents).clamp(-1, 1)

    def _latents(self, batch: Batch) -> Tensor:
        return batch.extras["latents"].float() if "latents" in batch.extras else self.target_latents(batch)

    @torch.no_grad()
    def target_latents(self, batch: Batch) -> Tensor:
        """Latents of the images to draw, ``[B, C, h, w]``.

        Raises:
            ValueError: there are none.
        """
        if batch.targets is None:
            raise MistakeError("data: found rows without an image to draw, expected rows with KEY.target.png")
        return self.codec.encode(batch.targets)


def prompts(batch: Batch) -> list[str]:
    """What each row asks to be drawn: its last user turn.

    Raises:
        ValueError: a row has none.
    """
    texts = []
    for row, conversation in enumerate(batch.conversations):
        turn = next((turn["text"] for turn in reversed(conversation) if turn["role"] == "user"), "")
        if not turn:
            raise MistakeError("found no prompt, expected rows with a user turn", row)
        texts.append(turn)
    return texts
