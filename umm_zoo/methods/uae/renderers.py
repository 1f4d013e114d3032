"""From a caption to an image: how a caption is read, and what draws it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.base import IGNORE
from umm_zoo.backbones.codecs import LatentCodec
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import IMAGE_MARKER, Conversation, Grid, Tokens, Turn
from umm_zoo.blocks.connectors import Connector
from umm_zoo.methods.bridge import Bridge, drawing_batch
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import Branch, guide

#: What UAE's release draws away from.
NEGATIVE_PROMPT = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."


class CaptionReader(ABC):
    """Which states of the language model stand for a caption. They carry no gradient: a decoder trains the model by reward only."""

    with_adapter: ClassVar[bool] = True  #: whether the policy's adapter takes part, or the model reads as it was before

    @abstractmethod
    def states(self, vlm: Qwen25VL, captions: Sequence[str], images: Tensor | None) -> Tokens:
        """The states ``[R, N, D]`` with their mask.

        Args:
            vlm: the language model, in evaluation mode.
            captions: R texts.
            images: what they describe, ``[R, 3, H, W]``; None where there is none, as for a negative prompt.
        """

    def __call__(self, vlm: Qwen25VL, captions: Sequence[str], images: Tensor | None, adapter: LoRA | None = None) -> Tokens:
        """``states`` without gradient, with or without the policy's adapter."""
        off = adapter.disabled() if adapter is not None and not self.with_adapter else nullcontext()
        with torch.no_grad(), evaluation_mode(vlm), off:
            return self.states(vlm, captions, images)


class TextOnlyReader(CaptionReader):
    """The caption alone, re-read as a turn of its own role: the pure auto-encoder, in which text is all that passes.

    As in the released demo: the role is the literal ``generate``, the template's system turn stands before it and the opening of an
    answer behind, and the whole sequence of last-layer states counts, template tokens included.

    Args:
        role: of the turn.
    """

    def __init__(self, role: str = "generate") -> None:
        self.role = role

    def states(self, vlm: Qwen25VL, captions: Sequence[str], images: Tensor | None) -> Tokens:
        """See ``CaptionReader``; the images are not looked at."""
        conversations = [[_turn(self.role, caption)] for caption in captions]
        inputs = vlm.embed(conversations, None, [0] * len(captions), for_generation=True)
        return Tokens(vlm(inputs).hidden, inputs.attention_mask)


class BaseTextReader(TextOnlyReader):
    """As ``TextOnlyReader``, but by the model without the policy's adapter, so that training changes nothing but the text.

    In the paper the same weights write and read, and the condition drifts while the policy learns. Here what a reward gains can
    only have come through the words.
    """

    with_adapter = False


class AnswerStatesReader(CaptionReader):
    """The states at the caption's own tokens while the image is looked at, as UAE's released cold start does.

    They have attended to the image, so more than text passes: what the decoder draws is no proof of what the caption says. Texts
    without an image are read as answers to the prompt alone.

    Args:
        prompt: what is asked before the caption.
    """

    def __init__(self, prompt: str = "Describe the image.") -> None:
        self.prompt = prompt

    def states(self, vlm: Qwen25VL, captions: Sequence[str], images: Tensor | None) -> Tokens:
        """See ``CaptionReader``."""
        marker = f"{IMAGE_MARKER}\n" if images is not None else ""
        conversations: list[Conversation] = [
            [_turn("user", self.prompt, marker), _turn("assistant", caption)] for caption in captions
        ]
        inputs = vlm.embed(conversations, images, [0 if images is None else 1] * len(captions))
        hidden, wanted = vlm(inputs).hidden, inputs.labels != IGNORE  # [R, L, D], [R, L]
        order = torch.argsort(~wanted, dim=1, stable=True)[:, : int(wanted.sum(dim=1).max())]  # answer tokens first, in their order
        return Tokens(torch.take_along_dim(hidden, order[..., None], dim=1), torch.take_along_dim(wanted, order, dim=1))


def _turn(role: str, text: str, marker: str = "") -> Turn:
    return {"role": role, "text": marker + text.replace(IMAGE_MARKER, "")}  # type: ignore[typeddict-item]


class Renderer(nn.Module, ABC):
    """Draws captions. An image depends on its caption and its seed alone, not on what else is drawn at the same time."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Named parts, as a method wants them."""

    @abstractmethod
    def draw(
        self,
        vlm: Qwen25VL,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Tensor | None = None,
        adapter: LoRA | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Images ``[R, 3, H, W]`` in [-1, 1], no gradient.

        Args:
            vlm: the language model that the method trains, for renderers that read with it.
            captions: R texts.
            seeds: of the initial noise; captions of one seed start from the same noise.
            images: what the captions describe, for readers that look.
            adapter: of the policy.
            num_steps: of sampling; None is the renderer's own.
        """


class CaptionRenderer(Renderer):
    """UAE's: states of the re-read caption, a connector, a diffusion transformer, a codec.

    The whole sequence of states takes the place of the decoder's text encoders (the paper's "last hidden state h_T" reads like one
    vector; the released code is plain). Guidance draws away from a negative prompt that is read in the same way. Padding is masked,
    where the release lets the decoder see it.

    Reference: Yan et al., 2025, arXiv 2509.09666, section 2, and its released code.

    Args:
        connector: from the language model's width to the decoder's; ``MLPConnector`` in the paper.
        decoder: Stable Diffusion 3.5-large in the paper.
        codec: the decoder's own.
        objective: how the decoder is trained and sampled (40 Euler steps in the release).
        reader: None is ``TextOnlyReader``.
        guidance: 5.0 in the released demo; 1 draws without the negative prompt.
        negative_prompt: the release's.
        image_size: side in pixels of what is drawn; 1024 in the demo.

    Raises:
        ValueError: sizes of the blocks disagree.
    """

    def __init__(
        self,
        connector: Connector,
        decoder: ImageDecoder,
        codec: LatentCodec,
        objective: FlowMatching,
        reader: CaptionReader | None = None,
        guidance: float = 5.0,
        negative_prompt: str = NEGATIVE_PROMPT,
        image_size: int = 1024,
    ) -> None:
        super().__init__()
        for mine, found, theirs, expected in (
            ("connector.out_dim", connector.out_dim, "decoder.condition_dim", decoder.condition_dim),
            ("codec.latent_channels", codec.latent_channels, "decoder.latent_channels", decoder.latent_channels),
            ("image_size % (downsampling * patch)", image_size % (codec.downsampling * decoder.patch), "it", 0),
        ):
            if found != expected:
                raise ValueError(f"{mine} is {found}, {theirs} must be {expected}")
        connector.match_rms(decoder.condition_rms)
        self.connector, self.decoder, self.codec, self.objective = connector, decoder, codec, objective
        self.reader = reader or TextOnlyReader()
        self.guidance, self.negative_prompt, self.image_size = guidance, negative_prompt, image_size

    def parts(self) -> dict[str, nn.Module]:
        """``connector``, ``decoder`` and ``codec``."""
        return {"connector": self.connector, "decoder": self.decoder, "codec": self.codec}

    def condition(
        self, vlm: Qwen25VL, captions: Sequence[str], images: Tensor | None = None, adapter: LoRA | None = None
    ) -> Tokens:
        """The decoder's condition ``[R, N, E]``, with a gradient into the connector only."""
        states = self.reader(vlm, captions, images, adapter)
        dtype = next(self.connector.parameters()).dtype
        return self.connector(Tokens(states.values.to(dtype), states.mask), Grid(1, states.values.shape[1]))

    def negative(self, vlm: Qwen25VL, count: int, adapter: LoRA | None = None) -> Tokens:
        """The condition of the negative prompt, read once, for ``count`` rows."""
        one = self.condition(vlm, [self.negative_prompt], None, adapter)
        return Tokens(one.values.expand(count, -1, -1), None if one.mask is None else one.mask.expand(count, -1))

    def noise(self, seeds: Sequence[int], device: torch.device) -> Tensor:
        """Initial noise ``[R, C, h, w]``, drawn on the CPU so that a seed means the same on every machine."""
        side = self.image_size // self.codec.downsampling
        shape = (self.decoder.latent_channels, side, side)
        drawn = {seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in dict.fromkeys(seeds)}
        return torch.stack([drawn[seed] for seed in seeds]).to(device)

    @torch.no_grad()
    def draw(
        self,
        vlm: Qwen25VL,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Tensor | None = None,
        adapter: LoRA | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """See ``Renderer``."""
        noise = self.noise(seeds, vlm.device)
        condition = self.condition(vlm, captions, images, adapter)
        branches = [Branch(condition, 1.0)]
        if self.guidance != 1:
            branches = guide(self.negative(vlm, len(captions), adapter), condition, self.guidance)
        size, channels, height, width = noise.shape
        shape = (size, channels, height, width)
        return self.decoded(self.objective.sample(self.decoder, shape, branches, noise=noise, num_steps=num_steps))

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Images of latents, clamped to [-1, 1]."""
        return self.codec.decode(latents).float().clamp(-1, 1)


class BridgeRenderer(Renderer):
    """A trained bridge (WeMMU, MetaQuery, ...) draws the captions, with its own frozen copy of the language model.

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

    @torch.no_grad()
    def draw(
        self,
        vlm: Qwen25VL,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Tensor | None = None,
        adapter: LoRA | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """See ``Renderer``; the given model and its adapter are not looked at. An empty caption is asked for as a blank."""
        texts = [caption.replace(IMAGE_MARKER, "").strip() or "." for caption in captions]
        batch = drawing_batch(texts, [[] for _ in texts]).to(vlm.device)
        return self.bridge.draw(batch, list(seeds), num_steps).float().clamp(-1, 1)
