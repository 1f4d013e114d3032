"""Controls of what a text brings: reasoners about something else or nothing, and a choice in the place of a reflection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from umm_zoo.backbones.answers import Writer
from umm_zoo.backbones.thoughts import Reflects, Thinks, Thought
from umm_zoo.batch import Batch, Task, Turn
from umm_zoo.errors import UserError
from umm_zoo.methods.reasoning import Reasoner, Refine, Round, told, words_of
from umm_zoo.outputs import Sampling
from umm_zoo.rewards.base import Reward


class _Control(Reasoner):
    """Reasoner with the settings of another one, whose texts it may use."""

    def __init__(self, reasoner: Reasoner) -> None:
        super().__init__(
            prompt=reasoner.prompt,
            marker=reasoner.marker,
            keep=reasoner.keep,
            missing=reasoner.missing,
            max_new_tokens=reasoner.max_new_tokens,
            temperature=reasoner.temperature,
            stop=reasoner.stop,
            system=reasoner.system,
        )
        self.reasoner = reasoner


class OthersThoughts(_Control):
    """What is written about another row of the batch: row i gets the text of row i + 1. As long and as well put, and of no use.

    Args:
        reasoner: writes.

    Raises:
        UserError: a batch of one row, which has no other.
    """

    def __call__(self, writer: Writer, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """The texts moved on by one row; what is kept of each goes with the row's own words."""
        if len(batch) < 2:
            raise UserError("data.val_batch_size", "one row", "two or more, for OthersThoughts takes what is written about another")
        texts = [thought.text for thought in self.reasoner(writer, batch, seeds)]
        return self.thoughts(batch, [*texts[1:], texts[0]])


class WithoutFacts(_Control):
    """The user's own words with a filler behind them, as long as what the reasoner would keep: more to read, and nothing new.

    Args:
        reasoner: whose lengths are taken.
        filler: repeated.

    Raises:
        ValueError: it is empty.
    """

    def __init__(self, reasoner: Reasoner, filler: str = "; there is no fruit") -> None:
        if not filler:
            raise ValueError("WithoutFacts.filler: found none, expected a text to repeat")
        super().__init__(reasoner)
        self.filler = filler

    def __call__(self, writer: Writer, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """Of at least the length of what is kept, by at most a filler more."""
        kept, words = self.reasoner(writer, batch, seeds), words_of(batch)
        return [
            Thought(own, self._padded(own, len(thought.request + thought.reply))) for own, thought in zip(words, kept, strict=True)
        ]

    def _padded(self, words: str, length: int) -> str:
        return words + self.filler * max(1, -((len(words) - length) // len(self.filler)))


class Says(_Control):
    """The same text about every row; nothing is run.

    Args:
        reasoner: whose settings decide what is kept of it.
        text: as it stands.
    """

    def __init__(self, reasoner: Reasoner, text: str) -> None:
        super().__init__(reasoner)
        self.text = text

    def __call__(self, writer: Writer, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """It, once per row."""
        return self.thoughts(batch, [self.text] * len(batch))


class BestOfTwo(Refine):
    """A second first image in place of a reflection, and the better of the two: what chance and a choice bring at equal compute.

    Args:
        reward: of the choice, by which the second image must be better to be taken.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__(rounds=1)
        self.reward = reward

    def __call__(self, method: Reflects, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[list[Round]]:
        """A round of each row, with the second image where that is the better one.

        Raises:
            UserError: the method does not think.
        """
        if not isinstance(method, Thinks):
            raise UserError(
                "method.rounds", f"BestOfTwo with a {type(method).__name__}", "a method that thinks before it generates"
            )
        words, count, others = words_of(batch), len(batch), [seed + 1_000_003 for seed in seeds]
        again = replace(
            batch,
            conversations=[[Turn(role="user", text=own)] for own in words],
            images=[],
            image_counts=[0] * count,
            tasks=[Task.TEXT_TO_IMAGE] * count,
        )
        thoughts = method.think(again, others)
        images = method.generate(told(again, thoughts), others, sampling)
        scores = self.reward([image for pair in zip(batch.images, images, strict=True) for image in pair], batch).view(count, 2)
        better = (scores[:, 1] > scores[:, 0]).tolist()
        pairs = zip(thoughts, images, better, strict=True)
        return [[Round(thought, image if taken else None)] for thought, image, taken in pairs]
