"""A training step of ROSS's variants against the baseline's, and of ROSS^D against the official code.

All arms train the same language model from random weights on the same random images: ``baseline`` (next token only), ``r-pixel``,
``r-latent`` (two-layer heads) and ``d`` (the transformer denoiser, 4 draws per image). ``official`` is a step of ROSS's own model
(``--ross CLONE``) at the sizes of ``d``; ``d-head`` and ``official-head`` are the denoiser with its diffusion alone.
"""

from __future__ import annotations

from typing import Any

from tools.benchmarks import base, official
from tools.benchmarks.base import Numbers, Options

UNIT, OWN = "step", ("d", "baseline", "r-pixel", "r-latent", "d-head")
SIZES = {"batch": 16, "grid": 8, "width": 256, "layers": 6, "head_width": 128, "steps": 8}
SMALLEST = {"batch": 2, "grid": 2, "width": 16, "layers": 1, "head_width": 16, "steps": 1}


def cases(options: Options) -> list[tuple[str, str]]:
    """Steps, and the head alone."""
    steps = [("step", arm) for arm in ("d", "baseline", "r-pixel", "r-latent", "official")]
    return [*steps, ("head", "d-head"), ("head", "official-head")]


def missing(options: Options, arm: str) -> str:
    """Why an arm cannot run."""
    return official.missing(options.ross, ("timm",)) if arm.startswith("official") else ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """A step of one arm, in this process."""
    import torch

    import umm_zoo.methods.ross  # noqa: F401  the libraries are in memory before anything is measured

    if arm.startswith("official"):
        official.use(options.ross)
        import ross.model.language_model.ross_llama  # noqa: F401
    torch.manual_seed(0)
    before = base.memory_from_here(options.device)
    method = build(options, arm).to(options.device).train()
    if setting == "head":
        return head_step(options, method, arm, before)
    method.train_only(["projector", "language_model"] + ["head"] * (arm != "baseline"))
    batch = rows(options)
    trained, loss = list(method.parameters()), lambda: method.training_losses(batch)["loss"]
    if arm == "official":
        head = official.ross_head(options, options.width, 64, options.head_width)
        trained, loss = official.ross_loss(options, method.vlm, method.target.codec, head, batch)
        method = None
    numbers = base.training_step(trained, loss, options, before)
    return {**numbers, "trained": sum(p.numel() for p in trained if p.requires_grad)}


def rows(options: Options) -> Any:
    """Questions about random images."""
    import torch

    from umm_zoo.batch import Batch, Conversation

    size = 4 * options.grid
    conversations: list[Conversation] = [
        [{"role": "user", "text": "<image>\nWhat is in it?"}, {"role": "assistant", "text": "a small red circle on the left"}]
    ] * options.batch
    images, keys = torch.rand(options.batch, 3, size, size) * 2 - 1, [str(i) for i in range(options.batch)]
    return Batch(keys, conversations, list(images), [1] * options.batch).to(options.device)


def head_step(options: Options, method: Any, arm: str, before: float) -> Numbers:
    """A step of the denoiser on random states and targets, four draws of each."""
    import torch

    from umm_zoo.batch import Tokens

    cells, channels = options.grid**2, method.target.channels
    states = torch.randn(options.batch, cells, options.width, device=options.device)
    targets = torch.randn(options.batch, channels, options.grid, options.grid, device=options.device)
    if arm == "d-head":
        return base.training_step(
            method.head.parameters(), lambda: method.objective.losses(method.head, targets, Tokens(states)).mean(), options, before
        )
    head = official.ross_head(options, options.width, channels, options.head_width).to(options.device)

    def loss() -> Any:  # as its compute_vm_loss calls it
        known = states.transpose(1, 2).unflatten(2, (options.grid, options.grid))
        return head(z=known.repeat(4, 1, 1, 1).contiguous(), target=targets.repeat(4, 1, 1, 1).contiguous()).mean()

    return base.training_step(head.parameters(), loss, options, before)


def build(options: Options, arm: str) -> Any:
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
    codec = base.small_codec(16, [16, 32, 32], groups=8)
    target = CodecLatents(codec, options.grid, sampled=arm != "r-latent")  # 64 channels per token, as in the release
    if arm == "r-latent":
        return ROSS(vlm, target, MLPRegressionHead(options.width, 64), MeanSquaredError())
    head = DenoiserHead(options.width, options.grid, width=options.head_width)
    return ROSS(vlm, target, head, GaussianNoisePrediction())
