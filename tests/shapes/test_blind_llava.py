"""The control without marks."""

from __future__ import annotations

import torch
from torch import Tensor

from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.shapes.blind_llava import MarkBlindLlava, erased


def board(dot: float) -> Tensor:
    """A field of 9 x 10 px on a ground of 24 x 24, with a dot of 2 px that is lighter or darker."""
    image = torch.full((1, 3, 24, 24), 0.2)
    image[..., 7:16, 7:17] = -0.5
    image[..., 10:12, 11:13] = dot
    return image


def test_light_and_dark_details_are_erased_and_the_shape_stays() -> None:
    plain = board(-0.5)
    for dot in (1.0, -1.0):
        assert erased(board(dot)).equal(plain)


def test_only_the_tower_is_blind() -> None:
    stack = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 8}
    config = {"vision_config": stack | tower, "text_config": stack | {"model_type": "llama"}}
    blind, seeing = MarkBlindLlava.from_config(config), LlavaBackbone.from_config(config)
    light, dark = board(1.0), board(-1.0)
    assert blind.normalise(light).equal(blind.normalise(dark)) and blind.normalise(light).equal(seeing.normalise(erased(light)))
    assert not seeing.normalise(light).equal(seeing.normalise(dark))
