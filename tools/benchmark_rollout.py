"""Costs of a step of caption reinforcement, by phase, against a plain loop over the library's calls and against TRL's trainer.

    python tools/benchmark_rollout.py [--batch 4] [--group 8] [--tokens 32] [--width 128] [--steps 5] [--repeats 3] [--device cpu]

All arms train the same adapter of the same small Qwen2.5-VL from random weights on the same images, with the same prompt,
renderer and reward, and one AdamW step per rollout. Special tokens are never drawn, so every caption has all its tokens. ``ours``
is ``GenerationForUnderstanding``: each image is encoded once for its group, the prompt is read once, and log-probabilities under
the policy that wrote are not computed a second time. ``library`` repeats every prompt G times, captions with transformers' own
``generate``, scores the captions once without and once with a gradient, and encodes every copy of every image each time. ``trl``
is TRL's ``GRPOTrainer`` with a processor of the library's classes; what it does by default and the others do not is switched off
(gradient checkpointing, bfloat16, clipping of gradients, logging). It repeats prompts and images too, but scores once. Where TRL
is not installed, ``trl`` is left out.

Drawing and reward are the same code in all arms, in batches. ``update`` is the rest of a step: backward pass and optimiser, and in
``trl`` also preparing the prompts a second time, its metrics and its own work. Reading images from its data set is not counted.
Each arm runs in a process of its own, in turns; the numbers are medians over the turns. ``start_mb`` is the memory before the first
step: on the CPU ``trl``'s libraries are in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools import timing
from tools.rollout_arms import ALPHA, LEARNING_RATE, RANK, library_loop, trl_trainer

ARMS = ("ours", "library", "trl")
PHASES = ("caption", "generate", "reward", "score", "update")
NUMBERS = (*PHASES, "samples_per_second", "start_mb", "peak_mb")


def main(arguments: list[str] | None = None) -> int:
    """The command: all turns and their table."""
    options = parser().parse_args(arguments)
    arms = [arm for arm in ARMS if arm != "trl" or find_spec("trl") is not None]
    if "trl" not in arms:
        print("trl arm left out: pip install umm_zoo[trl]")
    print(table(timing.in_turns(measure, options, arms)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    return timing.parser(
        __doc__,
        steps=(5, "timed steps of a turn, after one that is not timed"),
        batch=(4, "images of a step"),
        group=(8, "captions of each"),
        tokens=(32, "longest caption"),
        width=(128, "width of the language model, a multiple of 32"),
        size=(64, "side of the images, a multiple of 16"),
        draw_steps=(4, "steps of drawing"),
    )


def measure(options: argparse.Namespace, arm: str) -> timing.Numbers:
    """Seconds per phase of a step, samples per second, memory in megabytes."""
    import torch

    torch.manual_seed(0)
    batch, method = random_images(options), build(options, arm).to(options.device)
    clock = Clock(method, options)
    (trl_steps if arm == "trl" else own_steps)(options, method, batch, clock)
    start, peak = (mebibytes * 2**20 / 1e6 for mebibytes in (clock.memory, timing.memory(options.device)))
    rate = options.batch * options.group / sum(clock.spent.values())
    return {**clock.spent, "samples_per_second": rate, "start_mb": start, "peak_mb": peak}


def random_images(options: argparse.Namespace) -> Any:
    """Noise in 8 bits, which a file would hold too."""
    import torch

    from umm_zoo.batch import Batch

    levels = torch.randint(256, (options.batch, 3, options.size, options.size))
    images = (levels / 127.5 - 1).to(options.device)
    return Batch([f"row{i}" for i in range(options.batch)], [[]] * options.batch, list(images), [1] * options.batch)


class Clock:
    """Mean seconds of every phase over the steps after the first; the memory before any, in MiB.

    Args:
        method: measures its phases.
        options: of the run.
    """

    def __init__(self, method: Any, options: argparse.Namespace) -> None:
        self.method, self.options = method, options
        self.spent, self.steps, self.began, self.memory = dict.fromkeys(PHASES, 0.0), 0, 0.0, 0.0

    def begin(self) -> None:
        """Of a step."""
        self.memory = self.memory or timing.memory(self.options.device)
        self.method.phases.seconds.clear()
        self.began = timing.now(self.options.device)

    def end(self) -> None:
        """Time that no phase has measured is ``update``."""
        whole, phases = timing.now(self.options.device) - self.began, self.method.phases.seconds
        if self.steps:
            for name, seconds in {**phases, "update": whole - sum(phases.values())}.items():
                self.spent[name] += seconds / self.options.steps
        self.steps += 1


def own_steps(options: argparse.Namespace, method: Any, batch: Any, clock: Clock) -> None:
    """The steps of ``ours`` and ``library``."""
    import torch

    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], LEARNING_RATE)
    for _ in range(options.steps + 1):
        clock.begin()
        method.training_losses(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.end()


def trl_steps(options: argparse.Namespace, method: Any, batch: Any, clock: Clock) -> None:
    """The steps of ``trl``."""
    from transformers import PrinterCallback, TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end()

    with tempfile.TemporaryDirectory() as folder:  # the trainer wants one, though nothing is saved
        trainer = trl_trainer(options, method, batch, folder)
        trainer.add_callback(Steps())
        trainer.remove_callback(PrinterCallback)  # its summary is no part of the table
        trainer.train()


def build(options: argparse.Namespace, arm: str) -> Any:
    """The method of an arm."""
    import torch
    from torch import nn

    from umm_zoo.backbones.adapters import LoRA
    from umm_zoo.backbones.features import DINOv2Features
    from umm_zoo.backbones.sd3 import StableDiffusion3
    from umm_zoo.blocks.connectors import MLPConnector
    from umm_zoo.methods.uae.captioner_grpo import GenerationForUnderstanding
    from umm_zoo.methods.uae.captions import CaptionSampling
    from umm_zoo.methods.uae.renderers import CaptionRenderer
    from umm_zoo.methods.uae.rollouts import Rollouts
    from umm_zoo.objectives.flow_matching import FlowMatching
    from umm_zoo.objectives.grpo import GRPO
    from umm_zoo.rewards import ReconstructionReward
    from umm_zoo.training.optimization import AdamW
    from umm_zoo.training.setup import TrainingSetup

    width, size = options.width, options.size
    vlm = timing.small_qwen(width, 4, heads=width // 32, kv_heads=width // 32, vision_width=64, vision_layers=4)
    bias = torch.zeros(vlm.model.lm_head.out_features)
    bias[vlm.tokenizer.all_special_ids] = -1e4  # never drawn: no caption ends early
    vlm.model.lm_head.bias = nn.Parameter(bias)
    transformer = {"sample_size": size // 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    transformer |= {"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 64}
    transformer |= {"pooled_projection_dim": 8, "pos_embed_max_size": size // 16}
    decoder, codec = StableDiffusion3.from_config(transformer), timing.small_codec(4, [8, 8, 8, 8], groups=4)
    sizes = {"hidden_size": 32, "image_size": size, "patch_size": 8}
    encoder = DINOv2Features.from_config({**sizes, "num_hidden_layers": 1, "num_attention_heads": 2}, size)
    kind: type[GenerationForUnderstanding] = library_loop() if arm == "library" else GenerationForUnderstanding
    method = kind(
        vlm,
        CaptionRenderer(MLPConnector(width, 64, 128), decoder, codec, FlowMatching(), guidance=1.0, image_size=size),
        reward=ReconstructionReward(encoder),
        objective=GRPO(kl_weight=0.0),
        adapter=None if arm == "trl" else LoRA(rank=RANK, alpha=ALPHA),  # TRL puts its own there
        captions=CaptionSampling("<image>\nDescribe the image.", options.tokens),
        rollouts=Rollouts(options.group),
        num_steps=options.draw_steps,
    )
    TrainingSetup(["language_model" if arm == "trl" else "adapter"], AdamW(LEARNING_RATE)).prepare(method)
    return method


def table(found: dict[str, timing.Numbers]) -> str:
    """Medians, side by side."""
    lines = [f"{'':20s}" + "".join(f"{arm:>22s}" for arm in found)]
    for name in NUMBERS:
        cells = []
        for arm in found.values():
            share = f" ({100 * arm[name] / sum(arm[phase] for phase in PHASES):4.1f} %)" if name in PHASES else ""
            cells.append(f"{arm[name]:.3f}{share}".rjust(22))
        lines.append(f"{name:20s}" + "".join(cells))
    rates = {arm: own["samples_per_second"] for arm, own in found.items()}
    ratios = [f"{rates['ours'] / rate:.2f} times as fast as {arm}" for arm, rate in rates.items() if arm != "ours"]
    return "\n".join([*lines, f"ours is {', '.join(ratios)}"])


if __name__ == "__main__":
    sys.exit(main())
