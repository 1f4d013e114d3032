"""Reasoning in words before an image is generated, and between two: the block that writes it, and the loop that refines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from umm_zoo.backbones.answers import Decoding, Writer, written_by
from umm_zoo.backbones.thoughts import Reflects, Thought
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Turn
from umm_zoo.conversation import user_text
from umm_zoo.errors import Count, UserError, Weight
from umm_zoo.outputs import Sampling

#: Marker before the rewritten prompt in Think-Then-Generate's release.
MARKER = "Revised Prompt:"


class Reasoner:
    """Text that a language model writes about a request before an image is generated, and what of it the image is generated from.

    In Think-Then-Generate the model explains first and then rewrites the prompt behind a marker, and only the rewrite is generated
    from. Where the marker is missing, or nothing stands behind it, the user's own prompt is taken, and ``Thought.marked`` says so;
    the release takes the whole output. In interleaved reasoning (IRG) all of the text goes with the prompt, in Bagel as a turn of
    the model's own behind it.

    Reference: "Think-Then-Generate" (arXiv 2601.10332) and its released code; "Interleaving Reasoning for Better Text-to-Image
    Generation" (arXiv 2509.06945).

    Args:
        prompt: what the model is asked, with the user's words in the place of ``{}``. (Its release puts a page of instructions
            before them; see ``experiments/t2g/paper``.)
        marker: before the rewrite; a line break behind it does not count. Empty: none is asked for.
        keep: ``rewrite``, what stands behind the marker; ``all``, the user's prompt and the whole text, a line each; ``turn``, the
            prompt and the whole text as a turn behind it, for a model that has read such rows (``Bagel``).
        missing: what is generated from where the marker is missing: the user's ``prompt``, or ``all`` that was written (release).
        max_new_tokens: longest text; 1,024 in the release, 1,000 in Bagel's and IRG's.
        temperature: 0, the likeliest text, in the release and in Bagel's; .3 in IRG's.
        stop: a text that says that nothing is left to do; empty: none does.
        system: instructions in a turn of their own before the request, while it is written and, with ``turn``, generated from.

    Raises:
        ValueError: a prompt without a place for the user's words, or a rewrite without a marker.
    """

    def __init__(
        self,
        prompt: str = "{}",
        marker: str = MARKER,
        keep: Literal["rewrite", "all", "turn"] = "rewrite",
        missing: Literal["prompt", "all"] = "prompt",
        max_new_tokens: Count = 1024,
        temperature: Weight = 0.0,
        stop: str = "",
        system: str = "",
    ) -> None:
        if prompt.count("{}") != 1:
            raise ValueError(f"Reasoner.prompt: found {prompt.count('{}')} places {{}}, expected one for the user's words")
        if keep == "rewrite" and not marker:
            raise ValueError("Reasoner.marker: found none, expected one where the rewrite is kept")
        self.prompt, self.marker, self.keep, self.missing = prompt, marker, keep, missing
        self.max_new_tokens, self.temperature, self.stop, self.system = max_new_tokens, temperature, stop, system

    def questions(self, batch: Batch) -> list[Conversation]:
        """What the model is asked about each row; the row's images stand first."""
        return [
            [*_instructions(self.system), Turn(role="user", text=_shown(batch, row) + self.prompt.replace("{}", words))]
            for row, words in enumerate(words_of(batch))
        ]

    def asked(self, batch: Batch) -> Batch:
        """The rows with these questions in the place of their words."""
        return replace(batch, conversations=self.questions(batch), ahead=None)

    def __call__(self, writer: Writer, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """A thought about each row, which depends on the row and its seed alone."""
        answers = written_by(writer, self.asked(batch), Decoding(self.max_new_tokens, self.temperature, seeds))
        return self.thoughts(batch, [answer.text for answer in answers])

    def thoughts(self, batch: Batch, texts: Sequence[str]) -> list[Thought]:
        """Texts as thoughts about the rows of a batch; several in a row about each where there are more texts than rows."""
        each = len(texts) // len(batch)
        words = [own for own in words_of(batch) for _ in range(each)]
        return [self.thought(own, text) for own, text in zip(words, texts, strict=True)]

    def thought(self, words: str, text: str) -> Thought:
        """What a text about the user's words amounts to."""
        rewrite = rewrite_in(text, self.marker) if self.marker else text
        ends = bool(self.stop) and self.stop.casefold().rstrip(".") in text.casefold()
        marked, kept = rewrite is not None, rewrite is not None or (self.missing == "all" and bool(text))
        if not kept or self.keep == "turn":
            system, reply = (self.system, text) if kept else ("", "")
            return Thought(text, words, marked, ends, system, reply)
        if rewrite is None:
            return Thought(text, text, False, ends)
        return Thought(text, rewrite if self.keep == "rewrite" else _joined(words, text), True, ends)


def rewrite_in(text: str, marker: str) -> str | None:
    """What stands behind a marker, the first one that ends its line, else the first; None where that is nothing."""
    for form in (f"{marker}\n", marker):
        _, found, rewrite = text.partition(form)
        if found:
            return rewrite.strip() or None
    return None


def words_of(batch: Batch) -> list[str]:
    """What the user of each row asks for, without markers for images."""
    return [user_text(prompt).replace(f"{IMAGE_MARKER}\n", "").replace(IMAGE_MARKER, "").strip() for prompt in batch.prompts()]


def told(batch: Batch, thoughts: Sequence[Thought]) -> Batch:
    """The rows with what is to be generated from in the place of their words; their images stay."""
    turns: list[Conversation] = [
        [
            *_instructions(thought.system),
            Turn(role="user", text=_shown(batch, row) + thought.request.replace(IMAGE_MARKER, "")),
            *([Turn(role="assistant", text=thought.reply)] if thought.reply else []),
        ]
        for row, thought in enumerate(thoughts)
    ]
    return replace(batch, conversations=turns, ahead=None)


def _instructions(system: str) -> Conversation:
    return [Turn(role="system", text=system)] if system else []


def _shown(batch: Batch, row: int) -> str:
    return f"{IMAGE_MARKER}\n" * batch.image_counts[row]


def _joined(words: str, text: str) -> str:
    return "\n".join(part for part in (words, text) if part)


@dataclass(frozen=True)
class Round:
    """One round of refinement: what was said of the image, and the image made of it; None where nothing was left to do."""

    thought: Thought
    image: Tensor | None


class Refine:
    """Rounds of reflection: what an image lacks is said, and the image is generated again, until nothing is left to do.

    Args:
        rounds: most of them.
    """

    def __init__(self, rounds: Count = 1) -> None:
        self.rounds = rounds

    def __call__(self, method: Reflects, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[list[Round]]:
        """The rounds of each row, each of which depends on the row and its seed alone.

        Args:
            method: reflects, and generates again.
            batch: rows of one image and the words that it should show.
            seeds: of each row.
            sampling: of the images.

        Raises:
            UserError: a row has another number of images.
        """
        for row, count in enumerate(batch.image_counts):
            if count != 1:
                raise UserError("", f"{count} input images", "one, to be refined", row=row)
        done: list[list[Round]] = [[] for _ in seeds]
        rows, own = list(range(len(batch))), batch
        for _ in range(self.rounds):
            if not rows:
                break
            chosen = [seeds[row] for row in rows]
            thoughts = method.reflect(own, chosen)
            going = [place for place, thought in enumerate(thoughts) if not thought.ends]
            asked = told(own, thoughts).select(going)
            images = method.generate(asked, [chosen[place] for place in going], sampling) if going else []
            made = dict(zip(going, images, strict=True))
            for place, thought in enumerate(thoughts):
                done[rows[place]].append(Round(thought, made.get(place)))
            rows, own = [rows[place] for place in going], replace(own.select(going), images=list(images))
        return done
