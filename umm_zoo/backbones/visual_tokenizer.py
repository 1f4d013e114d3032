"""Visual tokenizers: an image encoder, bottlenecks on its layers, and a decoder of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.token_codec import TokenCodec
from umm_zoo.batch import Grid
from umm_zoo.blocks.bottlenecks import Bottleneck, Squeezed
from umm_zoo.blocks.pixel_decoders import PixelDecoder
from umm_zoo.blocks.quantizers import Quantizer

#: Name of the bottleneck that the decoder reads.
PIXEL = "pixel"


class Branch(nn.Module):
    """A bottleneck on one layer of an encoder.

    Args:
        bottleneck: what the tokens of the layer go through.
        layer: -1 is what the encoder gives out, -2 the input of its last block.
    """

    def __init__(self, bottleneck: Bottleneck, layer: int = -1) -> None:
        super().__init__()
        self.bottleneck, self.layer = bottleneck, layer

    def forward(self, tokens: Tensor) -> Squeezed:
        """Through the bottleneck."""
        squeezed: Squeezed = self.bottleneck(tokens)
        return squeezed


@dataclass
class Tokenized:
    """What the encoder and the bottlenecks of a tokenizer make of images.

    Shape:
        - vector: ``[B, F]``, the encoder's own of each image, never quantized
        - features: by branch, ``[B, N, D]``, the tokens that enter its bottleneck
        - squeezed: by branch, what comes out
        - grid: of the N tokens
    """

    vector: Tensor
    features: dict[str, Tensor]
    squeezed: dict[str, Squeezed]
    grid: Grid

    @property
    def codes(self) -> Tensor:
        """Codes of all branches beside each other, ``[B, N, D]``."""
        return torch.cat([squeezed.quantized.codes for squeezed in self.squeezed.values()], dim=-1)


class VisualTokenizer(TokenCodec, LatentCodec):
    """Codec of image tokens out of an encoder that also understands: QLIP's, DualToken's and VQRAE's common shape.

    As a ``TokenCodec`` it gives the codes of all branches beside each other, and decodes those of ``pixel``. As a ``LatentCodec``
    its latents are the values of those codes. Images may have any sides that are multiples of a patch, where the encoder's class
    takes them: its positions are interpolated, and so are the decoder's. It is best trained at the sizes that it is to see.

    Args:
        encoder: any; a text tower, where it has one, is left alone.
        branches: bottlenecks by name; the decoder reads ``pixel``.
        decoder: of pixels.

    Raises:
        ValueError: no branch ``pixel``; widths, numbers of codes or sides that do not fit.
    """

    has_shift = True

    def __init__(self, encoder: FeatureEncoder, branches: Mapping[str, Branch], decoder: PixelDecoder) -> None:
        if PIXEL not in branches:
            raise ValueError(f"VisualTokenizer.branches: found {sorted(branches)}, expected one called '{PIXEL}'")
        quantizer = branches[PIXEL].bottleneck.quantizer
        LatentCodec.__init__(self, quantizer.dim, encoder.image_size // encoder.grid.h, scaling=1.0, shift=0.0)
        sizes = {name: branch.bottleneck.quantizer.num_codes for name, branch in branches.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"VisualTokenizer.branches: found numbers of codes {sizes}, expected one number")
        for name, branch in branches.items():
            if branch.bottleneck.down.in_dim != encoder.token_width:
                found = f"branch '{name}' from width {branch.bottleneck.down.in_dim}"
                raise ValueError(f"VisualTokenizer: found {found}, expected the encoder's {encoder.token_width}")
        if (width := branches[PIXEL].bottleneck.up.out_dim) != decoder.in_dim:
            raise ValueError(f"VisualTokenizer.decoder: found tokens of width {decoder.in_dim}, expected the bottleneck's {width}")
        if decoder.upsampling * encoder.grid.h != encoder.image_size:
            found = f"{decoder.upsampling} pixels per token, of which the encoder makes {encoder.grid.h} a side"
            raise ValueError(f"VisualTokenizer.decoder: found {found}, expected {encoder.image_size} px in all")
        self.num_codes = quantizer.num_codes
        self.encoder, self.branches, self.decoder = encoder, nn.ModuleDict(branches), decoder

    def tokenize(self, images: Tensor) -> Tokenized:
        """Encode and quantize ``[B, 3, H, W]``, with gradients; the encoder runs once.

        Raises:
            UserError: a size that the encoder does not take.
        """
        grid, branches = self.token_grid(*images.shape[-2:]), self._branches()
        vector, layers = self.encoder.as_they_are(images, [branch.layer for branch in branches.values()])
        features = dict(zip(branches, layers, strict=True))
        return Tokenized(vector, features, {name: branch(features[name]) for name, branch in branches.items()}, grid)

    def pixels(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Images of what came out of the branch ``pixel``, ``[B, 3, H, W]``, not clamped."""
        decoded: Tensor = self.decoder(tokens, grid, self.encoder.grid)
        return decoded

    def remember(self, rows: bool) -> None:
        """Whether tables that follow averages take in what is tokenized next."""
        for module in self.branches.modules():
            if isinstance(module, Quantizer):
                module.idle = not rows

    def after_step(self, skipped: bool = False) -> None:
        """See ``Quantizer.after_step``, and ``forget_step`` where the step is skipped."""
        for branch in self._branches().values():
            quantizer = branch.bottleneck.quantizer
            quantizer.forget_step() if skipped else quantizer.after_step()

    def token_grid(self, height: int, width: int) -> Grid:
        """See ``TokenCodec.token_grid``: the encoder's."""
        return self.encoder.grid_of(height, width)

    def latent_grid(self, height: int, width: int, patch: int = 1) -> Grid:
        """See ``LatentCodec.latent_grid``: the encoder's."""
        super().latent_grid(height, width, patch)
        return self.token_grid(height, width)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """See ``TokenCodec.code_sizes``: those of all branches beside each other."""
        return sum((branch.bottleneck.quantizer.code_sizes for branch in self._branches().values()), ())

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """See ``TokenCodec.codes``."""
        return self.tokenize(images).codes

    @torch.no_grad()
    def images(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """See ``TokenCodec.images``; of the codes of all branches, or of ``pixel`` alone."""
        grid = self.grid_of(codes, grid)
        before, own = 0, self.branch(PIXEL).bottleneck.quantizer.codes_per_token
        for name, branch in self._branches().items():
            if name == PIXEL:
                break
            before += branch.bottleneck.quantizer.codes_per_token
        if codes.shape[-1] != own:
            codes = codes[..., before : before + own]
        return self.pixels(self.branch(PIXEL).bottleneck.tokens_of(codes), grid).clamp(-1, 1)

    def posterior(self, images: Tensor) -> tuple[Tensor, None]:
        """See ``LatentCodec.posterior``; no noise."""
        tokenized = self.tokenize(images)
        values = tokenized.squeezed[PIXEL].quantized.embeddings
        return values.transpose(1, 2).unflatten(2, tuple(tokenized.grid)), None

    def expand(self, latents: Tensor) -> Tensor:
        """See ``LatentCodec.expand``."""
        tokens = self.branch(PIXEL).bottleneck.up(latents.flatten(2).transpose(1, 2))
        return self.pixels(tokens, Grid(*latents.shape[-2:]))

    def example_inputs(self) -> tuple[Tensor]:
        """Images of the encoder's size."""
        side = self.encoder.image_size
        return (torch.rand(2, 3, side, side) * 2 - 1,)

    def branch(self, name: str) -> Branch:
        """A branch by its name."""
        return self._branches()[name]

    def _branches(self) -> dict[str, Branch]:
        return {name: branch for name, branch in self.branches.items() if isinstance(branch, Branch)}
