"""Use of a model of packed sequences: texts and images behind rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from umm_zoo.backbones.answers import Answer, Decoding
from umm_zoo.backbones.mixture_vlm import Context, check_length
from umm_zoo.batch import Batch, Task, Tokens
from umm_zoo.blocks.sequence_plan import Item
from umm_zoo.methods.context_steps import ContextSteps
from umm_zoo.methods.packed_pass import PackedPass
from umm_zoo.methods.packed_rows import PackedRows, RowPacker, asks_for_image
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import ContextGuidance, ContextName

#: Tasks of requests without words.
_WORDLESS = (Task.RECONSTRUCT, Task.UNCONDITIONAL)


class PackedSampling:
    """Texts and images that a model makes behind rows of a batch.

    Args:
        packed: passes of the model.
        packer: of rows.
        objective: samples latents.
    """

    def __init__(self, packed: PackedPass, packer: RowPacker, objective: FlowMatching) -> None:
        self.packed, self.packer, self.objective = packed, packer, objective

    @torch.no_grad()
    def write(self, batch: Batch, decoding: Decoding) -> list[Answer]:
        """Answers to a batch of prompts; a row's own last answer is not looked at."""
        rows = PackedRows()
        for row in range(len(batch)):
            rows.add(*self.packer.row(batch, row, asks_for_image(batch, row), answers=False))
        return self.packed.vlm.write(self.packed.context(rows), decoding)

    @torch.no_grad()
    def images(
        self,
        batch: Batch,
        seeds: Sequence[int],
        guidance: tuple[ContextGuidance, ContextGuidance],
        size: tuple[int, int],
        num_steps: int | None = None,
    ) -> Tensor:
        """Images ``[B, 3, H, W]``; rows with the same contexts go together.

        Args:
            batch: requests; the last answer of each (its reasoning) stands behind it.
            seeds: of the rows' noise.
            guidance: of requests without images, and of others.
            size: height and width in pixels.
            num_steps: of the sampler; None is the objective's.
        """
        codec, latents, device = self.packed.codec, self.packed.latents, self.packed.device
        grid = codec.latent_grid(*size, latents.patch)
        noise_item = Item("noise", num_tokens=latents.grid(grid).num_cells)
        for row in range(len(batch)):
            check_length(self.packed.vlm, [*self.packer.row(batch, row, True)[0], noise_item], row)
        images = torch.empty(len(batch), 3, *size, device=device)
        kinds = [(task not in _WORDLESS, bool(count)) for task, count in zip(batch.tasks, batch.image_counts, strict=True)]
        for kind in dict.fromkeys(kinds):
            rows = [row for row, own in enumerate(kinds) if own == kind]
            own = guidance[kind[1]]
            contexts = self.contexts(batch.select(rows), own.contexts(*kind))
            steps = ContextSteps(self.packed.vlm, latents, own, contexts, grid)
            shape = (len(rows), latents.latent_channels, *grid)
            generators = [torch.Generator(device).manual_seed(seeds[row]) for row in rows]
            noise = torch.stack([torch.randn(shape[1:], generator=one, device=device) for one in generators])
            made = self.objective.sample(steps, shape, Tokens(noise.new_zeros(1, 0, 1)), None, noise, num_steps)
            images[rows] = codec.decode(made).clamp(-1, 1).to(images.dtype)
        return images

    def contexts(self, batch: Batch, names: Sequence[ContextName]) -> dict[ContextName, Context]:
        """Rows as they are, their last answers too, and with something left out."""
        made = dict[ContextName, Context]()
        for name in names:
            rows = PackedRows()
            for row in range(len(batch)):
                rows.add(*self.packer.row(batch, row, True, name))
            made[name] = self.packed.context(rows)
        return made
