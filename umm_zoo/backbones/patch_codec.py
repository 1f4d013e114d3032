"""Transformers as the encoder and the denoiser of a ``DiffusionCodec``: cheaper on small images than convolutions of all pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.diffusion_codec import LatentEncoder, PixelDenoiser, cells_beside
from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.positions import SineCosine2d
from umm_zoo.blocks.transformer import PlainBlock, as_tokens, time_embedding
from umm_zoo.errors import Count


class PatchEncoder(LatentEncoder):
    """A transformer over patches, and a few numbers of each (our choice).

    Args:
        latent_channels: C.
        patch: f.
        width, depth, heads: of the transformer.
    """

    def __init__(self, latent_channels: Count, patch: Count, width: Count, depth: Count, heads: Count) -> None:
        super().__init__()
        self.latent_channels, self.downsampling = latent_channels, patch
        self.enter, self.positions = nn.Linear(3 * patch**2, width), SineCosine2d(width)
        self.blocks = nn.Sequential(*(PlainBlock(width, heads, ratio=4) for _ in range(depth)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_channels))

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        patches = F.pixel_unshuffle(images, self.downsampling)
        grid = Grid(*patches.shape[-2:])
        tokens = self.out(self.blocks(self.positions(self.enter(as_tokens(patches)), grid)))
        return tokens.transpose(1, 2).unflatten(2, tuple(grid))


class PatchPixelDenoiser(PixelDenoiser):
    """A transformer over noisy patches, the latent's cell beside each, the time added to all (our choice).

    A skip adds the noisy pixels to the output by a number that depends on the time, as a U-Net's own skips may: what is left to
    the transformer is the image.

    Args:
        condition_dim: channels of the latent.
        patch: pixels of a token along one side; the latent's cells are no smaller.
        width, depth, heads: of the transformer.
    """

    def __init__(self, condition_dim: Count, patch: Count, width: Count, depth: Count, heads: Count) -> None:
        super().__init__()
        self.condition_dim, self.patch, self.unit, self.width = condition_dim, patch, patch, width
        self.enter, self.positions = nn.Linear(3 * patch**2 + condition_dim, width), SineCosine2d(width)
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.skip = nn.Linear(width, 1)
        self.blocks = nn.Sequential(*(PlainBlock(width, heads, ratio=4) for _ in range(depth)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * patch**2))

    def forward(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """Predict."""
        patches = F.pixel_unshuffle(noisy, self.patch)
        grid = Grid(*patches.shape[-2:])
        height, width = noisy.shape[-2:]
        beside = cells_beside(condition, height, width, self.patch).to(noisy.dtype)
        moment = self.time_in(time_embedding(1000 * time, self.width).to(noisy.dtype))[:, None]  # [B, 1, width]
        tokens = self.positions(self.enter(as_tokens(torch.cat([patches, beside], dim=1))), grid) + moment
        pixels = self.out(self.blocks(tokens)).transpose(1, 2).unflatten(2, tuple(grid))
        skipped: Tensor = F.pixel_shuffle(pixels, self.patch) + self.skip(moment)[..., None] * noisy
        return skipped
