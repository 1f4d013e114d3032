"""Changes to input images: random ones in training that leave answers true, and others' images in validation, as a control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from torch import Tensor

from umm_zoo.backbones.latent_codec import SOURCE_LATENTS
from umm_zoo.batch import Batch, Images
from umm_zoo.errors import Natural, UserError


class ShiftAndFlip(Callback):
    """Callback that shifts every training image by a few pixels and mirrors half of them; validation is left alone.

    For photos of things; not for worlds whose answers say left and right. The draw is a pure function of the seed, the rank and the
    batch, so a resumed run sees the same images; so does a method that looks at all micro-batches of a step before the first one.

    Args:
        max_shift: largest shift in pixels along each axis; what moves in repeats the border.
        flip: mirror half of the images.
        seed: of the draws.
    """

    #: Outputs stored for the unchanged images must not be trained on.
    changes_images = True

    def __init__(self, max_shift: Natural, flip: bool = True, seed: Natural = 0) -> None:
        self.max_shift, self.flip, self.seed = max_shift, flip, seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Replace the input images of the batch, and of those ahead of it."""
        if isinstance(batch, Batch):
            batch.images = self._changed(batch, trainer.global_rank, batch_idx)
            if batch.ahead is not None:  # copies: each is changed once more, in the same way, when its own turn comes
                ahead = enumerate(map(pl_module.moved, batch.ahead), start=batch_idx + 1)
                batch.ahead = [replace(other, images=self._changed(other, trainer.global_rank, place)) for place, other in ahead]

    def _changed(self, batch: Batch, rank: int, number: int) -> list[Tensor]:
        place = (self.seed * 1_000_003 + rank) * 1_000_003 + number
        generator = torch.Generator().manual_seed(place)
        return shift_and_flip(batch.images, self.max_shift, self.flip, generator)


class OtherImages(Callback):
    """Callback of a control: in validation each row is shown the images of the next row of its batch.

    What a method scores like that, it owes to its texts; how much more it scores otherwise, to its images. Rows must have as many
    images as their neighbours, so a source of rows without images is left alone.

    Raises:
        UserError: rows of a batch differ in how many images they have.
    """

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Move the input images of the batch on by a row."""
        if isinstance(batch, Batch) and len(batch.images):
            if len(counts := set(batch.image_counts)) > 1:
                found = f"rows of {' and '.join(map(str, sorted(counts)))} images in one batch"
                raise UserError("callbacks.OtherImages", found, "as many images in each row")
            own = list(batch.images)
            count = batch.image_counts[0]
            batch.images = own[count:] + own[:count]
            batch.extras = {name: values for name, values in batch.extras.items() if name != SOURCE_LATENTS}


def shift_and_flip(images: Images, max_shift: int, flip: bool, generator: torch.Generator) -> list[Tensor]:
    """M images ``[3, H, W]`` of any sizes, each shifted and perhaps mirrored by its own draw, which its size has no part in."""
    shifts = torch.randint(0, 2 * max_shift + 1, (len(images), 2), generator=generator).tolist()
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    changed = []
    for image, (down, right), mirror in zip(images, shifts, mirrored, strict=True):
        height, width = image.shape[-2:]
        padded = F.pad(image[None], (max_shift,) * 4, mode="replicate")[0]
        cut = padded[:, down : down + height, right : right + width]
        changed.append(cut.flip(-1) if mirror and flip else cut.contiguous())
    return changed
