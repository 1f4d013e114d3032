"""Grids of samples, saved at every validation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from umm_zoo.batch import IMAGE_MARKER, Batch, Task
from umm_zoo.callbacks.cards import Card, draw_cards
from umm_zoo.callbacks.logged import log_image
from umm_zoo.callbacks.metrics import MetricCallback
from umm_zoo.errors import Count
from umm_zoo.generation.tensors import to_pil
from umm_zoo.metrics.answers import same_answer
from umm_zoo.metrics.rows import RowMetric, kind_of
from umm_zoo.outputs import Outputs

#: Words of an answer that is still marked right or wrong (our choice: longer ones are texts).
LONGEST_JUDGED = 16


class SampleGrid(Callback):
    """Callback that saves fixed samples with images, question, answer and truth: ``<run folder>/samples/step-XXXXXX.png``.

    The samples are the first of each kind in turn, always the same ones, so that grids of two steps can be laid side by side;
    loggers that take images get them too. An answer is marked right or wrong by ``umm_zoo.metrics.answers.same_answer``, but not a
    caption or a text in free words. The images of a sample are ``Outputs.columns`` where the method makes them (such as original,
    round trip, reconstruction); otherwise its input images, the generated one and the target. What metrics say of a row alone
    (``RowMetric.of_rows``: UAE's likenesses) and its reward stand below. Small images are enlarged without smoothing. Rank 0
    saves its own samples.

    Args:
        num_samples: cards in a grid.
        image_size: side in pixels to which small images are enlarged (by a whole factor) and large ones shrunk; 192 is a
            multiple of 32, 48, 64 and 96.
        cards_per_row: cards beside each other, fewer where they would not fit.

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(self, num_samples: Count = 16, image_size: Count = 192, cards_per_row: Count = 4) -> None:
        for name, value in (("num_samples", num_samples), ("image_size", image_size), ("cards_per_row", cards_per_row)):
            if value < 1:
                raise ValueError(f"SampleGrid.{name}: found {value}, expected 1 or more")
        self.num_samples, self.image_size, self.cards_per_row = num_samples, image_size, cards_per_row
        self._cards: defaultdict[str, list[Card]] = defaultdict(list)  # by kind: a grid shows every kind however the set is sorted

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start over."""
        self._cards.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the rows that are still wanted."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        outputs = outputs if isinstance(outputs, Outputs) else Outputs()
        for row, meta in enumerate(batch.meta):
            kind = kind_of(meta)
            if len(self._cards[kind]) < self.num_samples:
                card = card_of(row, outputs, batch, title=kind)
                card.scores = list(_scores_of(row, outputs, trainer))
                self._cards[kind].append(card)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out and save."""
        cards = self._in_turn()
        if trainer.sanity_checking or not trainer.is_global_zero or not cards:
            return
        path = Path(trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_cards(cards, self.image_size, self.cards_per_row).save(path)
        for logger in trainer.loggers:
            log_image(logger, path, trainer.global_step)

    def _in_turn(self) -> list[Card]:
        turns = zip_longest(*(cards for _, cards in sorted(self._cards.items())))
        return [card for turn in turns for card in turn if card is not None][: self.num_samples]


def _scores_of(row: int, outputs: Outputs, trainer: Trainer) -> Iterator[str]:
    """A line for each metric that tells what a row is worth, and for its reward."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name, metric in callback.metrics.items() if isinstance(callback, MetricCallback) else ():
            if values := metric.of_rows.get(row) if isinstance(metric, RowMetric) else None:
                yield f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in values.items())
    if outputs.rewards is not None:
        yield f"reward: {float(outputs.rewards[row]):.3f}"


def card_of(row: int, outputs: Outputs, batch: Batch, title: str) -> Card:
    """One row of a batch and of what the method made of it, as a card."""
    question = next((turn["text"] for turn in reversed(batch.prompts()[row]) if turn["role"] == "user"), "")
    truth = batch.answers()[row]
    answer = None if outputs.answers is None else outputs.answers[row]
    answer = None if not answer and not truth else answer  # the row asks for an image
    right = same_answer(answer, truth) if answer is not None and truth else None
    caption = batch.tasks[row] is Task.CAPTION or batch.meta[row].get("task") == "caption"
    if (caption or len(truth.split()) > LONGEST_JUDGED) and ";" not in truth:
        right = None  # one of many that are true: another one is not wrong
    columns: dict[str, Tensor] = {name: column[row] for name, column in (outputs.columns or {}).items()}
    if not columns:
        images = batch.images_of(row)
        columns = {"input" if len(images) == 1 else f"input {i + 1}": image for i, image in enumerate(images)}
        if outputs.generated is not None:
            columns["generated"] = outputs.generated[row]
        if (references := outputs.references_of(batch)) is not None:
            columns["target"] = references[row]
    return Card(
        title=title,
        question=" ".join(question.replace(IMAGE_MARKER, " ").split()),
        answer=answer,
        truth=truth,
        right=right,
        images={name: to_pil(image) for name, image in columns.items()},
    )
