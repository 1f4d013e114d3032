"""The shipped tiny parts still reach the scores their cards and the README state, on scenes rendered here from another seed."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.shapes import World, make_sample, render
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.batch import Batch

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "experiments" / "tiny" / "weights"
CELLS = ["top left", "top right", "bottom left", "bottom right"]
SEED = 99  # the parts were trained on seed 1


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{name}_tool"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def scenes(count: int, task: str = "captions") -> Batch:
    """Held-out scenes with their ground truth."""
    samples = [make_sample(World(), SEED, "test", task, i) for i in range(count)]
    pictures = np.stack([render(World(), scene) for sample in samples for scene in sample.scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    conversations = [sample.row["conversations"] for sample in samples]
    counts = [len(sample.scenes) for sample in samples]
    return Batch([sample.key for sample in samples], conversations, images, counts, meta=[sample.row for sample in samples])


@functools.cache
def codec() -> KLCodec:
    return KLCodec.from_pretrained(str(WEIGHTS / "codec")).eval()


@functools.cache
def tower() -> CLIPVisionFeatures:
    return CLIPVisionFeatures.from_pretrained(str(WEIGHTS / "tower")).eval()


@torch.no_grad()
def test_the_codec_keeps_30_decibels():
    images = scenes(200).images
    error = (codec().decode(codec().encode(images)).clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(4 / error)).mean() > 29.5


@torch.no_grad()
def test_the_codec_is_scaled_to_unit_latents():
    latents = codec().encode(scenes(200).images)
    assert latents.shape[1:] == (16, 4, 4)
    assert abs(latents.std() - 1) < 0.1 and abs(latents.mean()) < 0.1


@pytest.mark.parametrize(("part", "least"), [("codec", 0.9), ("tower", 0.98)])
def test_the_mark_can_be_read_by_a_probe(part: str, least: float):
    result = _tool("probe").probe({"codec": codec, "tower": tower}[part](), [scenes(700)], "mark", -2, CELLS)
    assert result.chance < 0.35 and result.mlp > least


def test_all_shipped_weights_together_stay_small():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*.safetensors")) < 12e6
