"""Method that trains an image decoder with a text encoder of its own, before any bridge exists."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.batch import Batch, Grid, Tokens, by_size, stacked
from umm_zoo.errors import Share, UserError, Weight
from umm_zoo.method import Method
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.guidance import guide
from umm_zoo.outputs import Outputs, Sampling, TokenCount, in_groups


class TextToImage(Method):
    """Method of text-to-image: how Sana and SD3 were trained, and how the tiny decoders of this repository are.

    States of the text encoder, brought to the root mean square that the decoder names as its own, are its condition. With
    probability ``drop_text`` a prompt is replaced by the empty one, for guidance (Ho and Salimans, 2022, arXiv 2207.12598). A later
    stage does not take the text encoder over: a bridge replaces it.

    Args:
        text_encoder: of prompts.
        decoder: the network that denoises.
        codec: of its latents.
        objective: of the decoder, and its sampling.
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
        objective: DecoderObjective,
        drop_text: Share = 0.1,
        guidance: Weight = 4.5,
    ) -> None:
        super().__init__()
        if text_encoder.width != decoder.condition_dim:
            raise ValueError(f"text_encoder.width is {text_encoder.width}, decoder.condition_dim is {decoder.condition_dim}")
        if codec.latent_channels != decoder.latent_channels:
            raise ValueError(f"codec has {codec.latent_channels} latent channels, decoder has {decoder.latent_channels}")
        objective.match(decoder.schedule)
        decoder.pixels_per_cell = codec.downsampling
        self.text_encoder, self.decoder, self.codec, self.objective = text_encoder, decoder, codec, objective
        self.drop_text, self.guidance = drop_text, guidance

    def parts(self) -> dict[str, nn.Module]:
        """``text_encoder``, ``decoder`` and ``codec``."""
        return {"text_encoder": self.text_encoder, "decoder": self.decoder, "codec": self.codec}

    def precomputable(self) -> dict[str, Precomputable]:
        """``latents`` of the images to generate, while the codec is frozen."""
        if "codec" in self.changing:
            return {}
        return {"latents": Precomputable(self.codec, lambda batch: stacked(self.codec.target_latents(batch)), "row")}

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``."""
        self.decoder.try_latents(self.codec.encode(targets))

    def condition(self, texts: list[str]) -> Tokens:
        """The decoder's condition, ``[B, N, E]``, at the decoder's own root mean square."""
        states = self.text_encoder(texts)
        scale = states.values.float().square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt() * self.decoder.condition_rms
        return Tokens((states.values.float() * scale).to(states.values.dtype), states.mask)

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's terms."""
        groups, texts = by_size(self.codec.target_latents(batch)), prompts(batch)
        dropped = (torch.rand(len(texts)) < self.drop_text).tolist()
        condition = self.condition(["" if drop else text for text, drop in zip(texts, dropped, strict=True)])
        condition = replace(condition, crops=batch.crops)
        self.token_counts = {"text": TokenCount.of(condition)}
        conditioned = self.decoder.conditioned(groups, lambda rows, _: condition.select(rows or [0]))
        return self.over_step(self.objective.over_sizes(self.decoder, conditioned), "rows", len(batch))

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return (*self.objective.makes, "generated")

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """The objective's terms at fixed times and noise, and ``generated`` from the prompts; targets of one size go together."""
        sizes = [target.shape for target in batch.requested] if all(batch.has_target) else []
        return in_groups(lambda rows: self._validate(rows, batch_idx), batch, sizes)

    def _validate(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of rows whose targets have one size."""
        latents, texts = stacked(self.codec.target_latents(batch)), prompts(batch)
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        condition = replace(self.condition(texts), crops=batch.crops)
        outputs = Outputs(self.objective(self.decoder, latents, condition, generator))
        if self.wanted.generates(batch_idx):
            noise = torch.randn(latents.shape, generator=generator, device=self.device)
            outputs.generated = list(self._generate(texts, noise))
        return outputs

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows without a prompt."""
        prompts(batch)

    @property
    def refuses(self) -> frozenset[str]:
        """Images to generate from."""
        return frozenset({"images"})

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """Images of prompts in [-1, 1], in the decoder's own size where none is said; see ``outputs.Draws``.

        Raises:
            UserError: a row has no prompt, one longer than the text encoder reads, or an image; a size that the codec cannot make.
        """
        texts, longest = prompts(batch), self.text_encoder.max_length
        batch.assert_no_images("TextToImage")
        for row, text in enumerate(texts):
            if (length := self.text_encoder.text.length(text)) > longest:
                raise UserError("", f"a prompt of {length} tokens", f"at most {longest}, the text encoder's max_length", row=row)
        sampling = sampling or Sampling()
        own = Grid(self.decoder.sample_size, self.decoder.sample_size)
        grid = own if sampling.size is None else self.codec.latent_grid(*sampling.size, self.decoder.patch)
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        shape = (self.codec.latent_channels, *grid)
        noise = torch.stack([torch.randn(shape, generator=own, device=self.device) for own in generators])
        return list(self._generate(texts, noise, sampling.guidance, sampling.num_steps))

    @torch.no_grad()
    def _generate(self, texts: list[str], noise: Tensor, guidance: float | None = None, num_steps: int | None = None) -> Tensor:
        branches = guide(self.condition([""] * len(texts)), self.condition(texts), self.guidance if guidance is None else guidance)
        shape = (len(texts), *noise.shape[1:])
        latents = self.objective.sample(self.decoder, shape, branches, noise=noise, num_steps=num_steps)
        return self.codec.decode(latents).clamp(-1, 1)


class TextToImageModel(TextToImage):
    """Text-to-image model as pipelines hold one: the decoder sees the text encoder's states as they are, and both are kept.

    ``TextToImage`` trains a decoder for a bridge; this is the model that a later stage leaves as it is (``ForgeAndQuench``).
    """

    stage_only: ClassVar[tuple[str, ...]] = ()

    def condition(self, texts: list[str]) -> Tokens:
        """The text encoder's states, ``[B, N, E]``."""
        return self.text_encoder(texts)


def prompts(batch: Batch) -> list[str]:
    """The prompt of each row: its last user turn.

    Raises:
        UserError: a row has none.
    """
    texts = []
    for row, conversation in enumerate(batch.conversations):
        turn = next((turn["text"] for turn in reversed(conversation) if turn["role"] == "user"), "")
        if not turn:
            raise UserError("", "no prompt", "rows with a user turn", row=row)
        texts.append(turn)
    return texts
