"""Reconstruction targets: what a language model's states at the image tokens must give back of the input image."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.latent_codec import LatentCodec, draw
from umm_zoo.batch import Tokens
from umm_zoo.blocks.transformer import as_map, as_tokens
from umm_zoo.errors import Count
from umm_zoo.objectives.base import Predictor


def patchify(grid: Tensor, patch: int) -> Tensor:
    """``[B, C, h*p, w*p]`` -> ``[B, h*w, C*p*p]``; inside a token the channel index is ``p*p*c + p*row + column``."""
    return rearrange(grid, "B C (h p) (w q) -> B (h w) (C p q)", p=patch, q=patch)


class ReconstructionTarget(nn.Module, ABC):
    """One target vector per image token, computed from the image that the vision tower saw.

    A subclass implements ``compute``, and ``images`` where a prediction can be looked at. No gradient flows into a target.

    Shape:
        - images: ``[M, 3, H, W]`` in [-1, 1], at any size; clamped and resized to ``image_size``
        - output: ``[M, grid*grid, F]``

    Attributes:
        grid: image tokens per side.
        channels: values a head predicts per token.
        image_size: side of the square image that ``compute`` receives, in pixels.
        has_images: whether ``images`` is possible.
        worth_storing: whether computing targets costs enough that they had better come from the shards.
    """

    grid: int
    channels: int
    image_size: int
    has_images: bool = True
    worth_storing: bool = False

    @abstractmethod
    def compute(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """``[M, 3, image_size, image_size]`` -> ``[M, grid*grid, F]``."""

    def images(self, predicted: Tensor) -> Tensor:
        """Predictions on the grid, ``[M, F, grid, grid]`` -> images ``[M, 3, H, W]`` in [-1, 1].

        Raises:
            ValueError: this target cannot be turned back into an image.
        """
        raise ValueError(f"found a {type(self).__name__}, expected a target that can be turned back into pixels")

    def prepare(self, images: Tensor) -> Tensor:
        """Clamp to [-1, 1] and resize bilinearly, without antialiasing, as ROSS's release does before its codec."""
        size = (self.image_size, self.image_size)
        images = images.float().clamp(-1, 1)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Targets of the images; ``generator`` is for targets that are drawn."""
        with torch.autocast(images.device.type, enabled=False):
            return self.compute(self.prepare(images), generator)

    def round_trip(self, images: Tensor) -> Tensor:
        """The images as they would look if every prediction were exact.

        Raises:
            ValueError: this target cannot be turned back into an image.
        """
        return self.images(as_map(self(images)))

    def to_store(self, images: Tensor) -> Tensor:
        """Values that ``of_stored`` makes targets of, one entry per image, without a random draw."""
        return self(images)

    def of_stored(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Targets that were computed beforehand and travelled with the data; ``generator`` is for targets that are drawn.

        Raises:
            ValueError: they have another number of tokens than the grid.
        """
        if stored.ndim != 3 or stored.shape[1] != self.grid**2:
            raise ValueError(f"{type(self).__name__}: found stored targets {list(stored.shape)}, expected [M, {self.grid**2}, F]")
        return stored

    def predictor(self, head: Predictor) -> Predictor:
        """The network whose output is compared with the target: the head itself, unless the target decodes first."""
        return head


class PixelPatches(ReconstructionTarget):
    """The image's own pixels in [-1, 1], a patch per token (ROSS^R-Pixel, section 3.2).

    The paper does not say the patch size or the normalisation; 16 x 16 of the image resized to 16 pixels per token is our choice,
    because that is the image the release gives its codec.

    Shape:
        ``[M, 3, H, W]`` -> ``[M, grid*grid, 3*patch*patch]``.
    """

    def __init__(self, grid: Count, patch: Count = 16) -> None:
        super().__init__()
        self.grid, self.patch = grid, patch
        self.channels, self.image_size = 3 * patch**2, grid * patch

    def compute(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Cut into patches."""
        return patchify(images, self.patch)

    def images(self, predicted: Tensor) -> Tensor:
        """Put the patches together."""
        return F.pixel_shuffle(predicted, self.patch).clamp(-1, 1)


class CodecLatents(ReconstructionTarget):
    """Latents of a frozen image codec, every ``pack`` x ``pack`` window packed into one token (ROSS^D and ROSS^R-Latent).

    The image is resized so that the packed latent has the tower's grid (384 or 432 pixels with FLUX's codec at a grid of 24 or
    27). Inside a token the channel index is ``4 c + 2 row + column``, FLUX's own order.

    Shape:
        ``[M, 3, H, W]`` -> ``[M, grid*grid, C*pack*pack]``.

    Args:
        codec: frozen.
        grid: image tokens per side.
        pack: latent cells per token along one side.
        sampled: draw from the posterior again each time, as ROSS^D's release does; False takes its mean, our choice for regression.
    """

    worth_storing = True

    def __init__(self, codec: LatentCodec, grid: Count, pack: Count = 2, sampled: bool = True) -> None:
        super().__init__()
        self.codec, self.grid, self.pack, self.sampled = codec, grid, pack, sampled
        self.channels = codec.latent_channels * pack**2
        self.image_size = grid * pack * codec.downsampling

    def compute(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Encode and pack."""
        return patchify(self.codec.encode(images, sample=self.sampled, generator=generator), self.pack)

    @torch.no_grad()
    def to_store(self, images: Tensor) -> Tensor:
        """Mean and log variance ``[M, 2C, h, w]`` of the codec's own latent where the target is drawn, else the latent itself."""
        with torch.autocast(images.device.type, enabled=False):
            mean, log_variance = self.codec.posterior(self.prepare(images))
        if log_variance is None or not self.sampled:
            return self.codec.normalise(mean).float()
        return torch.cat([mean, log_variance], dim=1).float()

    def of_stored(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The output of ``to_store``, latents as the codec encodes them, ``[M, C, h, w]``, or already packed."""
        if stored.ndim == 4 and stored.shape[1] == 2 * self.codec.latent_channels:
            own = next(self.codec.parameters(), stored).dtype  # the draw is made in it, as ``encode`` does
            mean, log_variance = stored.to(own).chunk(2, dim=1)
            stored = self.codec.normalise(draw(mean, log_variance, generator)).float()
        return super().of_stored(patchify(stored, self.pack) if stored.ndim == 4 else stored)

    def round_trip(self, images: Tensor) -> Tensor:
        """Through the codec and back, with the mean of the posterior."""
        return through_codec(self.codec, self.prepare(images))

    @torch.no_grad()
    def images(self, predicted: Tensor) -> Tensor:
        """Unpack and decode."""
        return self.codec.decode(F.pixel_shuffle(predicted, self.pack)).clamp(-1, 1)


class PixelsThroughCodec(PixelPatches):
    """Pixels again, but the head predicts latents and the codec's frozen decoder turns them into pixels (ROSS^R-Latent2Pixel).

    The gradient passes through the decoder to the head. That the decoder is frozen is our choice; the paper's text does not say.

    Shape:
        ``[M, 3, H, W]`` -> ``[M, grid*grid, 3*p*p]``, p pixels per token; the head predicts ``[M, C*pack*pack, grid, grid]``.
    """

    def __init__(self, codec: LatentCodec, grid: Count, pack: Count = 2) -> None:
        super().__init__(grid, pack * codec.downsampling)
        self.codec, self.pack = codec, pack
        self.channels = codec.latent_channels * pack**2

    def predictor(self, head: Predictor) -> Predictor:
        """The head, then unpacking, the decoder and the same cut into patches."""

        def predict(condition: Tokens) -> Tensor:
            decoded = self.codec.decode(F.pixel_shuffle(head(condition), self.pack))  # [M, 3, H, W]
            return F.pixel_unshuffle(decoded, self.patch)

        return predict

    def round_trip(self, images: Tensor) -> Tensor:
        """Through the codec and back: a head that predicts latents can come no closer."""
        return through_codec(self.codec, self.prepare(images))


class OtherImages(ReconstructionTarget):
    """Targets of another image of the batch than the states come from: a control, not the paper's.

    Nothing about the image seen can be learned from them, while the objective, its cost and the statistics of the targets stay.
    The images of a batch are moved round by one; a batch of one image has no other.
    """

    def __init__(self, target: ReconstructionTarget) -> None:
        super().__init__()
        self.target, self.has_images = target, target.has_images
        self.grid, self.channels, self.image_size = target.grid, target.channels, target.image_size

    def compute(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Targets of the image before."""
        return self.target.compute(images, generator).roll(1, 0)

    def of_stored(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Stored targets of the image before."""
        return self.target.of_stored(stored, generator).roll(1, 0)

    def predictor(self, head: Predictor) -> Predictor:
        """The target's own."""
        return self.target.predictor(head)

    def images(self, predicted: Tensor) -> Tensor:
        """The target's own."""
        return self.target.images(predicted)

    def round_trip(self, images: Tensor) -> Tensor:
        """The image's own round trip: what is shown is the image seen."""
        return self.target.round_trip(images)


@torch.no_grad()
def through_codec(codec: LatentCodec, images: Tensor) -> Tensor:
    """Images encoded without noise and decoded, ``[M, 3, H, W]`` in [-1, 1]."""
    with torch.autocast(images.device.type, enabled=False):
        return codec.decode(codec.encode(images)).clamp(-1, 1)


class TeacherFeatures(ReconstructionTarget):
    """Patch features of a frozen vision transformer, layer-normalised and resized to the grid (ROSS^R-Latent with a teacher).

    The paper's teachers are DINOv2, DEiT-III and EVA02-CLIP. How their grid is brought to the tower's is not stated: bilinear
    resizing of the feature map and LayerNorm without affine are our choices.

    Shape:
        ``[M, 3, H, W]`` -> ``[M, grid*grid, F]``.

    Args:
        teacher: frozen. It receives images of exactly its own size, so that nothing is cropped away and cells stay in place.
        grid: image tokens per side.
    """

    has_images = False
    worth_storing = True

    def __init__(self, teacher: FeatureEncoder, grid: Count) -> None:
        super().__init__()
        self.teacher, self.grid, self.image_size = teacher, grid, teacher.image_size
        self.channels = teacher.token_width

    def compute(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Encode, resize, normalise."""
        features = as_map(self.teacher.tokens(images).float())  # [M, F, k, k]
        if features.shape[-1] != self.grid:
            features = F.interpolate(features, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        return F.layer_norm(as_tokens(features), (self.channels,), eps=1e-6)
