"""Metrics of generated scenes: two processes with uneven rows must give what one process gives."""

import pytest
import torch
from shapes_batches import batch_of, images_of
from torchmetrics import Metric
from values_over_ranks import check_every_rank

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.batch import Batch, Grid, stacked
from umm_zoo.metrics import FrechetDistance, Reconstruction
from umm_zoo.outputs import Outputs
from umm_zoo.shapes import World, make_sample
from umm_zoo.shapes.editing_metrics import EditPixels, EditSuccess, InstructionSensitivity
from umm_zoo.shapes.geneval_metrics import SceneMatch, ShapesGenEval

pytestmark = pytest.mark.processes

#: The kinds of rows come one after the other, so that ranks see different ones; the last case leaves a rank without rows.
TASKS = ["edits"] * 7 + ["geneval"] * 6 + ["text_to_image"] * 4
SPLITS = {"uneven": [range(0, 5), range(5, 17)], "one rank without rows": [range(17), range(0)]}


class ThreeMeans(FeatureEncoder):
    """Means of the channels."""

    width, token_width, num_layers, grid, image_size = 3, 1, 1, Grid(1, 1), 32

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def tokens(self, images: torch.Tensor, layer: int = -1) -> torch.Tensor:
        return self(images)[:, None]


def all_metrics() -> dict[str, Metric]:
    return {
        "geneval": ShapesGenEval(),
        "scenes": SceneMatch(kinds=["text_to_image"]),
        "edits": EditSuccess(),
        "pixels": EditPixels(tasks=["edits"]),
        "sensitivity": InstructionSensitivity(tasks=["edits"]),
        "reconstruction": Reconstruction(),
        "frechet": FrechetDistance(ThreeMeans()),
    }


def step(rows: range) -> tuple[Outputs, Batch]:
    """The given rows; every third shows its target, the others as some other scene, all a little wrong."""
    batch = batch_of([make_sample(World(), 3, "test", TASKS[i], i) for i in rows])
    targets = stacked(batch.requested)
    others = images_of(make_sample(World(), 3, "test", "edits", 100 + i).target for i in rows)
    right = torch.tensor([i % 3 == 0 for i in rows])[:, None, None, None]
    made = torch.where(right, targets, others) * torch.tensor([1 - i / 100 for i in rows])[:, None, None, None]
    outputs = Outputs(generated=made, unchanged=others, unchanged_references=-targets, round_trips=targets * 0.9)
    return outputs, batch


def test_every_rank_has_the_value_of_one_process() -> None:
    expected = check_every_rank(all_metrics, step, SPLITS, len(TASKS))
    assert len(expected) > 25 and 0 < expected["geneval/overall"] < 1 and 0 < expected["edits/overall"] < 1
