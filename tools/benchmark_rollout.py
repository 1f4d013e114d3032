"""What a step of caption reinforcement costs, by phase, against a plain loop over the library's calls and against TRL's trainer.

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
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

ARMS = ("ours", "library", "trl")
PHASES = ("caption", "generate", "reward", "score", "update")
NUMBERS = (*PHASES, "samples_per_second", "start_mb", "peak_mb")
RANK, ALPHA, LEARNING_RATE = 8, 16.0, 1e-5


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.arm:
        print(json.dumps(measure(options)))
        return 0
    arms = [arm for arm in ARMS if arm != "trl" or find_spec("trl") is not None]
    if "trl" not in arms:
        print("trl arm left out: pip install umm_zoo[trl]")
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for _ in range(options.repeats):
        for arm in arms:
            command = [sys.executable, __file__, "--arm", arm, *flags(options)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
    print(table(results))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--batch", type=int, default=4, help="images of a step")
    made.add_argument("--group", type=int, default=8, help="captions of each")
    made.add_argument("--tokens", type=int, default=32, help="longest caption")
    made.add_argument("--width", type=int, default=128, help="width of the language model, a multiple of 32")
    made.add_argument("--size", type=int, default=64, help="side of the images, a multiple of 16")
    made.add_argument("--draw-steps", type=int, default=4, help="steps of drawing")
    made.add_argument("--steps", type=int, default=5, help="timed steps of a turn, after one that is not timed")
    made.add_argument("--repeats", type=int, default=3, help="turns of every arm")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return made


def flags(options: argparse.Namespace) -> list[str]:
    names = ("batch", "group", "tokens", "width", "size", "draw_steps", "steps", "device")
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds per phase of a step, samples per second, memory."""
    import torch

    torch.manual_seed(0)
    batch, method = random_images(options), build(options).to(options.device)
    run = (trl_run if options.arm == "trl" else own_run)(options, method, batch)
    before = memory(options.device)
    spent = run()
    rate = options.batch * options.group / sum(spent.values())
    return {**spent, "samples_per_second": rate, "start_mb": before, "peak_mb": memory(options.device)}


def memory(device: str) -> float:
    """The most held so far, in megabytes: on the device, or by the process."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def random_images(options: argparse.Namespace) -> Any:
    """Noise in 8 bits, which a file would hold too."""
    import torch

    from umm_zoo.batch import Batch

    levels = torch.randint(256, (options.batch, 3, options.size, options.size))
    images = (levels / 127.5 - 1).to(options.device)
    return Batch([f"row{i}" for i in range(options.batch)], [[]] * options.batch, images, [1] * options.batch)


class Clock:
    """Mean seconds of every phase over the steps after the first.

    Args:
        method: measures its phases.
        options: of the run.
    """

    def __init__(self, method: Any, options: argparse.Namespace) -> None:
        self.method, self.options = method, options
        self.spent, self.steps, self.began = dict.fromkeys(PHASES, 0.0), 0, 0.0

    def begin(self) -> None:
        """Of a step."""
        self.method.phases.restart()
        self.began = time.perf_counter()

    def end(self) -> None:
        """What no phase has measured is ``update``."""
        import torch

        if self.options.device.startswith("cuda"):
            torch.cuda.synchronize()
        whole, phases = time.perf_counter() - self.began, self.method.phases.seconds
        if self.steps:
            for name, seconds in {**phases, "update": whole - sum(phases.values())}.items():
                self.spent[name] += seconds / self.options.steps
        self.steps += 1


def own_run(options: argparse.Namespace, method: Any, batch: Any) -> Callable[[], dict[str, float]]:
    """The steps of ``ours`` and ``library``."""
    import torch

    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], LEARNING_RATE)
    clock = Clock(method, options)

    def run() -> dict[str, float]:
        for _ in range(options.steps + 1):
            method.rollout = None
            clock.begin()
            method.training_losses(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.end()
        return clock.spent

    return run


def trl_run(options: argparse.Namespace, method: Any, batch: Any) -> Callable[[], dict[str, float]]:
    """The steps of ``trl``."""
    from transformers import TrainerCallback

    from tools.rollout_trl import trl_trainer

    folder = tempfile.TemporaryDirectory()  # the trainer wants one, though nothing is saved
    trainer, clock = trl_trainer(options, method, batch, folder.name, RANK, ALPHA, LEARNING_RATE), Clock(method, options)

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end()

    trainer.add_callback(Steps())

    def run() -> dict[str, float]:
        with folder:
            trainer.train()
        return clock.spent

    return run


def build(options: argparse.Namespace) -> Any:
    """The method of an arm."""
    import torch
    from torch import nn

    from umm_zoo.backbones.adapters import LoRA
    from umm_zoo.backbones.codecs import KLCodec
    from umm_zoo.backbones.features import DINOv2Features
    from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
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
    heads = width // 32
    text = {
        "vocab_size": 1024,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": width,
    }
    vlm = Qwen25VL.from_config({"tie_word_embeddings": True, "text_config": text, "vision_config": vision}, system_prompt=None)
    bias = torch.zeros(vlm.model.lm_head.out_features)
    bias[vlm.tokenizer.all_special_ids] = -1e4  # never drawn: no caption ends early
    vlm.model.lm_head.bias = nn.Parameter(bias)
    decoder = StableDiffusion3.from_config(
        {
            "sample_size": size // 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 64,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": size // 16,
        }
    )
    codec = KLCodec.from_config(
        {
            "latent_channels": 4,
            "block_out_channels": [8, 8, 8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }
    )
    sizes = {"hidden_size": 32, "image_size": size, "patch_size": 8}
    encoder = DINOv2Features.from_config({**sizes, "num_hidden_layers": 1, "num_attention_heads": 2}, size)
    kind: type[GenerationForUnderstanding] = library_loop() if options.arm == "library" else GenerationForUnderstanding
    method = kind(
        vlm,
        CaptionRenderer(MLPConnector(width, 64, 128), decoder, codec, FlowMatching(), guidance=1.0, image_size=size),
        reward=ReconstructionReward(encoder),
        objective=GRPO(kl_weight=0.0),
        adapter=None if options.arm == "trl" else LoRA(rank=RANK, alpha=ALPHA),  # TRL puts its own there
        captions=CaptionSampling("<image>\nDescribe the image.", options.tokens),
        rollouts=Rollouts(options.group),
        num_steps=options.draw_steps,
    )
    TrainingSetup(["language_model" if options.arm == "trl" else "adapter"], AdamW(LEARNING_RATE)).prepare(method)
    return method


def library_loop() -> Any:
    """The method with its captions and its scoring as a general trainer does them."""
    import torch
    from torch import Tensor

    from umm_zoo.backbones.base import VLMInputs
    from umm_zoo.backbones.generation import Samples
    from umm_zoo.methods.uae.captioner_grpo import CaptionRollout, GenerationForUnderstanding

    class LibraryLoop(GenerationForUnderstanding):
        """Every copy of a prompt for itself."""

        @torch.no_grad()
        def roll_out(self, batch: Any) -> CaptionRollout:
            vlm, images = self.vlm, batch.images
            group = self.rollouts.group
            size = len(images) * group
            copies = images.repeat_interleave(group, dim=0)
            with self.phases("caption", self.device):
                inputs = vlm.embed(self.captions.conversations(size), copies, [1] * size, for_generation=True)
                sides = torch.tensor([[1, *(side // vlm.layout.patch_size for side in copies.shape[-2:])]] * size)
                whole = vlm.model.generate(
                    input_ids=inputs.token_ids,
                    attention_mask=inputs.attention_mask.long(),
                    pixel_values=vlm.layout.patches(copies),
                    image_grid_thw=sides.to(copies.device),
                    mm_token_type_ids=inputs.image_mask.int(),
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    max_new_tokens=self.captions.max_new_tokens,
                    pad_token_id=vlm.pad_id,
                    eos_token_id=vlm.tokenizer.eos_token_id,
                )
                tokens = whole[:, inputs.token_ids.shape[1] :]
                ended = (tokens == vlm.tokenizer.eos_token_id).long()
                mask = (ended.cumsum(1) - ended) == 0
                texts = [
                    str(vlm.tokenizer.decode(row[own].tolist(), skip_special_tokens=True))
                    for row, own in zip(tokens, mask, strict=True)
                ]
            with self.phases("score", self.device):
                old = self.log_probs(inputs, tokens, mask)
            samples = Samples(tokens, mask, texts, old)
            with self.phases("generate", self.device):
                generated = self.images_of_samples(samples, images, self.noise(len(images), group), torch.arange(size))
            rewards, advantages = self.judge(generated, batch)
            return CaptionRollout(
                batch=batch,
                images=images,
                captions=texts,
                generated=generated,
                rewards=rewards,
                advantages=advantages,
                inputs=inputs,
                samples=samples,
                weights=self.objective.aggregation(mask),
            )

        def _prompts(self, rollout: CaptionRollout, groups: Tensor) -> VLMInputs:
            copies = rollout.images[groups]
            return self.vlm.embed(self.captions.conversations(len(groups)), copies, [1] * len(groups), for_generation=True)

    return LibraryLoop


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians, side by side."""
    medians = {arm: {name: statistics.median(turn[name] for turn in turns) for name in NUMBERS} for arm, turns in results.items()}
    lines = [f"{'':20s}" + "".join(f"{arm:>22s}" for arm in medians)]
    for name in NUMBERS:
        cells = []
        for arm in medians.values():
            share = f" ({100 * arm[name] / sum(arm[phase] for phase in PHASES):4.1f} %)" if name in PHASES else ""
            cells.append(f"{arm[name]:.3f}{share}".rjust(22))
        lines.append(f"{name:20s}" + "".join(cells))
    rates = {arm: found["samples_per_second"] for arm, found in medians.items()}
    ratios = [f"{rates['ours'] / rate:.2f} times as fast as {arm}" for arm, rate in rates.items() if arm != "ours"]
    return "\n".join([*lines, f"ours is {', '.join(ratios)}"])


if __name__ == "__main__":
    sys.exit(main())
