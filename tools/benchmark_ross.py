"""What reconstruction costs: step time and peak memory of the baseline, of ROSS^R and of ROSS^D, as ratios to the baseline.

    python tools/benchmark_ross.py [--batch 16] [--grid 8] [--width 256] [--layers 6] [--head-width 128] [--repeats 3]

All arms train the same language model from random weights on the same random images: ``baseline`` (next token only),
``r-pixel``, ``r-latent`` (two-layer heads) and ``d`` (the transformer denoiser, 4 draws per image). Every arm runs in a process
of its own, in turns, so that other load on the machine meets all of them; the numbers are medians over the turns. Peak memory
(weights, gradients, moments, activations) is that of the accelerator, or of the process where there is none, less what the process
held before the model was built.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

ARMS = ("baseline", "r-pixel", "r-latent", "d")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.arm:
        print(json.dumps(measure(options)))
        return 0
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(options.repeats):
        for arm in ARMS:
            command = [sys.executable, __file__, "--arm", arm, *flags(options)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
    print(table(results, options))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--batch", type=int, default=16, help="rows of a step, one image each")
    made.add_argument("--grid", type=int, default=8, help="image tokens per side")
    made.add_argument("--width", type=int, default=256, help="width of the language model")
    made.add_argument("--layers", type=int, default=6, help="layers of the language model")
    made.add_argument("--head-width", type=int, default=128, help="width of the denoiser; 1024 in the paper")
    made.add_argument("--steps", type=int, default=8, help="timed steps of a turn, after two that are not timed")
    made.add_argument("--repeats", type=int, default=3, help="turns of every arm")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return made


def flags(options: argparse.Namespace) -> list[str]:
    names = ("batch", "grid", "width", "layers", "head_width", "steps", "device")
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds per step and peak memory in MiB of one arm, in this process."""
    import torch

    import umm_zoo.methods.ross  # noqa: F401  the libraries are in memory before anything is measured
    from umm_zoo.batch import Batch, Conversation

    torch.manual_seed(0)
    device = torch.device(options.device)
    before = memory(device)
    method = build_method(options).to(device)
    size = 4 * options.grid
    conversations: list[Conversation] = [
        [{"role": "user", "text": "<image>\nWhat is in it?"}, {"role": "assistant", "text": "a small red circle on the left"}]
    ] * options.batch
    keys = [str(i) for i in range(options.batch)]
    batch = Batch(keys, conversations, torch.rand(options.batch, 3, size, size) * 2 - 1, [1] * options.batch).to(device)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)
    method.train()
    seconds = []
    for step in range(options.steps + 2):
        start = time.perf_counter()
        method.training_losses(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step >= 2:
            seconds.append(time.perf_counter() - start)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return {"seconds": statistics.median(seconds), "memory": memory(device) - before, "trained": trained}


def memory(device: Any) -> float:
    """Peak so far, in MiB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def build_method(options: argparse.Namespace) -> Any:
    """The method of one arm at the stated size: a tower of 4-pixel patches, a codec of factor 4 with 16 channels."""
    from umm_zoo.backbones.codecs import KLCodec
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
    if options.arm == "baseline":
        return LLaVA(vlm)
    if options.arm == "r-pixel":
        pixels = PixelPatches(options.grid, patch=4)
        return ROSS(vlm, pixels, MLPRegressionHead(options.width, pixels.channels), MeanSquaredError())
    codec = KLCodec.from_config(
        {
            "latent_channels": 16,
            "block_out_channels": [16, 32, 32],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        }
    )
    target = CodecLatents(codec, options.grid, sampled=options.arm == "d")  # 64 channels per token, as in the release
    if options.arm == "r-latent":
        return ROSS(vlm, target, MLPRegressionHead(options.width, 64), MeanSquaredError())
    head = DenoiserHead(options.width, options.grid, width=options.head_width)
    return ROSS(vlm, target, head, GaussianNoisePrediction())


def table(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    """Medians over the turns, as Markdown."""
    tokens = options.grid**2
    lines = [
        f"{options.device}, {options.batch} rows of {tokens} image tokens, language model {options.width} x {options.layers}, "
        f"denoiser 3 x {options.head_width}, 4 draws; {options.repeats} turns of {options.steps} steps",
        "",
        "| arm | trained parameters | ms per step | ratio | peak memory, MiB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    medians = {arm: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for arm, runs in results.items()}
    base = medians[ARMS[0]]
    for arm, found in medians.items():
        slower, larger = found["seconds"] / base["seconds"], found["memory"] / max(base["memory"], 1e-9)
        cells = [
            arm,
            f"{int(found['trained']):,}",
            f"{1000 * found['seconds']:.0f}",
            f"{slower:.2f}",
            f"{found['memory']:.0f}",
            f"{larger:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
