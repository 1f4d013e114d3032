"""Rows of interleaved reasoning in their six modes, and the loop that thinks, generates, reflects and generates again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, cast, get_args

import torch

from umm_zoo.backbones.answers import AnswersInTokens, Writer
from umm_zoo.backbones.thoughts import Reflects, Thinks, Thought
from umm_zoo.batch import Batch, Task
from umm_zoo.conversation import Trajectory
from umm_zoo.errors import UserError, Weight
from umm_zoo.methods.reasoning import Reasoner, Refine, told, words_of
from umm_zoo.methods.requests import row_seeds
from umm_zoo.outputs import Outputs, Sampling

#: Modes of a trajectory: which half of it a row is of, and what it trains.
MODES: tuple[Trajectory, ...] = get_args(Trajectory)


class ThinksAndReflects(Thinks, Reflects, Protocol):
    """A method that does both."""


def modes_of(batch: Batch) -> list[Trajectory]:
    """The mode of each row, by what it has: an input image (improving), an answer in words, an image to generate.

    Raises:
        UserError: a row has neither answer nor image to generate, or several input images.
    """
    found: list[Trajectory] = []
    for row, (answer, wanted, count) in enumerate(zip(batch.answers(), batch.has_target, batch.image_counts, strict=True)):
        if count > 1 or not (answer or wanted):
            what = f"{count} input images" if count > 1 else "neither an answer nor an image to generate"
            raise UserError("", what, "a row of a trajectory: at most one input image, and something to learn", row=row)
        what = "full" if answer and wanted else "understanding" if answer else "generation"
        found.append(MODES[("understanding", "generation", "full").index(what) + 3 * count])
    return found


class Interleaving:
    """What is written before images, and the modes of rows that teach it.

    A row is of one of six modes: ``initial`` (no image yet) or ``improving`` (with the first image as a condition, never as a
    target), each for ``understanding`` (the text alone is trained), ``generation`` (the image alone, from a given text) or
    ``full`` (both). IRG's first stage mixes ``full`` to the other two as 1 : .5 : .5, its second takes ``full`` alone; those are
    shares of the data, for the sources of an experiment to state.

    Reference: "Interleaving Reasoning for Better Text-to-Image Generation" (IRG, arXiv 2509.06945) and its released code.

    Args:
        reasoner: writes before an image that is generated from words; None: nothing is written.
        reflector: writes between an image and its improvement; None: none is improved.
        modes: weight of the losses of each mode's rows, where rows of others are refused; None: rows of any kind, 1 each.
        rounds: of reflection behind the first image, in validation; None is the first image alone.

    Raises:
        ValueError: an unknown mode, or none.
        UserError: rounds without a reflector.
    """

    def __init__(
        self,
        reasoner: Reasoner | None = None,
        reflector: Reasoner | None = None,
        modes: dict[str, Weight] | None = None,
        rounds: Refine | None = None,
    ) -> None:
        if modes is not None and (not modes or set(modes) - set(MODES)):
            raise ValueError(f"modes: found {sorted(modes)}, expected some of {', '.join(MODES)}")
        if rounds is not None and reflector is None:
            raise UserError("rounds", "some, without a reflector", "a Reasoner that reflects")
        self.reasoner, self.reflector, self.rounds = reasoner, reflector, rounds
        self.modes = None if modes is None else dict(modes)

    @property
    def refuses(self) -> frozenset[str]:
        """Commands that nobody writes for."""
        return frozenset(name for name, own in {"think": self.reasoner, "refine": self.reflector}.items() if own is None)

    def think(self, writer: Writer, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """See ``Thinks``.

        Raises:
            UserError: there is no reasoner.
        """
        return _one(self.reasoner, "reasoner", "before an image is generated")(writer, batch, seeds)

    def reflect(self, writer: Writer, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """See ``Reflects``.

        Raises:
            UserError: there is no reflector.
        """
        return _one(self.reflector, "reflector", "between an image and its improvement")(writer, batch, seeds)

    def weights(self, batch: Batch) -> list[float]:
        """Of the losses of each row."""
        return [1.0] * len(batch) if self.modes is None else [self.modes[mode] for mode in modes_of(batch)]

    def check_rows(self, batch: Batch) -> None:
        """Refuse rows of a mode that has no weight here.

        Raises:
            UserError: names the row.
        """
        for row, mode in enumerate(modes_of(batch) if self.modes is not None else []):
            if mode not in (self.modes or ()):
                raise UserError("", f"a row of the mode {mode}", f"one of {', '.join(self.modes or ())}", row=row)

    @property
    def makes(self) -> tuple[str, ...]:
        """Of outputs, those of ``fill`` that nobody else makes."""
        return ("ended", "marked", "columns") if self.reasoner or self.reflector else ()

    def writes_before(self, batch: Batch) -> bool:
        """Whether rows of one kind have answers in whose place something is written here."""
        writer = self.reflector if batch.images else self.reasoner
        return writer is not None and all(batch.answers()) and max(batch.image_counts) <= 1

    def fill(self, outputs: Outputs, method: ThinksAndReflects, batch: Batch) -> None:
        """Outputs of rows that ask for images of one size, all with an image or all without.

        ``answers``, what was written; ``generated``. Of a row with an image it is reflected, and the image generated again so (left
        as it is where nothing is to change); of a row without, it is thought, generated, and refined in as many rounds as there
        are; ``ended`` is the share of rows in which nothing was left to do, ``marked`` that of thoughts with their marker.
        """
        seeds, (height, width), texts = row_seeds(batch), batch.requested[0].shape[-2:], [""] * len(batch)
        device = batch.requested[0].device
        sampling, rounds = Sampling(size=(height, width)), Refine() if batch.images else self.rounds
        first, thoughts = list(batch.images), list[Thought]()
        if not batch.images:
            thoughts = method.think(batch, seeds)
            texts = [thought.text for thought in thoughts]
            first = method.generate(told(batch, thoughts), seeds, sampling)
        outputs.answers, outputs.generated = texts, first
        ended = [0.0] * len(batch)
        if rounds is not None:
            shown = replace(batch, images=first, image_counts=[1] * len(batch), tasks=[Task.EDIT] * len(batch))
            done = rounds(method, told(shown, [Thought("", words) for words in words_of(batch)]), seeds, sampling)
            last = [[own.image for own in one if own.image is not None] for one in done]
            outputs.generated = [own[-1] if own else image for own, image in zip(last, first, strict=True)]
            said = zip(texts, done, strict=True)
            outputs.answers = ["\n".join(part for part in (text, *(own.thought.text for own in one)) if part) for text, one in said]
            ended = [float(one[-1].thought.ends) for one in done]
            thoughts += [own.thought for one in done for own in one]
        outputs.scalars["ended"] = torch.tensor(ended, device=device).mean()
        outputs.scalars["marked"] = torch.tensor([float(thought.marked) for thought in thoughts], device=device).mean()
        outputs.counts["marked"] = float(len(thoughts))
        outputs.columns = {"first": first, "last": outputs.generated, "true": batch.requested}


class Interleaves:
    """Mixin of methods with an ``Interleaving``: the capabilities ``Thinks`` and ``Reflects``, but for ``generate``.

    Attributes:
        reasoning: what is written.
    """

    reasoning: Interleaving

    @property
    def writer(self) -> Writer:
        """Who writes: the method, where it says nothing else."""
        return cast(AnswersInTokens, self)

    @property
    def refuses(self) -> frozenset[str]:
        """Commands that nothing is written for."""
        return self.reasoning.refuses

    def think(self, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """See ``Thinks``: about rows without an image."""
        return self.reasoning.think(self.writer, batch, seeds)

    def reflect(self, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """See ``Reflects``: about rows with one."""
        return self.reasoning.reflect(self.writer, batch, seeds)


def _one(reasoner: Reasoner | None, name: str, when: str) -> Reasoner:
    if reasoner is None:
        raise UserError(f"method.reasoning.{name}", "none", f"a Reasoner, which writes {when}")
    return reasoner
