"""Input images whose latents are known are not encoded again."""

from __future__ import annotations

import pytest
import torch
from bridge_parts import CODEC, requests, wemmu

from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.latent_codec import SOURCE_LATENTS
from umm_zoo.batch import Batch
from umm_zoo.methods.conditioning import ConditionDropout, Prompts
from umm_zoo.methods.wemmu import WeMMU

#: Of factor 8, the pixels of a token of the tower: latents of images to generate lie on the grid of details.
COARSE = {
    **CODEC,
    "block_out_channels": [4] * 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def step(method: WeMMU, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, int]:
    """The loss of a step, and how many images were encoded in it."""
    count, encode = [], method.codec.encode
    with monkeypatch.context() as patch:
        patch.setattr(method.codec, "encode", lambda images: count.append(len(images)) or encode(images))
        torch.manual_seed(4)
        return method.training_losses(batch)["loss"].detach(), sum(count)


def test_an_image_that_is_asked_for_again_is_encoded_once(monkeypatch):
    method, batch = wemmu(codec=KLCodec.from_config(COARSE)), requests(1, 0, 1, target=(32, 32))
    batch.targets[0] = batch.images[0].clone()
    apart = step(method, batch, monkeypatch)
    batch.targets[0] = batch.images[0]
    moved = batch._map(torch.clone)
    assert moved.targets[0] is moved.images[0] and moved.targets[1] is not None
    once = step(method, batch, monkeypatch)
    torch.testing.assert_close(once[0], apart[0])
    assert (once[1], apart[1]) == (4, 5)


@pytest.mark.parametrize("black", [False, True])
def test_stored_latents_of_input_images_take_the_place_of_the_codec(black, monkeypatch):
    dropout = ConditionDropout(edit_image=0.5, prompts=Prompts(black_images=black))
    method, batch = wemmu(dropout=dropout), requests(1, 0, 2, 1, 1)
    stored, plain = method.precomputable()[SOURCE_LATENTS], step(method, batch, monkeypatch)
    batch.extras[SOURCE_LATENTS], batch.entries[SOURCE_LATENTS] = stored.compute(batch), batch.image_counts
    found = step(method, batch, monkeypatch)
    torch.testing.assert_close(found[0], plain[0])
    assert stored.per == "image" and 5 <= found[1] < plain[1]
