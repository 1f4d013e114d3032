"""Images that the language model itself generates from captions."""

from __future__ import annotations

import pytest
import torch
from uae_parts import images
from unified_parts import unified_stage

from tests.backbones.janus_parts import janus
from umm_zoo.batch import stacked
from umm_zoo.errors import UserError
from umm_zoo.methods.requests import request_batch
from umm_zoo.methods.uae.token_renderer import TokenRenderer
from umm_zoo.outputs import Sampling


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_an_image_depends_on_its_caption_and_seed_alone(guidance: float):
    model, own = janus(), TokenRenderer(guidance)
    together = stacked(own.generate(model, ["a red circle", "red", "red", ""], [4, 4, 5, 4]))
    assert together.shape == (4, 3, 8, 8) and together.abs().max() <= 1
    assert torch.allclose(own.generate(model, ["red"], [4])[0], together[1], atol=1e-5)
    assert not torch.allclose(together[0], together[1]) and not torch.allclose(together[1], together[2])


@torch.no_grad()
def test_several_images_of_a_caption_stand_side_by_side():
    model, own = janus(), TokenRenderer(3.0)
    together = own.draw(model, ["a red circle", "red"], [1, 2, 3, 4]).ids
    alone = [
        own.draw(model, [caption], [seed]).ids[0]
        for caption, seed in zip(["a red circle"] * 2 + ["red"] * 2, [1, 2, 3, 4], strict=True)
    ]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_guidance_of_one_call_takes_the_place_of_the_renderers():
    model = janus()
    (found,) = TokenRenderer(1.0).generate(model, ["red"], [4], sampling=Sampling(guidance=4.0))
    assert torch.equal(found, TokenRenderer(4.0).generate(model, ["red"], [4])[0])
    assert not torch.equal(found, TokenRenderer(1.0).generate(model, ["red"], [4])[0])


@torch.no_grad()
def test_a_marker_in_a_caption_is_text_that_asks_for_no_image():
    model, own = janus(), TokenRenderer(1.0)
    assert torch.equal(own.generate(model, ["a <image>red"], [1])[0], own.generate(model, ["a red"], [1])[0])


def test_another_size_than_the_models_is_refused():
    method = unified_stage().eval()
    assert method.generate(request_batch(["red"]), [4], Sampling(size=(8, 8)))[0].shape == (3, 8, 8)
    with pytest.raises(UserError, match="found 4 x 8 px, expected 8 x 8"):
        method.generate(request_batch(["red"]), [4], Sampling(size=(4, 8)))


@torch.no_grad()
def test_a_round_trip_goes_through_the_models_codec():
    method = unified_stage().eval()
    codec = method.vlm.codec
    assert torch.equal(stacked(method.round_trip(images(2))), codec.images(codec.codes(images(2))).clamp(-1, 1))
    captions, made = method.reconstruct_from_captions(images(2), [7, 8])
    assert torch.equal(stacked(made), stacked(method.generate(request_batch([caption or "" for caption in captions]), [7, 8])))
