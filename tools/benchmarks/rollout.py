"""A step of caption reinforcement, ours against TRL's trainer and a plain loop over the library's calls.

All arms train the same adapter of the same small Qwen2.5-VL from random weights on the same images, with the same prompt,
renderer and reward, and one AdamW step per rollout. Special tokens are never drawn, so every caption has all its tokens. ``ours``
is ``GenerationForUnderstanding``: each image is encoded once for its group, the prompt is read once, and log-probabilities under
the policy that wrote are not computed a second time. ``library`` repeats every prompt G times, captions with transformers' own
``generate``, scores the captions once without and once with a gradient, and encodes every copy of every image each time. ``trl``
is TRL's ``GRPOTrainer`` with a processor of the library's classes; what it does by default and the others do not is switched off
(gradient checkpointing, bfloat16, clipping of gradients, logging). It repeats prompts and images too, but scores once.

In ``varied`` all captions differ; in ``peaked`` half of them are one caption, as a policy writes that has learned something.
Drawing and reward are the same code in all arms, in batches. ``update`` is the rest of a step: backward pass and optimiser, and in
``trl`` also preparing the prompts a second time, its metrics and its own work; phases are milliseconds of a step on the clock.
Reading images from its data set is not counted. Memory is that of model and steps, without the libraries.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from tools.benchmarks import base
from tools.benchmarks.base import Numbers, Options
from tools.benchmarks.rollout_peers import ALPHA, LEARNING_RATE, RANK, library_loop, trl_trainer

UNIT, OWN = "caption", ("ours",)
#: ``batch`` images of a step with ``group`` captions each; ``width`` a multiple of 32, ``size`` of the images one of 16.
SIZES = {"batch": 4, "group": 8, "tokens": 32, "width": 128, "size": 64, "draw_steps": 4, "steps": 5}
SMALLEST = {"batch": 2, "group": 2, "tokens": 4, "width": 32, "size": 32, "steps": 1}
PHASES = ("caption", "generate", "reward", "score", "update")


def cases(options: Options) -> list[tuple[str, str]]:
    """Policies that write many captions, and few."""
    return [(setting, arm) for setting in ("varied", "peaked") for arm in ("ours", "trl", "library")]


def missing(options: Options, arm: str) -> str:
    """Why an arm cannot run."""
    return "pip install umm_zoo[trl]" if arm == "trl" and find_spec("trl") is None else ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """A step of one arm by the caption, in this process."""
    import torch

    import umm_zoo.backbones.sd3
    import umm_zoo.methods.uae.captioner_grpo  # noqa: F401  the libraries are in memory before anything is measured

    if arm == "trl":
        import trl.trainer.grpo_trainer  # noqa: F401
    torch.manual_seed(0)
    before = base.memory_from_here(options.device)
    batch, method = random_images(options), build(options, arm, setting).to(options.device)
    taken: list[tuple[float, dict[str, float]]] = []
    start = (0.0, 0.0)

    def clocks() -> tuple[float, float]:
        return base.processor_time(options.device), base.now(options.device)

    def began() -> None:
        nonlocal start
        method.phases.seconds.clear()
        start = clocks()

    def ended() -> None:
        processor, clock = clocks()
        phases = dict(method.phases.seconds)
        phases["update"] = clock - start[1] - sum(phases.values())
        taken.append((processor - start[0], phases))

    if arm == "trl":
        trl_steps(options, method, batch, began, ended)
    else:
        step = own_step(options, method, batch)
        for _ in range(options.steps + 1):
            began()
            step()
            ended()
    timed = taken[1:]
    captions = options.batch * options.group
    numbers = {"seconds": statistics.median(one[0] for one in timed) / captions, "memory": base.held(options.device) - before}
    return numbers | {name: 1000 * statistics.mean(one[1].get(name, 0.0) for one in timed) for name in PHASES}


def random_images(options: Options) -> Any:
    """Noise in 8 bits, which a file would hold too."""
    import torch

    from umm_zoo.batch import Batch

    levels = torch.randint(256, (options.batch, 3, options.size, options.size))
    images = (levels / 127.5 - 1).to(options.device)
    return Batch([f"row{i}" for i in range(options.batch)], [[]] * options.batch, list(images), [1] * options.batch)


def own_step(options: Options, method: Any, batch: Any) -> Callable[[], None]:
    """The step of ``ours`` and ``library``."""
    import torch

    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], LEARNING_RATE)

    def step() -> None:
        method.training_losses(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trl_steps(options: Options, method: Any, batch: Any, began: Callable[[], None], ended: Callable[[], None]) -> None:
    """The steps of ``trl``."""
    from transformers import PrinterCallback, TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            began()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ended()

    with tempfile.TemporaryDirectory() as folder:  # the trainer wants one, though nothing is saved
        trainer = trl_trainer(options, method, batch, folder)
        trainer.add_callback(Steps())
        trainer.remove_callback(PrinterCallback)  # its summary is no part of the table
        trainer.train()


def build(options: Options, arm: str, setting: str) -> Any:
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
    vlm = base.small_qwen(width, 4, heads=width // 32, kv_heads=width // 32, vision_width=64, vision_layers=4)
    bias = torch.zeros(vlm.model.lm_head.out_features)
    bias[vlm.tokenizer.all_special_ids] = -1e4  # never drawn: no caption ends early
    likely = vlm.tokenizer.convert_tokens_to_ids(vlm.tokenizer.tokenize(" red"))[0]
    bias[likely] = math.log(len(bias) / (2 ** (1 / options.tokens) - 1)) if setting == "peaked" else 0.0
    vlm.model.lm_head.bias = nn.Parameter(bias)
    transformer = {"sample_size": size // 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    transformer |= {"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 64}
    transformer |= {"pooled_projection_dim": 8, "pos_embed_max_size": size // 16}
    decoder, codec = StableDiffusion3.from_config(transformer), base.small_codec(4, [8, 8, 8, 8], groups=4)
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
