"""Interleaved reasoning: thinking, a first image, reflection, a second image; trained in six modes on a bridge."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.answers import Writer
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.thoughts import Thought
from umm_zoo.batch import Batch, Task
from umm_zoo.errors import Weight
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.reasoning import Reasoner, Refine, told, words_of
from umm_zoo.methods.requests import no_answer
from umm_zoo.methods.trajectories import MODES, Interleaves, Interleaving
from umm_zoo.outputs import Outputs, Sampling, in_groups


class InterleavedTuning(Interleaves, AnswersWithVLM, Method):
    """Method that thinks in words, generates, says what the image lacks, and generates again; on a bridge that generates and edits.

    The text of the six modes of rows (``Interleaving``) is trained by next-token prediction, the image by the bridge's own loss,
    from the prompt with the text behind it.

    In IRG both are one network and learn together (``Bagel`` with an ``Interleaving``). Here the words are an ``adapter``'s of the
    bridge's language model, and the bridge encodes requests without it, so that neither loss reaches the other's parts.

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
        self.bridge, self.adapter, self.reasoner, self.reflector = bridge, adapter, reasoner, reflector
        every: dict[str, Weight] = dict.fromkeys(MODES, 1.0)
        self.reasoning = Interleaving(reasoner, reflector, every if modes is None else modes, rounds)
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
        if not scoring:
            self.reasoning.check_rows(batch)

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
        pairs = zip(self.reasoning.weights(batch), chosen, strict=True)
        weights = [weight if own else None for weight, own in pairs]
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
            (self.reflector if count else self.reasoner).thought(words, text) if text else Thought("", words)
            for words, text, count in zip(words_of(batch), texts, batch.image_counts, strict=True)
        ]
        return told(batch, thoughts)

    def _nothing(self) -> Batch:
        """A row without content, where no row asks for an image."""
        size = self.bridge.image_size
        blank = torch.zeros(3, size, size, device=self.device)
        return Batch(["nothing"], [[{"role": "user", "text": ""}]], targets=[blank], tasks=[Task.UNCONDITIONAL])

    # -- use -----------------------------------------------------------------------------------------------------------------

    @property
    def writer(self) -> Writer:
        """The language model with its adapter."""
        return self.vlm

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """The bridge's; see ``outputs.Draws``."""
        with self.adapter.disabled():
            return self.bridge.generate(batch, seeds, sampling)

    # -- validation ----------------------------------------------------------------------------------------------------------

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return {"generated", "answers", "nll", "num_tokens", "ended", "marked", "columns"}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs for metrics, of rows of one kind.

        Rows that ask for an image: see ``Interleaving.fill``. Rows that ask for words: greedy ``answers``, ``nll`` and
        ``num_tokens``.
        """
        if not batch.requested:
            output, longest = self.vlm(self.vlm.inputs_of(batch)), self.wanted.max_new_tokens
            answers = self.answer(batch, longest) if longest else [""] * len(batch)
            return Outputs(nll=output.nll, num_tokens=output.num_tokens, answers=answers)
        shapes = [(target.shape, count) for target, count in zip(batch.requested, batch.image_counts, strict=True)]
        generates = self.wanted.generates(batch_idx)
        return in_groups(lambda rows: self._images(rows, generates), batch, shapes)

    def _images(self, batch: Batch, generates: bool) -> Outputs:
        """Outputs of rows that ask for images of one size, all with an image or all without."""
        outputs = Outputs()
        if generates:
            self.reasoning.fill(outputs, self, batch)
        else:
            outputs.answers = [""] * len(batch)
            outputs.counts = dict.fromkeys(("ended", "marked"), 0.0)
            outputs.scalars = {name: torch.zeros((), device=self.device) for name in outputs.counts}
        return outputs


def _mean(groups: list[tuple[float, Tensor, float]]) -> Tensor:
    """The mean over all that the groups count, each with its weight."""
    total = sum(count for _, _, count in groups)
    return torch.stack([weight * loss * (count / max(1.0, total)) for weight, loss, count in groups]).sum()
