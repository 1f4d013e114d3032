"""A tiny Janus with its own image tokenizer, and batches of rows that read beside rows that generate."""

from __future__ import annotations

from typing import Any

import torch

from tests.backbones import janus_parts as backbone
from umm_zoo.batch import Batch
from umm_zoo.methods.janus import Janus
from umm_zoo.outputs import Wanted

PARTS = ["projector", "image_embeddings", "image_projector", "image_head", "language_model", "vision_tower"]
#: Of each row: images, answer, text to generate from.
ROWS: list[tuple[int, str | None, str | None]] = [
    (1, "red", None),
    (0, None, "a large blue square at the left"),
    (0, "blue " * 7, None),
    (0, None, "red"),
    (2, None, None),
    (0, None, "two small green circles"),
]


def method(trained: list[str] | None = None, form: Any = None, **arguments: Any) -> Janus:
    made = Janus(backbone.janus(unconditional=form), **arguments)
    made.train_only(PARTS if trained is None else trained)
    made.wanted = Wanted(max_new_tokens=3)
    return made.train()


def rows(chosen: list[tuple[int, str | None, str | None]] = ROWS, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int) -> list[torch.Tensor]:
        return list(torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1)

    conversations = []
    shown = noise(sum(images for images, _, _ in chosen))
    targets = iter(noise(sum(text is not None for _, _, text in chosen)))
    for images, answer, text in chosen:
        turns = [{"role": "user", "text": "<image>" * images + ("Which colour?" if text is None else text)}]
        conversations.append(turns + ([] if answer is None else [{"role": "assistant", "text": answer}]))
    return Batch(
        keys=[f"row{number}" for number in range(len(chosen))],
        conversations=conversations,  # type: ignore[arg-type]
        images=shown,
        image_counts=[images for images, _, _ in chosen],
        targets=[None if text is None else next(targets) for _, _, text in chosen],
    )
