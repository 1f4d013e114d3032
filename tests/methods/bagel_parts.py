"""A small Bagel with random weights, and rows of all kinds for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.mixture_vlm import MixtureVLM
from umm_zoo.batch import Batch, Task, Turn
from umm_zoo.blocks.latent_tokens import LatentTokens
from umm_zoo.methods.bagel import Bagel
from umm_zoo.methods.packed_rows import ItemDropout
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import ContextGuidance
from umm_zoo.objectives.schedules import EvenlySpaced
from umm_zoo.objectives.solvers import Euler
from umm_zoo.outputs import Wanted

TRAINED = ["understanding_expert", "generation_expert", "latent_in", "latent_out", "time_in", "projector"]
TEXT = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}


def build(experts: int = 2, seed: int = 0, **arguments: object) -> Bagel:
    torch.manual_seed(seed)
    vision = {**VISION, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    vlm = LlavaBackbone.from_config(
        {
            "text_config": {**TEXT, "num_key_value_heads": 2, "initializer_range": 0.1},
            "vision_config": vision,
            "vision_feature_layer": -2,
        }
    )
    blocks = {
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    objective = FlowMatching(num_steps=3, schedule=EvenlySpaced(3.0), solver=Euler())
    given = {"dropout": ItemDropout(0, 0, 0), "guidance": ContextGuidance(image=1.0), "image_size": 16, **arguments}
    model = Bagel(
        MixtureVLM(vlm, experts, qk_norm=True), LatentTokens(4, 32, 2, 8), KLCodec.from_config(blocks), objective, **given
    )  # type: ignore[arg-type]
    torch.nn.init.normal_(model.latents.latent_out.weight, std=0.3)  # it begins at zero, where nothing depends on anything
    with torch.no_grad():
        for part in model.vlm.stack.experts_parts():
            for parameter in part.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def image(seed: int, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rows() -> Batch:
    """A question, a text-to-image of its own size, an edit, and a composition."""
    return Batch(
        keys=["a", "b", "c", "d"],
        conversations=[
            [Turn(role="user", text="<image>\nWhat colour?"), Turn(role="assistant", text="It is red.")],
            [Turn(role="user", text="a small red circle, and more")],
            [Turn(role="user", text="<image>\nMake it green.")],
            [Turn(role="user", text="<image>\n<image>\nPut one into the other.")],
        ],
        images=[image(1), image(2), image(3), image(4)],
        image_counts=[1, 0, 1, 2],
        targets=[None, image(5, 24, 8), image(6), image(7)],
    )


def method() -> Bagel:
    """One that trains, and drops nothing."""
    made = build()
    made.train_only(TRAINED)
    made.wanted = Wanted(max_new_tokens=2)
    return made.train()


def alike() -> Batch:
    """Questions, and rows that ask for images of one size."""
    batch = rows().select([0, 1, 2, 0, 3, 2])
    conversations = [
        [Turn(role=turn["role"], text=turn["text"] + " very" * number) for turn in turns]
        for number, turns in enumerate(batch.conversations)
    ]
    targets = [None if own is None else image(10 + number) for number, own in enumerate(batch.targets)]
    return replace(batch, keys=list("abcdef"), conversations=conversations, targets=targets)


def names(batch: Batch) -> list[str]:
    """Of the rows that noise is drawn for."""
    return [key for key, asks in zip(batch.keys, batch.has_target, strict=True) if asks]


def only(kind: Task) -> Batch:
    batch = rows()
    return batch.select([row for row, task in enumerate(batch.tasks) if task is kind])
