"""GRPO on the words of a model whose images an existing bridge generates: UAE's later form."""

from __future__ import annotations

import pytest
import torch
from bridge_parts import metaquery, tiny_vlm, wemmu
from torch import nn
from torch.testing import assert_close
from uae_parts import Redness

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.batch import Batch, stacked
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.uae.captioner_grpo import GenerationForUnderstanding
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.renderers import BridgeRenderer
from umm_zoo.methods.uae.rollouts import Rollouts
from umm_zoo.objectives.grpo import GRPO


def method(bridge: Bridge) -> GenerationForUnderstanding:
    built = GenerationForUnderstanding(
        tiny_vlm(),
        BridgeRenderer(bridge),
        Redness(),
        GRPO(kl_weight=0.0),
        adapter=LoRA(rank=2, alpha=4.0),
        captions=CaptionSampling("<image>\nDescribe the image.", max_new_tokens=4),
        rollouts=Rollouts(group=3),
        num_steps=2,
    )
    built.train_only(["adapter"])
    return built


def rows(count: int = 2) -> Batch:
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    conversations = [[{"role": "user", "text": "<image>\nDescribe the image."}] for _ in range(count)]
    return Batch([f"row{i}" for i in range(count)], conversations, images, [1] * count)


@torch.no_grad()
def test_an_image_depends_on_its_caption_and_seed_alone():
    renderer = BridgeRenderer(wemmu()).eval()
    vlm = tiny_vlm()
    together = stacked(renderer.generate(vlm, ["a red circle", "red", "red", ""], [4, 4, 5, 4]))
    assert together.shape == (4, 3, 8, 8) and together.abs().max() <= 1
    assert_close(renderer.generate(vlm, ["red"], [4])[0], together[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1]) and not torch.allclose(together[1], together[2])


@pytest.mark.parametrize("make", [wemmu, metaquery])
def test_only_the_words_are_trained(make):
    built = method(make())
    for parameter in built.adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    losses = built.training_losses(rows())
    losses["loss"].backward()
    moved = {name for name, part in built.parts().items() if any(p.grad is not None and p.grad.any() for p in part.parameters())}
    assert moved == {"adapter"}
    assert {key.split(".")[0] for key in built.checkpoint_keys()} == {"adapter"}


@torch.no_grad()
def test_validation_without_a_decoder_of_its_own():
    outputs = method(wemmu()).eval().validation_step(rows(), 0)
    assert stacked(outputs.generated).shape == (2, 3, 8, 8) and outputs.scalars.keys() == {"reward", "mean_caption_tokens"}
    assert outputs.rewards.shape == (2,)
