"""Methods of the paper's size with random weights, from their experiment files: nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tools.benchmarks import base
from tools.benchmarks.base import Numbers

#: Keys that count the layers of a stack.
_DEPTHS = ("num_hidden_layers", "num_layers", "depth")
#: Words of a model of few layers; the shipped tokenizer uses 1,024.
_WORDS = 2048


def method_of(file: str, device: str, changes: Sequence[str] = (), layers: int = 0, recompute: bool = True) -> tuple[Any, Any]:
    """The method of an experiment file, ready to train, and its training setup.

    Args:
        file: the experiment.
        device: where the weights are made.
        changes: ``key=value`` as on the command line of ``fit``.
        layers: most of a stack, with weights of zero, which are there at once; 0 is all, of random weights.
        recompute: False keeps all activations, whatever the file says.
    """
    from umm_zoo.experiment.build import build, build_method
    from umm_zoo.experiment.check import TRAINING
    from umm_zoo.experiment.file import load_experiment
    from umm_zoo.experiment.types import TARGET

    experiment = load_experiment(file, list(changes))
    tree = with_random_weights({"method": experiment.method, "adapters": experiment.adapters}, layers, recompute)
    method = None
    if device.startswith("cuda"):
        try:  # the GPU draws billions of weights in no time
            with torch.device(device):
                method = build_method(tree).to(device)
        except (RuntimeError, TypeError) as problem:  # a constructor that mixes devices
            print(f"built on the CPU: {problem}")
    if method is None:
        with _NoDraws():
            method = build_method(tree)
        method = draw(method.to(device)) if not layers else method
    setup = build({TARGET: TRAINING, **experiment.training}, "training")
    setup.prepare(method)
    if compilation := getattr(setup, "compilation", None):
        compilation.apply(method)
    return method.train(), setup


@torch.no_grad()
def draw(method: Any) -> Any:
    """Random values for all matrices."""
    for parameter in method.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
    return method


class _NoDraws(TorchFunctionMode):
    """Weights of zero where a constructor draws some."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if not getattr(func, "__name__", "").endswith(("normal_", "uniform_")):  # torch.nn.init's too
            return func(*args, **given)
        return (args[0] if args else given["tensor"]).detach().zero_()


def with_random_weights(node: Any, layers: int = 0, recompute: bool = True) -> Any:
    """A tree whose ``from_pretrained`` are ``from_config``, with stacks of at most so many layers."""
    from umm_zoo.experiment.targets import find_target

    if isinstance(node, list):
        return [with_random_weights(value, layers, recompute) for value in node]
    if not isinstance(node, dict):
        return node
    made = {key: with_random_weights(value, layers, recompute) for key, value in node.items()}
    if layers:
        made |= {key: min(made[key], layers) for key in _DEPTHS if isinstance(made.get(key), int)}
        made |= {key: min(made[key], _WORDS - (key != "vocab_size")) for key in ("vocab_size", "image_token_index") if key in made}
        if "depth" in made and "out_hidden_size" in made:  # Qwen's tower: the last of few layers sees the whole image
            made["fullatt_block_indexes"] = [made["depth"] - 1]
    if not recompute and "gradient_checkpointing" in made:
        made["gradient_checkpointing"] = False
    name, _, maker = str(made.get("_target_", "")).rpartition(".")
    if maker == "from_pretrained":
        made["_target_"] = f"{name}.from_config"
        known = inspect.signature(find_target(made["_target_"]).call).parameters
        made = {key: value for key, value in made.items() if key == "_target_" or key in known}
    elif maker == "from_parts":
        made |= {"vision_tower": made["config"].pop("vision_config"), "language_model": made["config"].pop("text_config")}
    return made


def rows(count: int, side: int, kind: str, words: int = 64) -> Any:
    """Random images and ``words``: ``bridge`` rows (every second reconstructs, the others draw), ``ross`` rows, or ``images``."""
    from umm_zoo.batch import Batch, Conversation, Task

    text = " ".join(["red", "blue", "green", "large", "small", "left", "right", "circle"][number % 8] for number in range(words))
    images = list(torch.rand(count, 3, side, side) * 2 - 1)
    keys = [str(row) for row in range(count)]
    if kind == "images":
        return Batch(keys, [[]] * count, images, [1] * count)
    if kind == "ross":
        turns: Conversation = [{"role": "user", "text": "<image>\nWhat is in it?"}, {"role": "assistant", "text": text}]
        return Batch(keys, [turns] * count, images, [1] * count)
    seen = [row % 2 for row in range(count)]
    asked: list[Conversation] = [[{"role": "user", "text": "<image>\n" if own else text}] for own in seen]
    tasks = [Task.RECONSTRUCT if own else Task.TEXT_TO_IMAGE for own in seen]
    inputs = [image for image, own in zip(images, seen, strict=True) if own]
    return Batch(keys, asked, inputs, seen, targets=list(images), tasks=tasks)


def training_step(method: Any, batch: Any, device: str, steps: int, precision: str = "bf16-mixed", counts: bool = True) -> Numbers:
    """A training step under autocast: seconds (the first is not timed; for 0 ``steps`` it is the only one), memory, operations."""
    before = base.memory_from_here(device)
    configured = method.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]

    def step() -> None:
        moved = batch.to(device)
        with torch.autocast(device.partition(":")[0], torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            loss = method.training_losses(moved)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if not steps:
        began = base.processor_time(device)
        counted = base.gflop(step)
        return {"seconds": base.processor_time(device) - began, "memory": base.held(device) - before, "gflop": counted}
    seconds, most = base.timed(step, steps, device, warmup=1), base.held(device)
    numbers = {"seconds": seconds, "memory": most if device.startswith("cuda") else most - before}
    return {**numbers, "gflop": base.gflop(step)} if counts else numbers
