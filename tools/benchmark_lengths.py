"""``python tools/benchmark_lengths.py``: useful tokens per second of LLaVA's training with buckets of like lengths, and without.

The rows are LLaVA's: an image, a question, an answer of 1 to ``--longest`` tokens, most of them short (``--spread log``) or as
many of each length (``--spread even``). Answers are words of which each has two that may follow, so that there is something to
learn. Two models of the same weights see the same rows, as often, in as many steps of as many micro-batches (``--accumulate``): one
in batches of any rows (``data.bucketing`` None), one in micro-batches of one class of lengths (``ByLength``, with a
``data.bucket_size`` of a micro-batch). They take turns, a block of steps each, and are timed in processor time, or on the clock of
a GPU. The loss is that of rows which neither has trained on, some times on the way.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from data_pipelines.shards.bucketing import ByLength
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.writing import write_shards
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.batch import Batch
from umm_zoo.methods.llava import LLaVA
from umm_zoo.outputs import TokenCount, add_counts
from umm_zoo.release.card import markdown_table
from umm_zoo.training.report import circumstances

#: One token each, in the shipped tokenizer.
WORDS = (" the", " a", " is", " of", " and", " red", " blue", " green", " circle", " square", " left", " right")
ARMS = ("None", "ByLength")
LOOKS = 8


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


def method(width: int, layers: int, longest: int) -> LLaVA:
    """A small LLaVA, always of the same weights."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": width // 16, "num_hidden_layers": layers}
    text = {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, **heads}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **tower, "image_size": 8, "patch_size": 4}
    vlm = LlavaBackbone.from_config({"vision_config": vision, "text_config": text}, max_length=longest + 64)
    made = LLaVA(vlm)
    made.train_only(["projector", "language_model"])
    return made.train()


class Arm:
    """One of the two trainings, and what it took."""

    def __init__(self, folder: Path, bucketed: bool, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.method = method(options.width, options.layers, options.longest).to(self.device)
        self.micro_batches, size = options.accumulate, options.batch // options.accumulate
        buckets = {"bucketing": ByLength(), "bucket_size": size} if bucketed else {}
        data = ShardData({"rows": ShardSource(str(folder))}, image_size=8, batch_size=options.batch, **buckets)
        rows = [list(range(first, first + size)) for first in range(0, options.batch, size)]
        self.steps = ([batch.select(own) for own in rows] for batch in data.train_dataloader())
        parameters = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=options.lr)
        self.seconds, self.counts, self.losses = 0.0, dict[str, TokenCount](), list[float]()

    def run(self, steps: int, timed: bool = True) -> None:
        """Some steps."""
        began = self._now()
        for _ in range(steps):
            batches = [batch.to(self.device) for batch in next(self.steps)]
            self.optimizer.zero_grad()
            units = self.method.begin_step(batches) if len(batches) > 1 else None
            self.method.step.begin(len(batches), units, self.device)
            for batch in batches:
                with self.method.step.training():
                    (self.method.training_losses(batch)["loss"] / len(batches)).backward()
                if timed:
                    self.counts = add_counts(self.counts, self.method.token_counts or {})
            self.optimizer.step()
        self.seconds += (self._now() - began) * timed

    def look(self, batches: list[Batch]) -> None:
        """The mean loss of a token of rows that were not trained on."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                output = self.method.vlm(self.method.vlm.inputs_of(batch.to(self.device)))
                total, tokens = total + float(output.nll.sum()), tokens + int(output.num_tokens.sum())
        self.losses.append(total / tokens)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    @property
    def tokens(self) -> tuple[int, int]:
        """Useful and computed ones."""
        return sum(int(own.useful) for own in self.counts.values()), sum(int(own.computed) for own in self.counts.values())

    @property
    def rate(self) -> float:
        """Useful tokens per second."""
        return self.tokens[0] / self.seconds


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Arm]:
    """Both trainings, in turns."""
    held_out = write_shards(rows(64, options.longest, options.spread, seed=1), folder / "val", "rows", 64).shards
    write_shards(rows(options.rows, options.longest, options.spread, seed=0), folder / "train", "rows", -(-options.rows // 4))
    val = ShardData(val={"rows": ShardSource([str(path) for path in held_out])}, image_size=8, batch_size=8, val_batch_size=8)
    looked_at: list[Any] = list(val.val_dataloader())
    arms = {name: Arm(folder / "train", name != "None", options) for name in ARMS}
    steps = options.epochs * options.rows // options.batch
    blocks = np.array_split(np.arange(steps), max(LOOKS, steps // options.block))
    looks = {len(blocks) * (number + 1) // LOOKS - 1 for number in range(LOOKS)}
    for number, block in enumerate(blocks):
        for arm in list(arms.values())[:: 1 if number % 2 == 0 else -1]:
            arm.run(len(block), timed=number > 0)  # the first block warms up
            if number in looks:
                arm.look(looked_at)
    return arms


def table(arms: dict[str, Arm]) -> str:
    """What both took, and their losses."""
    head = ["bucketing", "useful tokens", "of those computed", "useful tokens/s", *[f"loss {n + 1}/{LOOKS}" for n in range(LOOKS)]]
    lines = []
    for name, arm in arms.items():
        useful, computed = arm.tokens
        numbers = [f"{useful:,}", f"{useful / computed:.1%}", f"{arm.rate:,.0f}"]
        lines.append([name, *numbers, *[f"{loss:.3f}" for loss in arm.losses]])
    ratio = arms["ByLength"].rate / arms["None"].rate
    return "\n".join([*markdown_table(head, lines), f"with buckets {ratio:.2f} times as many useful tokens per second"])


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 1024, "epochs": 2, "batch": 32, "accumulate": 2, "longest": 400, "width": 64, "layers": 2, "block": 8}
    for name, default in sizes.items():
        made.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    made.add_argument("--spread", choices=("log", "even"), default="log", help="of the lengths of answers")
    made.add_argument("--lr", type=float, default=3e-3)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    return made


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    options = parser().parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(Path(folder), options)))
    where = circumstances()
    print(f"machine {where['machine']}, commit {where['commit']}, load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
