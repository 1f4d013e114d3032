"""A thinker in sizes that run in milliseconds, and a model that writes what it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import uae_parts

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.thoughts import Thought
from umm_zoo.batch import Batch
from umm_zoo.methods.reasoning import Reasoner
from umm_zoo.methods.think_then_generate import ThinkThenGenerate
from umm_zoo.methods.uae.readers import RewriteReader

REASONER = Reasoner(max_new_tokens=5)


class Says(Reasoner):
    """Writes the given text about every row."""

    def __init__(self, text: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.text = text

    def __call__(self, vlm: LibraryVLM, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        return self.thoughts(batch, [self.text] * len(batch))


def prompts(*texts: str, targets: bool = True) -> Batch:
    """Rows that ask for images of texts."""
    rows = [[{"role": "user", "text": text}] for text in texts]
    wanted = list(uae_parts.images(len(texts))) if targets else []
    return Batch([f"row{i}" for i in range(len(texts))], rows, targets=wanted)  # type: ignore[arg-type]


def answers(*pairs: tuple[str, str]) -> Batch:
    """Rows of a question and an answer."""
    rows = [[{"role": "user", "text": one}, {"role": "assistant", "text": other}] for one, other in pairs]
    return Batch([f"answer{i}" for i in range(len(pairs))], rows)  # type: ignore[arg-type]


def thinker(trained: Sequence[str] = ("adapter", "connector", "decoder"), **arguments: Any) -> ThinkThenGenerate:
    settings: dict[str, Any] = {"reasoner": REASONER, "adapter": LoRA(rank=2, alpha=4.0), "drop_prompt": 0.0, **arguments}
    method = ThinkThenGenerate(uae_parts.vlm(), uae_parts.renderer(reader=RewriteReader()), **settings)
    method.train_only(list(trained))
    return method
