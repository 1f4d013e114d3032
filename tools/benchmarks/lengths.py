"""Training on rows of unequal lengths: micro-batches of like lengths, and packed rows, against padded batches, by the useful token.

The rows are LLaVA's: an image, a question, an answer of 1 to ``longest`` tokens, most of them short (``log``) or as many of each
length (``even``). Answers are words of which each has two that may follow, so that there is something to learn. Models of the
same weights see the same rows, as often, in as many steps of as many micro-batches (``accumulate``): ``any rows`` in batches of any
rows (``data.bucketing`` None), ``packed`` in the same batches without their padding (``method.packing``), ``like lengths`` in
micro-batches of one class of lengths (``ByLength``, ``data.bucket_size`` a micro-batch). The losses are those of rows which
none has trained on, some times on the way.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tools.benchmarks import base
from tools.benchmarks.base import Numbers, Options

UNIT, OWN = "useful token", ("like lengths", "any rows", "packed")
#: ``rows`` in ``epochs`` of steps of ``batch``; the first ``block`` steps are not timed.
SIZES: dict[str, Any] = {
    "rows": 512,
    "epochs": 4,
    "batch": 32,
    "accumulate": 2,
    "longest": 400,
    "width": 64,
    "layers": 2,
    "block": 8,
}
SIZES |= {"looks": 4, "lr": 3e-3}
SMALLEST = {"rows": 32, "epochs": 1, "batch": 4, "longest": 100, "width": 16, "layers": 1, "block": 1, "looks": 2}
#: One token each, in the shipped tokenizer.
WORDS = (" the", " a", " is", " of", " and", " red", " blue", " green", " circle", " square", " left", " right")


def cases(options: Options) -> list[tuple[str, str]]:
    """How lengths are spread."""
    return [(spread, arm) for spread in ("log", "even") for arm in OWN]


def missing(options: Options, arm: str) -> str:
    """Nothing is needed."""
    return ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """Seconds of a useful token of one training, the share of useful ones, and its losses."""
    from data_pipelines.shards.data import ShardData, ShardSource
    from umm_zoo.outputs import TokenCount, add_counts

    train, held_out = shards(options, setting)
    method, looked_at = build(options, packing=arm == "packed"), list(held_out.val_dataloader())
    size = options.batch // options.accumulate
    data = ShardData({"rows": ShardSource(train)}, image_size=8, batch_size=options.batch, **buckets(arm, size))
    steps = iter(data.train_dataloader())
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr)
    total = options.epochs * options.rows // options.batch
    looks = {total * (number + 1) // options.looks - 1 for number in range(options.looks)}
    seconds, counts, losses = 0.0, dict[str, TokenCount](), list[float]()
    for number in range(total):
        began = base.processor_time(options.device)
        whole = next(steps)
        batches = [whole.select(list(range(first, first + size))).to(options.device) for first in range(0, options.batch, size)]
        optimizer.zero_grad()
        units = method.begin_step(batches) if len(batches) > 1 else None
        method.step.begin(len(batches), units, torch.device(options.device))
        for batch in batches:
            with method.step.training():
                (method.training_losses(batch)["loss"] / len(batches)).backward()
            if number >= options.block:
                counts = add_counts(counts, method.token_counts or {})
        optimizer.step()
        if number >= options.block:
            seconds += base.processor_time(options.device) - began
        if number in looks:
            losses.append(held_out_loss(method, looked_at, options.device))
    useful, computed = (sum(int(getattr(own, kind)) for own in counts.values()) for kind in ("useful", "computed"))
    numbers = {"seconds": seconds / useful, "useful of computed": useful / computed}
    return {**numbers, **{f"loss {number}": loss for number, loss in zip(count(1), losses, strict=False)}}


def buckets(arm: str, size: int) -> dict[str, Any]:
    """Of the data."""
    from data_pipelines.shards.bucketing import ByLength

    return {"bucketing": ByLength(), "bucket_size": size} if arm == "like lengths" else {}


def shards(options: Options, spread: str) -> tuple[str, Any]:
    """The training rows' folder, and data of the rows that are only looked at."""
    from data_pipelines.shards.data import ShardData, ShardSource
    from data_pipelines.shards.writing import write_shards

    folder = Path(options.folder) / f"lengths-{spread}-{options.rows}-{options.longest}"
    if not folder.exists():
        write_shards(rows(64, options.longest, spread, seed=1), folder / "val", "rows", 64)
        write_shards(rows(options.rows, options.longest, spread, seed=0), folder / "train", "rows", -(-options.rows // 4))
    return str(folder / "train"), ShardData(
        val={"rows": ShardSource(str(folder / "val"))}, image_size=8, batch_size=8, val_batch_size=8
    )


def held_out_loss(method: Any, batches: list[Any], device: str) -> float:
    """The mean loss of a token of rows that were not trained on."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            output = method.vlm(method.vlm.inputs_of(batch.to(device)))
            total, tokens = total + float(output.nll.sum()), tokens + int(output.num_tokens.sum())
    return total / tokens


def rows(count: int, longest: int, spread: str, seed: int) -> Iterator[dict[str, Any]]:
    """Samples as ``write_shards`` takes them; the length of an answer counts its words, not its end."""
    rng = np.random.default_rng(seed)
    follow = np.random.default_rng(0).permuted(np.tile(np.arange(len(WORDS)), (len(WORDS), 1)), axis=1)[:, :2]
    for number, part in enumerate(rng.permutation(count)):
        place = (part + rng.random()) / count  # every part of the lengths has its share
        length = round(longest**place) if spread == "log" else math.ceil(longest * place)
        word, words = int(rng.integers(len(WORDS))), []
        for _ in range(length):
            words.append(WORDS[word])
            word = int(follow[word, rng.integers(2)])
        turns = [{"role": "user", "text": "<image>\nWhat is it?"}, {"role": "assistant", "text": "".join(words).strip()}]
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        yield {"__key__": f"s{number:06d}", "0.png": file.getvalue(), "json": {"conversations": turns}}


def build(options: Options, packing: bool = False) -> Any:
    """A small LLaVA, always of the same weights."""
    from umm_zoo.backbones.llava import LlavaBackbone
    from umm_zoo.methods.llava import LLaVA

    torch.manual_seed(0)
    width = options.width
    heads = {"num_attention_heads": width // 16, "num_hidden_layers": options.layers}
    text = {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, **heads}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **tower, "image_size": 8, "patch_size": 4}
    vlm = LlavaBackbone.from_config({"vision_config": vision, "text_config": text}, max_length=options.longest + 64)
    made = LLaVA(vlm, packing)
    made.train_only(["projector", "language_model"])
    return made.to(options.device).train()
