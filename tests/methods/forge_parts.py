"""Forge-and-Quench in sizes that run in milliseconds: 2 x 2 features of width 16, five queries, images of 8 px."""

from __future__ import annotations

from typing import Any

import torch
import uae_parts
from tiny_configs import T5, clip

from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.feature_injection import FeatureInjection
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.flux import FluxOnFeatures
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.batch import Batch
from umm_zoo.blocks.connectors import MLPConnector
from umm_zoo.blocks.feature_forge import FeatureForge
from umm_zoo.blocks.queries import LearnedQueries
from umm_zoo.blocks.resampler import PerceiverResampler
from umm_zoo.methods.forge_and_quench import ForgeAndQuench
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.schedules import EvenlySpaced
from umm_zoo.objectives.solvers import Euler
from umm_zoo.pretraining.text_to_image import TextToImageModel

FLUX = {
    "in_channels": 16, "patch_size": 1, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "pooled_projection_dim": 6, "axes_dims_rope": [2, 2, 4], "guidance_embeds": False,
}  # fmt: skip


def text_to_image() -> dict[str, Any]:
    """The parts of the model that stays as it is."""
    torch.manual_seed(1)
    return {
        "text_encoder": uae_parts.lively(TextEncoder.from_config({**T5, "d_model": 20})),
        "decoder": uae_parts.lively(StableDiffusion3.from_config({**uae_parts.DECODER, "qk_norm": "rms_norm"})),
        "codec": KLCodec.from_config(uae_parts.CODEC),
        "objective": FlowMatching(num_steps=3, schedule=EvenlySpaced(2.0), solver=Euler()),
    }


def forge(**arguments: Any) -> FeatureForge:
    torch.manual_seed(2)
    steps = FlowMatching(num_steps=3, schedule=EvenlySpaced(), solver=Euler())
    denoiser: Any = uae_parts.lively(FluxOnFeatures.from_config(FLUX))
    return FeatureForge(LearnedQueries(24, 5), MLPConnector(24, 12), denoiser, **{"objective": steps, **arguments})


def method(trained: tuple[str, ...] = ("forge", "injection"), **arguments: Any) -> ForgeAndQuench:
    vlm, own = uae_parts.vlm(), forge()
    torch.manual_seed(3)
    injection = FeatureInjection(PerceiverResampler(16, 20, 12, 3, 2, 2, 4), zero_values=False)
    encoder = uae_parts.lively(CLIPVisionFeatures.from_config(clip()))
    given = {"encoder": encoder, "forge": own, "injection": injection, **text_to_image()}
    made = ForgeAndQuench(vlm=vlm, **{**given, **arguments})
    made.train_only(list(trained))
    return made


def model(guidance: float = 1.0) -> TextToImageModel:
    """The text-to-image model alone."""
    made = TextToImageModel(**text_to_image(), guidance=guidance)
    made.train_only(["text_encoder", "decoder"])
    return made.eval()  # type: ignore[return-value]


def rows(*texts: str, sizes: tuple[tuple[int, int], ...] = ()) -> Batch:
    """Rows that ask for images of texts, of 8 x 8 px where no sizes are said."""
    generator = torch.Generator().manual_seed(4)
    shapes = sizes or ((8, 8),) * len(texts)
    targets = [torch.rand(3, *shape, generator=generator) * 2 - 1 for shape in shapes]
    return Batch(
        [f"row{i}" for i in range(len(texts))], [[{"role": "user", "text": text}] for text in texts], targets=list(targets)
    )
