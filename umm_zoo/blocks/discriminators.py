"""Discriminators: networks that tell images from reconstructions of them, by patches or as a whole."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.frozen import freeze
from umm_zoo.blocks.transformer import time_embedding
from umm_zoo.errors import Count, UserError, several


class Discriminator(nn.Module, ABC):
    """Logits of being an image rather than a reconstruction.

    Layers stand in ``nn.Sequential``, not in ``nn.ModuleList``, whose elements fully sharded training would gather one by one: see
    ``objectives.adversarial.frozen_call``.

    Shape:
        - images: ``[B, 3, H, W]`` in [-1, 1]
        - context: ``[B, C, H, W]``, what else is known of each, or None
        - time: ``[B]`` in [0, 1], of a noisy context, or None
        - output: ``[B, ...]``, one logit per image or per patch

    Attributes:
        image_size: side of the images that it takes; None where they may have any.
    """

    image_size: int | None = None

    @abstractmethod
    def forward(self, images: Tensor, context: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Judge."""


def patch_widths(width: int, num_layers: int) -> list[int]:
    """Widths behind the first convolution of a PatchGAN and each later one but the last: doubled up to eight times the first."""
    return [width * min(2**n, 8) for n in range(num_layers + 1)]


def assert_large_enough(images: Tensor, num_layers: int) -> None:
    """Refuse images of which no patch is left.

    Raises:
        UserError: names the least size.
    """
    least = 3 * 2**num_layers
    if min(images.shape[-2:]) < least:
        found = f"images of {images.shape[-2]} x {images.shape[-1]} px for a discriminator of {num_layers} layers"
        raise UserError("", found, f"{least} px or more", "or fewer num_layers")


class PatchDiscriminator(Discriminator):
    """Convolutions that judge overlapping patches, of 70 px at three layers (PatchGAN; Isola et al., 2017, arXiv 1611.07004).

    Tensors have the names of LlamaGen's and taming-transformers' release, and outputs are theirs under ``batch``. What the images
    of a micro-batch have in common then enters every logit, and a step depends on how it is shared out; under ``group`` (our
    choice) each image is judged alone.

    Shape:
        - images: ``[B, 3, H, W]``; context ``[B, context_dim, H, W]`` where there is one
        - output: ``[B, 1, H / 2^num_layers - 2, W / 2^num_layers - 2]``

    Args:
        width: channels behind the first convolution.
        num_layers: convolutions of stride 2.
        norm: behind all convolutions but the first and the last.
        context_dim: channels of the context.
    """

    def __init__(self, width: Count = 64, num_layers: Count = 3, norm: Literal["batch", "group"] = "batch", context_dim: int = 0):
        super().__init__()
        self.num_layers, self.context_dim = num_layers, context_dim
        widths = patch_widths(width, num_layers)
        layers: list[nn.Module] = [nn.Conv2d(3 + context_dim, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for place, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if place < num_layers else 1
            layers += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=norm == "group")]
            layers += [nn.BatchNorm2d(after) if norm == "batch" else group_norm(after), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        initialize(self)

    def forward(self, images: Tensor, context: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Judge each patch; the time is not looked at."""
        assert_large_enough(images, self.num_layers)
        return self.main(beside(images, context, self.context_dim))


class TimeDiscriminator(Discriminator):
    """PatchGAN that sees a denoised image beside the noisy one that it was made of, and their time (Epsilon-VAE, section 3).

    Channels are concatenated, and the time shifts and scales every group norm (AdaGN), about 0 and 1 in the beginning. The paper
    leaves the rest open: layers are those of ``PatchDiscriminator`` (our choice).

    Shape:
        - images, context: ``[B, 3, H, W]``; time ``[B]`` in [0, 1]
        - output: ``[B, 1, H / 2^num_layers - 2, W / 2^num_layers - 2]``

    Args:
        width: channels behind the first convolution.
        num_layers: convolutions of stride 2.
    """

    def __init__(self, width: Count = 64, num_layers: Count = 3) -> None:
        super().__init__()
        self.num_layers, self.time_width = num_layers, 4 * width
        self.first = nn.Conv2d(6, width, 4, stride=2, padding=1)
        self.widths = patch_widths(width, num_layers)
        pairs = list(itertools.pairwise(self.widths))
        strides = [2] * (num_layers - 1) + [1]
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(before, after, 4, stride=s, padding=1) for (before, after), s in zip(pairs, strides, strict=True))
        )
        self.norms = nn.Sequential(*(group_norm(after, affine=False) for _, after in pairs))
        self.time_in = nn.Sequential(nn.Linear(self.time_width, self.time_width), nn.SiLU())
        self.modulation = nn.Linear(self.time_width, 2 * sum(self.widths[1:]))
        self.last = nn.Conv2d(self.widths[-1], 1, 4, padding=1)
        initialize(self)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, images: Tensor, context: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Judge each patch.

        Raises:
            UserError: there is no context or no time.
        """
        if context is None or time is None:
            hint = "or a PatchDiscriminator, which sees the image alone"
            raise UserError(
                "", "a TimeDiscriminator without a noisy image or its time", "a method of diffusion, which has both", hint
            )
        assert_large_enough(images, self.num_layers)
        x = F.leaky_relu(self.first(beside(images, context, 3)), 0.2)
        moment = self.time_in(time_embedding(1000 * time, self.time_width).to(x.dtype))  # [B, time_width]
        guides = self.modulation(moment)[..., None, None].split([2 * width for width in self.widths[1:]], dim=1)
        for convolution, norm, guide in zip(self.convolutions, self.norms, guides, strict=True):
            scale, shift = guide.chunk(2, dim=1)
            x = F.leaky_relu(norm(convolution(x)) * (1 + scale) + shift, 0.2)
        return self.last(x)


class FeatureDiscriminator(Discriminator):
    """Small heads on the features of a frozen encoder (Projected GAN, Sauer et al., 2021, arXiv 2111.01007; RAE).

    RAE's encoder is DINO-S/8. Each head is a projection, a residual convolution and a logit per token, with spectral norms, as in
    StyleGAN-T (arXiv 2301.09515), whose norms over parts of a batch are group norms here, so that each image is judged alone, and
    whose convolutions go along the sequence where ours go over the grid. RAE's augmentations before it are left out.

    Shape:
        - images: ``[B, 3, H, W]``, resized by the encoder
        - output: ``[B, len(layers), h, w]`` on the encoder's grid

    Args:
        encoder: gets frozen.
        layers: of which a head sees the tokens, see ``FeatureEncoder.tokens``; (-10, -7, -4, -1) of twelve in StyleGAN-T.
        width: of the heads.
    """

    def __init__(self, encoder: FeatureEncoder, layers: Sequence[int] = (-1,), width: Count = 128) -> None:
        super().__init__()
        several("FeatureDiscriminator.layers", layers, int)
        self.encoder, self.layers = freeze(encoder), tuple(layers)
        self.heads = nn.Sequential(*(TokenHead(encoder.token_width, width) for _ in self.layers))

    def forward(self, images: Tensor, context: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Judge each token of each layer; context and time are not looked at."""
        grid, found = self.encoder.grid, []
        for head, tokens in zip(self.heads, self.encoder.tokens_of(images, self.layers), strict=True):
            found.append(head(tokens.transpose(1, 2).unflatten(2, (grid.h, grid.w))))
        return torch.cat(found, dim=1)


class TokenHead(nn.Module):
    """Head of a ``FeatureDiscriminator``, ``[B, D, h, w]`` -> ``[B, 1, h, w]``."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(spectral_norm(nn.Conv2d(in_dim, width, 1)), group_norm(width), nn.LeakyReLU(0.2))
        mixing = spectral_norm(nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"))
        self.mix = nn.Sequential(mixing, group_norm(width), nn.LeakyReLU(0.2))
        self.out = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Judge."""
        x = self.project(x)
        return self.out((x + self.mix(x)) * math.sqrt(0.5))


def beside(images: Tensor, context: Tensor | None, context_dim: int) -> Tensor:
    """Images with the channels of their context behind them.

    Raises:
        UserError: the context has other channels.
    """
    found = 0 if context is None else context.shape[1]
    if found != context_dim:
        raise UserError("", f"a context of {found} channels for a discriminator", f"{context_dim} channels (context_dim)")
    return images if context is None else torch.cat([images, context.to(images.dtype)], dim=1)


def group_norm(width: int, affine: bool = True) -> nn.GroupNorm:
    """Group norm of up to 32 groups, of four channels or more."""
    return nn.GroupNorm(math.gcd(32, max(1, width // 4)), width, affine=affine)


def initialize(module: nn.Module) -> None:
    """Convolutions and norms as in pix2pix: normal of deviation 0.02 about 0 and 1."""
    for layer in _layers(module):
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif layer.weight is not None:
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


def _layers(module: nn.Module) -> Iterator[nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm]:
    return (layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)))
