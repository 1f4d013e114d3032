"""A model cast to half precision keeps its rotary frequencies, its codec's statistics and the times of its flow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.backbones.test_codecs import DC, KL
from tests.backbones.vlm_parts import CONVERSATIONS, COUNTS, llava, qwen, random_images
from umm_zoo.backbones.codecs import DCCodec, KLCodec
from umm_zoo.backbones.precision import antialiased
from umm_zoo.objectives.times import LogitNormalTimes, TimeSampler, UniformTimes


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def half(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """As Lightning's plug-in runs a step: with half precision for the default."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [llava, qwen])
def test_rotary_frequencies_stay(make: Any) -> None:
    vlm = make()
    before = {name: buffer.clone() for name, buffer in vlm.named_buffers() if name.endswith("inv_freq")}
    assert before
    vlm.to(torch.bfloat16)
    after = dict(vlm.named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    assert vlm.lm_head.weight.dtype == torch.bfloat16
    assert vlm(vlm.embed(CONVERSATIONS, random_images(vlm).bfloat16(), COUNTS)).nll.isfinite().all()


def test_a_stack_of_its_own_keeps_them_too() -> None:
    stack: Any = qwen().language_stack(copied=True)
    before = stack.rotary.inv_freq.clone()
    assert torch.equal(stack.bfloat16().rotary.inv_freq, before)


@pytest.mark.parametrize(("kind", "config"), [(KLCodec, KL), (DCCodec, DC)])
def test_statistics_of_a_codec_stay_and_move(kind: Any, config: dict[str, Any]) -> None:
    """A step of 1 in 1,000 is lost in bfloat16."""
    codec, exact = kind.from_config(config).bfloat16(), kind.from_config(config)
    assert codec.scaling.item() == pytest.approx(config["scaling_factor"], rel=1e-6)
    latents = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    for own in (codec, exact):
        for _ in range(9):
            own.track_moments(own.moments(latents), 0.999)
    assert_close(codec.scaling, exact.scaling)
    assert exact.scaling.item() != pytest.approx(config["scaling_factor"], rel=3e-4)


@pytest.mark.parametrize("times", [UniformTimes(), LogitNormalTimes()])
def test_times_are_not_rounded(times: TimeSampler, half: torch.dtype) -> None:
    drawn = times(1000, torch.device("cpu"))
    assert drawn.dtype == torch.float32 and len(drawn.unique()) > 990


def test_images_are_resized_as_in_float32(half: torch.dtype) -> None:
    images = torch.rand(1, 3, 9, 7, dtype=torch.float32).to(half)
    found = antialiased(images, (5, 6), "bicubic")
    torch.set_default_dtype(torch.float32)
    assert_close(found, antialiased(images.float(), (5, 6), "bicubic"))
