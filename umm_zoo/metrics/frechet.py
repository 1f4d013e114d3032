"""Metric of generated images as a set: Fréchet distance from the true ones in the features of any encoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.frozen import freeze
from umm_zoo.batch import Batch, by_size
from umm_zoo.metrics.rows import checked_names, chosen_rows, generated_pairs
from umm_zoo.outputs import Outputs


class FrechetDistance(FrechetInceptionDistance):
    """FID (Heusel et al., 2017, arXiv 1706.08500) with one of our encoders as its network, as CLIP-FID and FD-DINOv2 do.

    Sums and products of features add up exactly over batches and ranks. With fewer images than features (in number) the
    covariances are singular and the value is only comparable at equal numbers. Batches without ``generated`` are left out.

    Args:
        encoder: takes images in [-1, 1]; it is frozen.
        kinds, tasks: see ``RowMetric``.

    Raises:
        UserError: there is nothing true to compare with.
    """

    reads = ("generated",)
    full_state_update = False

    def __init__(self, encoder: FeatureEncoder, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        encoder.num_features = encoder.width  # type: ignore[assignment]  # the library would try an image of 299 px otherwise
        super().__init__(feature=freeze(encoder))
        self.kinds, self.tasks = checked_names("kinds", kinds), checked_names("tasks", tasks)
        self.orig_dtype = torch.float64  # the library forgets it on a rank without images

    @torch.no_grad()
    def update(self, outputs: Outputs, batch: Batch) -> None:  # type: ignore[override]
        """Add ``generated`` and the true ones."""
        pairs, rows = generated_pairs(outputs, batch, self, same_size=False), chosen_rows(batch, self.kinds, self.tasks)
        if pairs is not None and rows:
            for images, real in ((pairs[1], True), (pairs[0], False)):
                for _, stack in by_size([images[row] for row in rows]):
                    super().update(stack.float().clamp(-1, 1), real=real)

    def compute(self) -> Tensor:
        """The distance; NaN with fewer than two images."""
        if int(self.fake_features_num_samples) < 2:
            return torch.tensor(torch.nan)
        return super().compute()
