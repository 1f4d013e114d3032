"""Patches that the images of a world without stripes, jitter and fine detail are made of, as codecs of image tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.patch_codebook import PatchCodebook
from umm_zoo.errors import Count, UserError
from umm_zoo.shapes.rendering import cell_boxes, render
from umm_zoo.shapes.scenes import BACKGROUNDS, Object, Scene, World


class ShapesCodebook(PatchCodebook):
    """Codec whose codes are all patches of a world: it loses nothing of any scene, and is a function of its arguments alone.

    A board of 2 x 2 cells of 32 px has 260 patches of 8 px in four colours and two shapes, and 16 tokens an image.

    Args:
        world: with ``striped=False, max_jitter=0, detail="none"``.
        patch: side in pixels.

    Raises:
        UserError: the world's images are no such mosaic, or patches lie across the cells of its board.
    """

    def __init__(self, world: World, patch: Count = 8) -> None:
        super().__init__(patches_of(world, patch))


def patches_of(world: World, patch: int = 8) -> Tensor:
    """Distinct patches ``[K, 3, patch, patch]`` in [-1, 1] of all scenes of a world, in the order in which they first appear."""
    chance = {"striped": world.striped, "max_jitter": world.max_jitter, "detail": world.has_detail and world.detail}
    for name, value in chance.items():
        if value:
            expected = {"striped": False, "max_jitter": 0, "detail": "none"}[name]
            raise UserError(f"World.{name}", str(value), f"{expected}, or no few patches make up its images")
    edges = {edge for rows, _ in cell_boxes(world.cells, world.image_size).values() for edge in (rows.start, rows.stop)}
    if any(edge % patch for edge in edges):
        raise UserError("patch", f"{patch}", f"a divisor of the edges of the cells, {', '.join(map(str, sorted(edges)))} px")
    found: dict[bytes, np.ndarray] = {}
    for scene in _scenes_of_one(world):
        side = world.image_size // patch
        mosaic = render(world, scene).reshape(side, patch, side, patch, 3).transpose(0, 2, 4, 1, 3)
        for own in mosaic.reshape(-1, 3, patch, patch):
            found.setdefault(own.tobytes(), own)
    levels = torch.from_numpy(np.stack(list(found.values())))
    return (levels - 127.5) / 127.5  # as a loader makes floats of bytes


def _scenes_of_one(world: World) -> Iterator[Scene]:
    """Every background alone, then with every object in every cell: objects stay inside their cells, so no scene shows more."""
    for background in BACKGROUNDS:
        yield Scene(background, "", ())
        for shape, colour, size, cell in itertools.product(world.shapes, world.colours, world.sizes, world.places):
            yield Scene(background, "", (Object(shape, colour, size, cell),))


class PrincipalPatches(LatentCodec):
    """Codec whose latents are the first principal components of a world's patches, one cell a patch; no network, no training.

    A latent becomes the patch whose components are nearest, so that nothing of any scene is lost as long as no two patches share
    them. All components are scaled alike, to a mean variance of 1 over the distinct patches. Of a board of 2 x 2 cells 16
    components of patches of 8 px keep 97 % of the variance.

    Args:
        world: as in ``ShapesCodebook``.
        components: C.
        patch: side in pixels.

    Raises:
        UserError: the world's images are no mosaic of a few patches, or have fewer components.
    """

    exact = (*LatentCodec.exact, "mean", "axes", "patches")
    mean: Tensor
    axes: Tensor
    patches: Tensor

    def __init__(self, world: World, components: Count = 16, patch: Count = 8) -> None:
        patches = patches_of(world, patch).flatten(1).double().numpy()  # not torch: on the meta device there are no numbers
        if components > min(patches.shape):
            raise UserError("components", f"{components}", f"at most {min(patches.shape)}")
        mean = patches.mean(axis=0)
        # unequal weights part components that a symmetric world leaves equal, whose axes would be the machine's choice
        weights = np.linspace(1, 2, len(patches))[:, None]
        axes = np.linalg.svd(weights * (patches - mean), full_matrices=False)[2][:components]
        axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1))
        super().__init__(components, patch, 1 / float(np.sqrt(np.square((patches - mean) @ axes.T).mean())), 0.0)
        for name, value in (("mean", mean), ("axes", axes), ("patches", patches)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The components; there is no variance."""
        cells = rearrange(images.to(self.mean), "M c (h p) (w q) -> M h w (c p q)", p=self.downsampling, q=self.downsampling)
        return ((cells - self.mean) @ self.axes.T).permute(0, 3, 1, 2), None

    def expand(self, latents: Tensor) -> Tensor:
        """The nearest patches."""
        cells, height = latents.permute(0, 2, 3, 1).to(self.mean), latents.shape[2]
        known = (self.patches - self.mean) @ self.axes.T  # [K, C]
        places = torch.cdist(cells.flatten(0, 2), known).argmin(dim=1)
        shape = {"h": height, "M": len(latents), "c": 3, "p": self.downsampling}
        return rearrange(self.patches[places], "(M h w) (c p q) -> M c (h p) (w q)", **shape)
