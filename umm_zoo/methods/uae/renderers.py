"""Renderers: from captions to images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.latent_codec import LatentCodec, stored_latents
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import IMAGE_MARKER, Batch, Grid, Images, Tokens, by_size, image_of_each_row, map_by_size
from umm_zoo.blocks.connectors import Connector
from umm_zoo.errors import Count, Weight, several
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.requests import request_batch
from umm_zoo.methods.uae.readers import CaptionReader, TextOnlyReader
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.guidance import Branch, guide
from umm_zoo.outputs import Sampling

#: What UAE's release guides away from.
NEGATIVE_PROMPT = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."


class Renderer(nn.Module, ABC):
    """Base class of generators of images from captions; an image depends on its caption and its seed alone.

    Attributes:
        refuses: settings that it does not take (``steps``, ``size``).
    """

    refuses: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Named parts, as a method wants them."""

    @abstractmethod
    def generate(
        self,
        vlm: LibraryVLM,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Images | None = None,
        adapter: LoRA | None = None,
        sampling: Sampling | None = None,
    ) -> list[Tensor]:
        """R images in [-1, 1], all of one size, no gradient.

        Args:
            vlm: the language model that the method trains, for renderers that read with it.
            captions: R texts.
            seeds: of the initial noise; captions of one seed start from the same noise.
            images: what the captions describe, of any sizes, for readers that look.
            adapter: of the policy.
            sampling: where it is not the renderer's own.
        """

    @abstractmethod
    def round_trip(self, vlm: LibraryVLM, images: Images) -> list[Tensor]:
        """Images through the codec and back."""

    def size_of(self, image: Tensor) -> tuple[int, int] | None:
        """Height and width of what is made again of an image: its own, where codec and decoder can; None is the renderer's own."""
        return None

    def match(self, vlm: LibraryVLM) -> None:
        """Refuse a language model that it cannot generate with, by a ``ValueError``."""


class CaptionRenderer(Renderer):
    """Renderer of UAE: states of the re-read caption, a connector, a diffusion transformer, a codec.

    The whole sequence of states takes the place of the decoder's text encoders (the paper's "last hidden state h_T" reads like one
    vector; the released code is plain). Guidance leads away from a negative prompt that is read in the same way. Padding is masked,
    where the release lets the decoder see it.

    Reference: Yan et al., 2025, arXiv 2509.09666, section 2, and its released code.

    Args:
        connector: from the language model's width to the decoder's; ``MLPConnector`` in the paper.
        decoder: Stable Diffusion 3.5-large in the paper.
        codec: the decoder's own.
        objective: how the decoder is trained and sampled (40 Euler steps in the release).
        reader: None is ``TextOnlyReader``.
        guidance: 5.0 in the released demo; 1 does without the negative prompt.
        negative_prompt: the release's.
        image_size: side in pixels of what is generated when nothing else is said; 1024 in the demo.

    Raises:
        ValueError: sizes of the blocks disagree.
    """

    def __init__(
        self,
        connector: Connector,
        decoder: ImageDecoder,
        codec: LatentCodec,
        objective: DecoderObjective,
        reader: CaptionReader | None = None,
        guidance: Weight = 5.0,
        negative_prompt: str = NEGATIVE_PROMPT,
        image_size: Count = 1024,
    ) -> None:
        super().__init__()
        for mine, found, theirs, expected in (
            ("connector.out_dim", connector.out_dim, "decoder.condition_dim", decoder.condition_dim),
            ("codec.latent_channels", codec.latent_channels, "decoder.latent_channels", decoder.latent_channels),
        ):
            if found != expected:
                raise ValueError(f"{mine} is {found}, {theirs} is {expected}")
        connector.match_rms(decoder.condition_rms)
        objective.match(decoder.schedule)
        decoder.pixels_per_cell = codec.downsampling
        self.connector, self.decoder, self.codec, self.objective = connector, decoder, codec, objective
        self.reader = reader or TextOnlyReader()
        self.guidance, self.negative_prompt, self.image_size = guidance, negative_prompt, image_size
        codec.latent_grid(image_size, image_size, decoder.patch)

    def parts(self) -> dict[str, nn.Module]:
        """``connector``, ``decoder`` and ``codec``."""
        return {"connector": self.connector, "decoder": self.decoder, "codec": self.codec}

    def match(self, vlm: LibraryVLM) -> None:
        """See ``Renderer``; widths must agree."""
        if self.connector.in_dim != vlm.width:
            raise ValueError(f"connector.in_dim is {self.connector.in_dim}, vlm.width is {vlm.width}")

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``."""
        self.decoder.try_latents(self.codec.encode(inputs))

    def condition(
        self, vlm: LibraryVLM, captions: Sequence[str], images: Images | None = None, adapter: LoRA | None = None
    ) -> Tokens:
        """The decoder's condition ``[R, N, E]``, with a gradient into the connector only."""
        states = self.reader(vlm, captions, images, adapter)
        dtype = next(self.connector.parameters()).dtype
        return self.connector(Tokens(states.values.to(dtype), states.mask), Grid(1, states.values.shape[1]))

    def negative(self, vlm: LibraryVLM, count: int, adapter: LoRA | None = None) -> Tokens:
        """The condition of the negative prompt, read once, for ``count`` rows."""
        one = self.condition(vlm, [self.negative_prompt], None, adapter)
        return Tokens(one.values.expand(count, -1, -1), None if one.mask is None else one.mask.expand(count, -1))

    def noise(self, seeds: Sequence[int], device: torch.device, size: tuple[int, int] | None = None) -> Tensor:
        """Initial noise ``[R, C, h, w]``, drawn on the CPU so that a seed means the same on every machine."""
        height, width = size or (self.image_size, self.image_size)
        shape = (self.decoder.latent_channels, *self.codec.latent_grid(height, width, self.decoder.patch))
        drawn = {seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in dict.fromkeys(seeds)}
        return torch.stack([drawn[seed] for seed in seeds]).to(device)

    @torch.no_grad()
    def generate(
        self,
        vlm: LibraryVLM,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Images | None = None,
        adapter: LoRA | None = None,
        sampling: Sampling | None = None,
    ) -> list[Tensor]:
        """See ``Renderer``."""
        sampling = sampling or Sampling()
        guidance = self.guidance if sampling.guidance is None else sampling.guidance
        noise = self.noise(seeds, vlm.device, sampling.size)
        condition = self.condition(vlm, captions, images, adapter)
        branches = [Branch(condition, 1.0)]
        if guidance != 1:
            branches = guide(self.negative(vlm, len(captions), adapter), condition, guidance)
        shape = (len(noise), *noise.shape[1:])
        return list(self.decoded(self.objective.sample(self.decoder, shape, branches, noise=noise, num_steps=sampling.num_steps)))

    @torch.no_grad()
    def latents(self, batch: Batch) -> list[Tensor]:
        """Latents ``[C, h, w]`` of each row's image, those of the shards where they hold any (``extras["latents"]``)."""
        if (stored := stored_latents(batch)) is not None:
            return self.codec.checked(stored)
        return map_by_size(self.codec.encode, image_of_each_row(batch))

    def losses(self, batch: Batch, condition: Tokens, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The objective's terms over all rows, from their condition ``[B, N, E]``."""
        groups = self.decoder.conditioned(by_size(self.latents(batch)), lambda rows, _: condition.select(rows or [0]))
        return dict(self.objective.over_sizes(self.decoder, groups, generator))

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Images of latents, clamped to [-1, 1]."""
        return self.codec.decode(latents).float().clamp(-1, 1)

    def round_trip(self, vlm: LibraryVLM, images: Images) -> list[Tensor]:
        """See ``Renderer``."""
        with torch.no_grad():
            return map_by_size(lambda stack: self.decoded(self.codec.encode(stack)), images)

    def size_of(self, image: Tensor) -> tuple[int, int] | None:
        """See ``Renderer``."""
        return _own_size(image, self.codec, self.decoder)


class BridgeRenderer(Renderer):
    """Renderer by a trained bridge (WeMMU, MetaQuery, ...) with its own frozen copy of the language model.

    For UAE's later form, in which reinforcement is a post-training of an existing model and trains the language model's words only.
    Since the bridge reads with its own copy, text is again all that passes.

    Args:
        bridge: built or, as ``umm_zoo.methods.wemmu.WeMMU.load`` with ``source: runs/...``, loaded.
    """

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self.bridge = bridge

    def parts(self) -> dict[str, nn.Module]:
        """``bridge``."""
        return {"bridge": self.bridge}

    def generate(
        self,
        vlm: LibraryVLM,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Images | None = None,
        adapter: LoRA | None = None,
        sampling: Sampling | None = None,
    ) -> list[Tensor]:
        """See ``Renderer``; the given model and its adapter are not looked at. A blank stands for an empty caption."""
        several("captions", captions)
        texts = [caption.replace(IMAGE_MARKER, "").strip() or "." for caption in captions]
        made = self.bridge.generate(request_batch(texts).to(vlm.device), seeds, sampling)
        return [image.float().clamp(-1, 1) for image in made]

    def round_trip(self, vlm: LibraryVLM, images: Images) -> list[Tensor]:
        """See ``Renderer``."""
        return self.bridge.round_trip(images)

    def size_of(self, image: Tensor) -> tuple[int, int] | None:
        """See ``Renderer``; squares in the bridge's own ``image_size``, for it need not be trained in theirs."""
        square = image.shape[-2] == image.shape[-1]
        return None if square else _own_size(image, self.bridge.codec, self.bridge.decoder)


def _own_size(image: Tensor, codec: LatentCodec, decoder: ImageDecoder) -> tuple[int, int] | None:
    """The size of an image, where codec and decoder can make it."""
    (height, width), factor = image.shape[-2:], codec.downsampling
    fits = not height % factor and not width % factor and decoder.takes(Grid(height // factor, width // factor))
    return (height, width) if fits else None
