"""Costs of reconstruction: step time and peak memory of the baseline, of ROSS^R and of ROSS^D, as ratios to the baseline.

    python tools/benchmark_ross.py [--batch 16] [--grid 8] [--width 256] [--layers 6] [--head-width 128] [--repeats 3]

All arms train the same language model from random weights on the same random images: ``baseline`` (next token only),
``r-pixel``, ``r-latent`` (two-layer heads) and ``d`` (the transformer denoiser, 4 draws per image). Every arm runs in a process
of its own, in turns, so that other load on the machine meets all of them; the numbers are medians over the turns. Peak memory
(weights, gradients, moments, activations) is that of the accelerator, or of the process where there is none, less what the process
held before the model was built.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools import timing
from umm_zoo.release.card import markdown_table

ARMS = ("baseline", "r-pixel", "r-latent", "d")


def main(arguments: list[str] | None = None) -> int:
    """The command: all turns and their table."""
    options = parser().parse_args(arguments)
    print(table(timing.in_turns(measure, options, ARMS), options))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    return timing.parser(
        __doc__,
        steps=(8, "timed steps of a turn, after two that are not timed"),
        batch=(16, "rows of a step, one image each"),
        grid=(8, "image tokens per side"),
        width=(256, "width of the language model"),
        layers=(6, "layers of the language model"),
        head_width=(128, "width of the denoiser; 1024 in the paper"),
    )


def measure(options: argparse.Namespace, arm: str) -> timing.Numbers:
    """Seconds per step and peak memory in MiB of one arm, in this process."""
    import torch

    import umm_zoo.methods.ross  # noqa: F401  the libraries are in memory before anything is measured
    from umm_zoo.batch import Batch, Conversation

    torch.manual_seed(0)
    before = timing.memory(options.device)
    method = build_method(options, arm).to(options.device)
    method.train_only(["projector", "language_model"] + ["head"] * (arm != "baseline"))
    size = 4 * options.grid
    conversations: list[Conversation] = [
        [{"role": "user", "text": "<image>\nWhat is in it?"}, {"role": "assistant", "text": "a small red circle on the left"}]
    ] * options.batch
    images, keys = torch.rand(options.batch, 3, size, size) * 2 - 1, [str(i) for i in range(options.batch)]
    batch = Batch(keys, conversations, list(images), [1] * options.batch).to(options.device)
    seconds = timing.median_step(method, lambda: method.training_losses(batch)["loss"], options.steps, options.device)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return {"seconds": seconds, "memory": timing.memory(options.device) - before, "trained": trained}


def build_method(options: argparse.Namespace, arm: str) -> Any:
    """The method of one arm at the stated size: a tower of 4-pixel patches, a codec of factor 4 with 16 channels."""
    from umm_zoo.backbones.llava import LlavaBackbone
    from umm_zoo.blocks.denoisers import DenoiserHead, MLPRegressionHead
    from umm_zoo.blocks.targets import CodecLatents, PixelPatches
    from umm_zoo.methods.llava import LLaVA
    from umm_zoo.methods.ross import ROSS
    from umm_zoo.objectives.gaussian import GaussianNoisePrediction
    from umm_zoo.objectives.regression import MeanSquaredError

    tower = {"model_type": "clip_vision_model", "image_size": 4 * options.grid, "patch_size": 4, "hidden_size": 128}
    tower |= {"intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    decoder = {"model_type": "llama", "hidden_size": options.width, "intermediate_size": 3 * options.width}
    decoder |= {"num_hidden_layers": options.layers, "num_attention_heads": 4}
    vlm = LlavaBackbone.from_config({"vision_config": tower, "text_config": decoder})
    if arm == "baseline":
        return LLaVA(vlm)
    if arm == "r-pixel":
        pixels = PixelPatches(options.grid, patch=4)
        return ROSS(vlm, pixels, MLPRegressionHead(options.width, pixels.channels), MeanSquaredError())
    codec = timing.small_codec(16, [16, 32, 32], groups=8)
    target = CodecLatents(codec, options.grid, sampled=arm == "d")  # 64 channels per token, as in the release
    if arm == "r-latent":
        return ROSS(vlm, target, MLPRegressionHead(options.width, 64), MeanSquaredError())
    head = DenoiserHead(options.width, options.grid, width=options.head_width)
    return ROSS(vlm, target, head, GaussianNoisePrediction())


def table(found: dict[str, timing.Numbers], options: argparse.Namespace) -> str:
    """Medians over the turns, as Markdown."""
    base = found[ARMS[0]]
    rows = []
    for arm, own in found.items():
        cells = [arm, f"{int(own['trained']):,}", f"{1000 * own['seconds']:.0f}", f"{own['seconds'] / base['seconds']:.2f}"]
        rows.append([*cells, f"{own['memory']:.0f}", f"{own['memory'] / max(base['memory'], 1e-9):.2f}"])
    head = ["arm", "trained parameters", "ms per step", "ratio", "peak memory, MiB", "ratio"]
    setting = (
        f"{options.device}, {options.batch} rows of {options.grid**2} image tokens, language model {options.width} x "
        f"{options.layers}, denoiser 3 x {options.head_width}, 4 draws; {options.repeats} turns of {options.steps} steps"
    )
    return "\n".join([setting, "", *markdown_table(head, rows)])


if __name__ == "__main__":
    sys.exit(main())
