"""Samples of the shapes world as a loader would give them, and images of scenes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.shapes import Sample, Scene, World, render


def images_of(scenes: Iterable[Scene | None], world: World | None = None) -> Tensor | None:
    """Renders ``[N, 3, H, W]`` in [-1, 1]; None where there is no scene."""
    rendered = [render(world or World(), scene) for scene in scenes if scene is not None]
    return torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2).float() / 127.5 - 1 if rendered else None


def batch_of(samples: Sequence[Sample], world: World | None = None) -> Batch:
    """Samples with their images, targets and ground truth."""
    keys, rows = [sample.key for sample in samples], [sample.row for sample in samples]
    images = images_of((scene for sample in samples for scene in sample.scenes), world)
    targets = images_of((sample.target for sample in samples), world)
    counts = [len(sample.scenes) for sample in samples]
    return Batch(keys, [row["conversations"] for row in rows], images, counts, targets, rows)
