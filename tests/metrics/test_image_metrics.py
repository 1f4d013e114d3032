"""PSNR and retrieval against values worked out by hand."""

import math

import pytest
import torch
from values_over_ranks import scored

from umm_zoo.batch import Batch
from umm_zoo.metrics import PSNR, HighBandEnergy, Retrieval
from umm_zoo.outputs import Outputs


def batch(size: int, targets: torch.Tensor | None = None) -> Batch:
    return Batch(keys=[f"s/0:{i}" for i in range(size)], conversations=[[] for _ in range(size)], targets=targets)


def test_psnr_is_the_mean_over_images_of_a_peak_of_two() -> None:
    originals = torch.zeros(3, 3, 5, 7)
    images = originals + torch.tensor([0.1, 0.2, 0.4])[:, None, None, None]
    first = Outputs(generated=images[:1]), batch(1, targets=originals[:1])
    second = Outputs(generated=images[1:], references=originals[1:]), batch(2)
    expected = sum(10 * math.log10(4 / error**2) for error in (0.1, 0.2, 0.4)) / 3
    assert scored(PSNR(), first, second)[""] == pytest.approx(expected, rel=1e-6)


def test_psnr_clamps_images_and_stays_finite_on_perfect_ones() -> None:
    originals = torch.ones(1, 3, 4, 4)
    step = Outputs(generated=originals * 3, references=originals), batch(1)
    assert scored(PSNR(), step)[""] == pytest.approx(20 * math.log10(510))


def test_psnr_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="found no true images"):
        PSNR().update(Outputs(generated=torch.zeros(1, 3, 4, 4)), batch(1))


def test_psnr_leaves_out_batches_for_which_nothing_was_generated() -> None:
    originals = torch.zeros(2, 3, 4, 4)
    step = Outputs(generated=originals + 0.2, references=originals), batch(2)
    assert scored(PSNR(), step, (Outputs(), batch(2)))[""] == pytest.approx(20)  # 10 log10(4 / 0.04)


def test_retrieval_counts_first_places_in_both_directions() -> None:
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    texts = torch.tensor([[1.0, 0.1, 0.0], [0.9, 0.5, 0.0], [0.0, 0.0, 1.0]])  # text 1 is nearest to image 0
    first = Outputs(image_features=images[:2], text_features=texts[:2]), batch(2)
    second = Outputs(image_features=images[2:], text_features=texts[2:]), batch(1)
    assert scored(Retrieval(), first, second) == pytest.approx({"text_to_image": 2 / 3, "image_to_text": 1.0})


def test_a_collapsed_model_scores_chance() -> None:
    step = Outputs(image_features=torch.ones(8, 3), text_features=torch.ones(8, 3)), batch(8)
    assert scored(Retrieval(), step)["image_to_text"] == pytest.approx(1 / 8)


def test_energy_of_the_high_band_is_a_ratio_of_sums() -> None:
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2 * 2.0 - 1  # the finest there is
    originals = torch.stack([board, 0.5 * board])[:, None].expand(2, 3, 6, 6)
    images = torch.stack([0.5 * board, 0.5 * board + 0.2])[:, None].expand(2, 3, 6, 6)  # what is even has no high band
    first, second = ((Outputs(generated=images[i : i + 1]), batch(1, targets=originals[i : i + 1])) for i in range(2))
    assert scored(HighBandEnergy(), first, second)[""] == pytest.approx((0.25 + 0.25) / (1 + 0.25), rel=1e-6)
