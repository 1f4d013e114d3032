"""A thinker in sizes that run in milliseconds, and a model that writes what it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import uae_parts

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.thoughts import Thought
from umm_zoo.batch import Batch
from umm_zoo.methods.dual_grpo import DualGRPO
from umm_zoo.methods.dual_settings import ThoughtImages
from umm_zoo.methods.reasoning import Reasoner
from umm_zoo.methods.think_then_generate import ThinkThenGenerate
from umm_zoo.methods.uae.readers import RewriteReader
from umm_zoo.methods.uae.rollouts import Rollouts
from umm_zoo.objectives.advantages import GroupStandardised
from umm_zoo.objectives.flow_grpo import FlowGRPO
from umm_zoo.objectives.grpo import GRPO

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


def dual(trained: Sequence[str] = ("adapter", "decoder_adapter"), guidance: float = 2.0, **arguments: Any) -> DualGRPO:
    settings: dict[str, Any] = {
        "reasoner": Reasoner(max_new_tokens=5, temperature=1.0),
        "text_reward": uae_parts.Redness(),
        "image_reward": uae_parts.Redness(),
        "objective": GRPO(kl_weight=0.0),
        "image_objective": FlowGRPO(num_steps=3, clip=1e-2, advantage=GroupStandardised()),
        "adapter": LoRA(rank=2, alpha=4.0),
        "decoder_adapter": LoRA(rank=2, alpha=4.0, targets=["to_q", "to_k", "to_v", "to_out.0"]),
        "rollouts": Rollouts(2),
        "images": ThoughtImages(2),
        **arguments,
    }
    method = DualGRPO(uae_parts.vlm(), uae_parts.renderer(guidance, reader=RewriteReader()), **settings)
    method.train_only(list(trained))
    return method
