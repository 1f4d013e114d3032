"""Metrics and rewards on images of unequal sizes: what comes out is what one image at a time gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.features import DINOv2Features
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics import PSNR, FrechetDistance, Reconstruction
from umm_zoo.metrics.unified_score import UnifiedScore
from umm_zoo.outputs import Outputs
from umm_zoo.rewards import ReconstructionReward
from umm_zoo.shapes.editing_metrics import InstructionSensitivity

SIZES = [(8, 12), (12, 8), (8, 12), (9, 9), (12, 8)]
CONFIG = {"hidden_size": 12, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}


def images(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in SIZES]


def rows() -> Batch:
    return Batch([f"row{row}" for row in range(len(SIZES))], [[] for _ in SIZES], targets=list(images(9)))


def outputs() -> Outputs:
    return Outputs(generated=images(0), round_trips=images(1), unchanged=images(2), unchanged_references=images(3))


def encoder() -> FeatureEncoder:
    torch.manual_seed(0)
    found = DINOv2Features.from_config(CONFIG).eval()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found


METRICS: dict[str, Callable[[], Any]] = {
    "psnr": PSNR,
    "reconstruction": Reconstruction,
    "frechet": lambda: FrechetDistance(encoder()),
    "unified": lambda: UnifiedScore({"a": encoder()}),
    "sensitivity": InstructionSensitivity,
}


def value_of(metric: Any) -> dict[str, Tensor]:
    found = metric.compute()
    return found if isinstance(found, dict) else {"": found}


@pytest.mark.parametrize("name", METRICS)
def test_a_batch_of_unequal_sizes_scores_as_its_rows_do_alone(name: str) -> None:
    together, alone, made = METRICS[name](), METRICS[name](), outputs()
    together.update(made, rows())
    for row in range(len(SIZES)):
        own = Outputs(**{field: [getattr(made, field)[row]] for field in ("generated", "round_trips")})
        own.unchanged, own.unchanged_references = [made.unchanged[row]], [made.unchanged_references[row]]
        alone.update(own, rows().select([row]))
    assert_close(value_of(together), value_of(alone), atol=1e-6, rtol=1e-6)


def test_psnr_of_each_image_is_over_its_own_pixels() -> None:
    metric, made = PSNR(), outputs()
    metric.update(made, rows())
    errors = [(one.double() - two.double()).square().mean() for one, two in zip(made.generated, rows().targets, strict=True)]
    assert_close(metric.compute(), torch.stack([10 * torch.log10(4 / error) for error in errors]).mean())


@pytest.mark.parametrize("metric", [PSNR(), Reconstruction()])
def test_an_image_of_another_size_than_its_reference_is_named_in_one_line(metric: Any) -> None:
    made = outputs()
    made.generated[3] = torch.zeros(3, 9, 12)
    with pytest.raises(UserError, match="row3: generated 9 x 12 px, true 9 x 9 px, expected images of one size in each row"):
        metric.update(made, rows())


def test_encoders_bring_a_pair_of_two_sizes_to_their_own() -> None:
    batch = Batch(["row"], [[]], targets=[images(0)[0]])
    small = nn.functional.interpolate(images(0)[0][None], size=(16, 24), mode="nearest")
    metric = UnifiedScore({"a": encoder()})
    metric.update(Outputs(generated=small), batch)
    assert metric.compute()["a"] > 90


def test_a_reward_of_candidates_of_unequal_sizes_is_that_of_each_alone() -> None:
    reward, batch = ReconstructionReward(encoder()), rows()
    candidates = [image for pair in zip(images(4), images(5), strict=True) for image in pair]
    together = reward(candidates, batch)
    alone = [reward([candidate], batch.select([place // 2])) for place, candidate in enumerate(candidates)]
    assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-6)
