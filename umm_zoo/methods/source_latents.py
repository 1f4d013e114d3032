"""Latents of input images that need not be encoded: stored beside the data, or those of the image to generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from umm_zoo.backbones.latent_codec import SOURCE_LATENTS, LatentCodec
from umm_zoo.backbones.precision import antialiased
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.batch import Batch, Images, map_by_size, stacked
from umm_zoo.blocks.details import DetailBranch
from umm_zoo.objectives.step import blocks_are_sharded

#: Sides of images whose grids stand for the way in which a model sizes all images.
_SIDES = (64, 224, 512, 1024, 2048, 4096)


def storable(vlm: PrefixBackbone, codec: LatentCodec, detail: DetailBranch | None) -> dict[str, Precomputable]:
    """Latents that may be stored: of images to generate, and for a ``detail`` branch of input images, of one size in each row."""
    found = {"latents": Precomputable(codec, lambda batch: stacked(codec.target_latents(batch)), "row")}
    if detail is not None:

        def compute(batch: Batch) -> Tensor:
            latents = aligned_latents(vlm, codec, batch.images)
            return stacked(latents, f"--only {SOURCE_LATENTS}") if latents else torch.zeros(0, codec.latent_channels, 1, 1)

        grids = {"grids": [list(vlm.image_grid(side, side)) for side in _SIDES]}
        found[SOURCE_LATENTS] = Precomputable(codec, compute, "image", grids)
    return found


def known_latents(vlm: PrefixBackbone, batch: Batch, targets: Images | None) -> dict[int, Tensor]:
    """Latents by the ``id`` of the input image.

    Args:
        vlm: whose grids latents lie on.
        batch: may hold them; an image to generate that is its row's input image again is one and the same tensor.
        targets: latents of the images to generate, if they are there already.
    """
    stored = batch.extras.get(SOURCE_LATENTS, ())
    known = {id(image): own.to(image.dtype) for image, own in zip(batch.images, stored, strict=True)} if len(stored) else {}
    shown = {id(image) for image in batch.images}
    for image, own in zip(batch.requested, () if targets is None else targets, strict=targets is not None):
        if id(image) in shown and own.shape[-2:] == vlm.image_grid(*image.shape[-2:]):
            known.setdefault(id(image), own)
    return known


def latents_of_sources(
    vlm: PrefixBackbone, codec: LatentCodec, images: Sequence[Tensor], known: Mapping[int, Tensor]
) -> list[Tensor]:
    """Latents of all input images, of which some are ``known``.

    While ranks share out the weights each calls the codec as often as the others, on a blank image where it knows all.
    """
    missing = [image for image in images if id(image) not in known]
    if not missing and blocks_are_sharded():
        blank = torch.zeros(3, 64, 64, device=images[0].device)
        aligned_latents(vlm, codec, [blank])
    made = iter(aligned_latents(vlm, codec, missing) if missing else ())
    return [known[id(image)] if id(image) in known else next(made) for image in images]


@torch.no_grad()
def aligned_latents(vlm: PrefixBackbone, codec: LatentCodec, images: Images) -> list[Tensor]:
    """Latents ``[C, h, w]`` of each image, resized so that its grid is the vision tower's.

    At Qwen2.5-VL's 28 px per token and a codec of factor 32 an image of 28 h x 28 w is encoded at 32 h x 32 w.
    """

    def aligned(stack: Tensor) -> Tensor:
        grid = vlm.image_grid(*stack.shape[-2:])
        size = (grid.h * codec.downsampling, grid.w * codec.downsampling)
        if size != tuple(stack.shape[-2:]):
            stack = antialiased(stack, size, "bicubic").clamp(-1, 1).to(stack.dtype)
        return codec.encode(stack)

    return map_by_size(aligned, images)
