"""Guidance over three contexts, and the times of Bagel's sampler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor

from umm_zoo.objectives.guidance import ContextGuidance
from umm_zoo.objectives.schedules import EvenlySpaced
from umm_zoo.objectives.times import shifted


def velocity(*channels: float) -> Tensor:
    return tensor(channels).float()[None, :, None, None]


WHOLE, NO_TEXT, NO_IMAGE = velocity(1, 2, 2), velocity(1, 0, 0), velocity(0, 2, 1)


def test_two_weights_over_three_contexts_are_six_minus_four_and_a_half_and_minus_a_half() -> None:
    guided = ContextGuidance(4.0, 1.5, renorm=None)(WHOLE, NO_TEXT, NO_IMAGE)
    torch.testing.assert_close(guided, velocity(1.5, 11, 11.5))
    torch.testing.assert_close(guided, 6 * WHOLE - 4.5 * NO_TEXT - 0.5 * NO_IMAGE)


@pytest.mark.parametrize("renorm", ["global", "channel"])
def test_it_is_brought_back_to_the_length_of_the_unguided_one(renorm: str) -> None:
    guided = ContextGuidance(4.0, 1.5, renorm=renorm)(WHOLE, NO_TEXT, NO_IMAGE)  # type: ignore[arg-type]
    torch.testing.assert_close(guided, 0.187683 * velocity(1.5, 11, 11.5), atol=1e-5, rtol=0)


def test_the_text_alone_may_be_brought_back_before_the_images_come() -> None:
    text = velocity(1, 8, 8) * 3 / 129**0.5
    guided = ContextGuidance(4.0, 1.5, renorm="text_channel")(WHOLE, NO_TEXT, NO_IMAGE)
    torch.testing.assert_close(guided, NO_IMAGE + 1.5 * (text - NO_IMAGE))


def test_each_image_of_a_batch_has_its_own_length_and_nothing_grows() -> None:
    whole, without = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    without[2] = 1.5 * whole[2]  # guided it is shorter: it stays so
    guidance = ContextGuidance(2.0, renorm="global")
    guided = guidance(whole, without, None)
    torch.testing.assert_close(guided, torch.cat([guidance(whole[i : i + 1], without[i : i + 1], None) for i in range(3)]))
    torch.testing.assert_close(guided[2], 0.5 * whole[2])


def test_a_request_without_images_has_no_third_context_and_the_scale_that_is_said() -> None:
    guidance = ContextGuidance(4.0, 1.5, renorm=None)
    assert guidance.contexts(True, False) == ["whole", "no_text"]
    torch.testing.assert_close(guidance(WHOLE, NO_TEXT, None), NO_TEXT + 4 * (WHOLE - NO_TEXT))
    torch.testing.assert_close(guidance(WHOLE, NO_TEXT, WHOLE), NO_TEXT + 5.5 * (WHOLE - NO_TEXT))  # the demo's
    assert guidance.contexts(True, True) == ["whole", "no_text", "no_image"] and guidance.contexts(False, False) == ["whole"]


def test_times_are_guided_above_the_lower_end_and_up_to_the_upper() -> None:
    guidance = ContextGuidance(low=0.4, high=0.9)
    assert [guidance.guides(time) for time in (0.4, 0.41, 0.9, 0.91)] == [False, True, True, False]


def test_shifted_times_are_the_release_s() -> None:
    times = [shifted(t, 3.0) for t in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
    assert times == pytest.approx([0, 0.25, 0.5, 0.75, 0.9, 0.9643, 1], abs=1e-4) and shifted(0.5, 4.0) == pytest.approx(0.8)
    assert EvenlySpaced(3.0)(4, 8, 8).times == pytest.approx([1, 0.9, 0.75, 0.5, 0])  # num_timesteps 5


def test_scales_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        ContextGuidance(float("nan"))
