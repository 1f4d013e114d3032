"""Masking ratios, rounds and orders against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.blocks.masking import (
    ConfidenceOrder,
    CosineRatio,
    CosineUnmasking,
    MaskRatio,
    RandomOrder,
    TruncatedNormalRatio,
    UniformRatio,
    kept_places,
)
from umm_zoo.errors import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_truncated_normal_has_the_moments_of_its_density() -> None:
    ratios = TruncatedNormalRatio().ratios(200_000, seeded())
    assert float(ratios.mean()) == pytest.approx(0.8670, abs=5e-4)
    assert float(ratios.std()) == pytest.approx(0.0835, abs=5e-4)
    assert float(ratios.median()) == pytest.approx(0.8743, abs=1e-3)
    assert 0.7 <= ratios.min() < 0.701 and 0.999 < ratios.max() <= 1


def test_a_shared_ratio_is_one_draw_and_others_are_one_for_each_row() -> None:
    assert TruncatedNormalRatio(shared=True).ratios(50, seeded()).unique().numel() == 1
    assert TruncatedNormalRatio().ratios(50, seeded()).unique().numel() == 50
    assert_close(TruncatedNormalRatio(low=1.0).ratios(3, seeded()), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("ratio, mean", [(CosineRatio(), 2 / math.pi), (UniformRatio(), 0.5)])
def test_means_of_the_other_ratios(ratio: MaskRatio, mean: float) -> None:
    found = ratio.ratios(100_000, seeded())
    assert float(found.mean()) == pytest.approx(mean, abs=4e-3) and found.min() > 0 and found.max() <= 1


def test_numbers_of_hidden_tokens_are_rounded_as_each_release_does() -> None:
    ratios = torch.tensor([0.7, 0.71, 1.0, 0.001], dtype=torch.float64)
    assert TruncatedNormalRatio().count(ratios, 10).tolist() == [7, 8, 10, 1]
    assert CosineRatio().count(ratios, 10).tolist() == [7, 7, 10, 1]


def test_masks_hide_as_many_as_drawn_and_every_place_alike() -> None:
    masks = CosineRatio().masks(6_000, 5, seeded(1))
    assert_close(masks.sum(1), CosineRatio().count(CosineRatio().ratios(6_000, seeded(1)), 5))
    assert float((masks.float().mean(0) - masks.float().mean()).abs().max()) < 0.02


@pytest.mark.parametrize(
    "tokens, rounds, expected",
    [(16, 4, [2, 3, 5, 6]), (16, 8, [1, 1, 1, 2, 3, 2, 3, 3]), (16, 1, [16]), (3, 3, [1, 1, 1])],
)
def test_tokens_of_each_round(tokens: int, rounds: int, expected: list[int]) -> None:
    assert CosineUnmasking().counts(tokens, rounds) == expected


def test_rounds_of_the_paper() -> None:
    counts = CosineUnmasking().counts(256)
    assert counts[:3] == [1, 1, 1] and counts[-6:] == [6, 6, 7, 6, 6, 6] and sum(counts) == 256 and len(counts) == 64


def test_guidance_grows_with_what_is_known_or_stays() -> None:
    own, counts = CosineUnmasking(4, guidance="linear"), CosineUnmasking(4).counts(16)
    assert own.scales(3.0, counts) == [1.25, 1.625, 2.25, 2.875]
    assert own.scales(1.0, counts) == [1.0] * 4 and CosineUnmasking(4).scales(3.0, counts) == [3.0] * 4


def test_more_rounds_than_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="8 rounds for 4 tokens"):
        CosineUnmasking(8).counts(4)


def test_the_temperature_of_confidence_falls_linearly_or_as_a_product() -> None:
    linear, product = ConfidenceOrder(), ConfidenceOrder(schedule="product")
    assert [linear.temperature_at(step, 8) for step in (1, 2, 3, 4, 8)] == [0.875, 0.75, 0.625, 0.5, 0.0]
    found = [product.temperature_at(step, 8) for step in range(1, 6)]
    assert found == pytest.approx([0.875, 0.65625, 0.41016, 0.20508, 0.0769], abs=1e-5)


def test_without_temperature_the_likeliest_hidden_tokens_are_kept() -> None:
    log_probs = torch.tensor([[-1.0, -3.0, -0.1, -2.0], [-4.0, -1.0, -2.0, -3.0]])
    hidden = torch.tensor([[True, True, False, True], [True, True, True, True]])
    scores = ConfidenceOrder(0.0).scores(1, 4, torch.rand(2, 4), log_probs)
    assert kept_places(scores, hidden, 2).tolist() == [[True, False, False, True], [False, True, True, False]]


def test_the_last_round_has_no_noise_and_an_early_one_has_gumbels() -> None:
    uniform, log_probs = torch.tensor([[math.exp(-math.exp(-2.0)), math.exp(-1.0)]]), torch.tensor([[-1.0, -2.0]])
    assert_close(ConfidenceOrder().scores(4, 4, uniform, log_probs), log_probs)
    assert_close(ConfidenceOrder(2.0).scores(2, 4, uniform, log_probs), torch.tensor([[1.0, -2.0]]))


def test_a_random_order_keeps_every_hidden_token_alike() -> None:
    hidden = torch.tensor([[True, False, True, True]]).expand(9_000, -1)
    uniform = torch.rand(9_000, 4, generator=seeded(2))
    shares = kept_places(RandomOrder().scores(1, 2, uniform), hidden, 1).float().mean(0)
    assert_close(shares, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]), atol=0.02, rtol=0)


def test_continuous_tokens_have_no_confidence() -> None:
    with pytest.raises(ValueError, match="RandomOrder"):
        ConfidenceOrder().scores(1, 2, torch.rand(1, 3))
