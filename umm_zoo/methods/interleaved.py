"""Interleaved reasoning: thinking, a first image, reflection, a second image; trained in six modes on a bridge."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.thoughts import Thought
from umm_zoo.batch import Batch, Task
from umm_zoo.conversation import Trajectory
from umm_zoo.errors import UserError, Weight
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.reasoning import Reasoner, Refine, told, words_of
from umm_zoo.methods.requests import no_answer, row_seeds
from umm_zoo.outputs import Outputs, Sampling, in_groups

#: Modes of a trajectory: which half of it a row is of, and what it trains.
MODES: tuple[Trajectory, ...] = get_args(Trajectory)


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


class InterleavedTuning(AnswersWithVLM, Method):
    """Method that thinks in words, generates, says what the image lacks, and generates again; on a bridge that generates and edits.

    A row is of one of six modes: ``initial`` (no image yet) or ``improving`` (with the first image as a condition, never as a
    target), each for ``understanding`` (the text alone is trained), ``generation`` (the image alone, from a given text) or
    ``full`` (both). The text is trained by next-token prediction, the image by the bridge's own loss, from the prompt with the text
    behind it. IRG's first stage mixes ``full`` to the other two as 1 : .5 : .5, its second takes ``full`` alone; those are shares
    of the data, for the sources of an experiment to state.

    In IRG both are one network (BAGEL) and learn together. Here the words are an ``adapter``'s of the bridge's language model, and
    the bridge encodes requests without it, so that neither loss reaches the other's parts.

    Reference: "Interleaving Reasoning for Better Text-to-Image Generation" (arXiv 2509.06945) and its released code.

    Args:
        bridge: built or, as ``umm_zoo.methods.wemmu.WeMMU.load`` with ``source: runs/...``, loaded.
        adapter: of its language model.
        reasoner, reflector: write before the first image and between the two; all of a text goes with the prompt.
        modes: weight of the losses of each mode's rows; None is 1 each. Rows of others are refused.
        rounds: of reflection behind the first image, in validation; None is the first image alone.

    Raises:
        ValueError: an unknown mode, or none; a language model that does not answer token by token.
    """

    takes_mixed = True

    def __init__(
        self,
        bridge: Bridge,
        adapter: LoRA,
        reasoner: Reasoner,
        reflector: Reasoner,
        modes: dict[str, Weight] | None = None,
        rounds: Refine | None = None,
    ) -> None:
        super().__init__()
        chosen = dict.fromkeys(MODES, 1.0) if modes is None else dict(modes)
        if not chosen or set(chosen) - set(MODES):
            raise ValueError(f"modes: found {sorted(chosen)}, expected some of {', '.join(MODES)}")
        self.bridge, self.adapter, self.modes = bridge, adapter, chosen
        self.reasoner, self.reflector, self.rounds = reasoner, reflector, rounds
        if not isinstance(bridge.vlm, LibraryVLM):
            raise ValueError(
                f"bridge.vlm: found a {type(bridge.vlm).__name__}, expected one that answers token by token (LibraryVLM)"
            )
        self.vlm: LibraryVLM = bridge.vlm
        adapter.attach(bridge.vlm.parts()["language_model"])

    def parts(self) -> dict[str, nn.Module]:
        """Those of the bridge, and ``adapter``."""
        return {**self.bridge.parts(), "adapter": self.adapter}

    def check_trained(self, trained: Sequence[str]) -> None:
        """The vision-language model itself is frozen for good."""
        self.bridge.check_trained([name for name in trained if name != "adapter"])

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows of a mode that has no weight here, or whose text nothing trained learns."""
        if scoring:
            return
        for row, mode in enumerate(modes_of(batch)):
            if mode not in self.modes:
                raise UserError("", f"a row of the mode {mode}", f"one of {', '.join(self.modes)}", row=row)

    # -- training ------------------------------------------------------------------------------------------------------------

    def units(self, batch: Batch) -> dict[str, float]:
        """Answer ``tokens``; ``rows`` are those that ask for an image, of which the bridge's loss is a mean."""
        words = [row for row, answer in enumerate(batch.answers()) if answer]
        return {"tokens": self.vlm.count_labels(batch.select(words)) if words else 0, "rows": sum(batch.has_target)}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``text_loss``, ``image_loss`` and their sum ``loss``: means over answer tokens and images, weighed by the rows' modes."""
        texts = self._text_losses(self._by_weight(batch, [bool(text) for text in batch.answers()]))
        images = self._image_losses(self._by_weight(batch, batch.has_target))
        text = _mean(texts) * self.share("tokens", sum(count for _, _, count in texts))
        image = _mean(images) * self.share("rows", sum(count for _, _, count in images))
        return {"loss": text + image, "text_loss": text, "image_loss": image}

    def _by_weight(self, batch: Batch, chosen: Sequence[bool]) -> list[tuple[float, Batch]]:
        """The chosen rows by the weight of their mode."""
        weights = [self.modes[mode] if own else None for mode, own in zip(modes_of(batch), chosen, strict=True)]
        groups = [(weight, [row for row, own in enumerate(weights) if own == weight]) for weight in dict.fromkeys(weights)]
        return [(weight, batch.select(rows)) for weight, rows in groups if weight is not None]

    def _text_losses(self, groups: list[tuple[float, Batch]]) -> list[tuple[float, Tensor, float]]:
        """Weight, mean loss and answer tokens of each group; of none, for other ranks wait for gradients, an empty one."""
        found = []
        for weight, rows in groups or [(0.0, no_answer())]:
            output = self.vlm(self.vlm.inputs_of(rows))
            found.append((weight, output.loss, float(output.num_tokens.sum())))
        return found

    def _image_losses(self, groups: list[tuple[float, Batch]]) -> list[tuple[float, Tensor, float]]:
        """Weight, mean loss and number of images of each group; of none a blank one that counts nothing."""
        found: list[tuple[float, Tensor, float]] = []
        with self.adapter.disabled():
            for weight, rows in groups or [(0.0, self._nothing())]:
                own = self.bridge.training_losses(self._asked_with_text(rows))
                found.append((weight, own["loss"], float(len(rows) if groups else 0)))
        return found

    def _asked_with_text(self, batch: Batch) -> Batch:
        """Rows that ask for images, with their answers behind the words of the prompt."""
        texts = batch.answers()
        thoughts = [
            self._writer(batch, row).thought(words, text) if text else Thought("", words)
            for row, (words, text) in enumerate(zip(words_of(batch), texts, strict=True))
        ]
        return told(batch, thoughts)

    def _writer(self, batch: Batch, row: int) -> Reasoner:
        return self.reflector if batch.image_counts[row] else self.reasoner

    def _nothing(self) -> Batch:
        """A row without content, where no row asks for an image."""
        size = self.bridge.image_size
        blank = torch.zeros(3, size, size, device=self.device)
        return Batch(["nothing"], [[{"role": "user", "text": ""}]], targets=[blank], tasks=[Task.UNCONDITIONAL])

    # -- use -----------------------------------------------------------------------------------------------------------------

    def think(self, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """See ``Thinks``: about rows without an image."""
        return self.reasoner(self.vlm, batch, seeds)

    def reflect(self, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """See ``Reflects``: about rows with one."""
        return self.reflector(self.vlm, batch, seeds)

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """The bridge's; see ``outputs.Draws``."""
        with self.adapter.disabled():
            return self.bridge.generate(batch, seeds, sampling)

    # -- validation ----------------------------------------------------------------------------------------------------------

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return {"generated", "answers", "nll", "num_tokens", "ended", "columns"}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs for metrics, of rows of one kind.

        Rows that ask for an image: ``answers``, what was written; ``generated``. Of a row with an image it is reflected, and the
        image generated again so (left as it is where nothing is to change); of a row without, it is thought, generated, and refined
        in as many rounds as there are; ``ended`` is the share of rows in which nothing was left to do. Rows that ask for words:
        greedy ``answers``, ``nll`` and ``num_tokens``.
        """
        if not batch.requested:
            output, longest = self.vlm(self.vlm.inputs_of(batch)), self.wanted.max_new_tokens
            answers = self.answer(batch, longest) if longest else [""] * len(batch)
            return Outputs(nll=output.nll, num_tokens=output.num_tokens, answers=answers)
        shapes = [(target.shape, count) for target, count in zip(batch.requested, batch.image_counts, strict=True)]
        return in_groups(lambda rows: self._images(rows, self.wanted.generates(batch_idx)), batch, shapes)

    def _images(self, batch: Batch, generates: bool) -> Outputs:
        """Outputs of rows that ask for images of one size, all with an image or all without."""
        seeds, (height, width) = row_seeds(batch), batch.requested[0].shape[-2:]
        sampling, rounds, texts = Sampling(size=(height, width)), Refine() if batch.images else self.rounds, [""] * len(batch)
        if not generates:
            return Outputs({"ended": torch.zeros((), device=self.device)}, {"ended": 0.0}, answers=texts)
        first = list(batch.images)
        if not batch.images:
            thoughts = self.think(batch, seeds)
            texts = [thought.text for thought in thoughts]
            first = self.generate(told(batch, thoughts), seeds, sampling)
        outputs = Outputs(answers=texts, generated=first, columns={"first": first})
        ended = [0.0] * len(batch)
        if rounds is not None:
            shown = replace(batch, images=first, image_counts=[1] * len(batch), tasks=[Task.EDIT] * len(batch))
            done = rounds(self, told(shown, [Thought("", words) for words in words_of(batch)]), seeds, sampling)
            last = [[own.image for own in one if own.image is not None] for one in done]
            outputs.generated = [own[-1] if own else image for own, image in zip(last, first, strict=True)]
            said = zip(texts, done, strict=True)
            outputs.answers = ["\n".join(part for part in (text, *(own.thought.text for own in one)) if part) for text, one in said]
            ended = [float(one[-1].thought.ends) for one in done]
        outputs.scalars["ended"] = torch.tensor(ended, device=self.device).mean()
        outputs.columns = {"first": first, "last": outputs.generated or first, "true": batch.requested}
        return outputs


def _mean(groups: list[tuple[float, Tensor, float]]) -> Tensor:
    """The mean over all that the groups count, each with its weight."""
    total = sum(count for _, _, count in groups)
    return torch.stack([weight * loss * (count / max(1.0, total)) for weight, loss, count in groups]).sum()
