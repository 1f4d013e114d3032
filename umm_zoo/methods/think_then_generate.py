"""Think-Then-Generate: a language model reasons about a prompt and rewrites it, and the image is generated from the rewrite."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.thoughts import Thought
from umm_zoo.batch import Batch, Tokens, stacked
from umm_zoo.errors import Share, UserError
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.methods.reasoning import Reasoner, told, words_of
from umm_zoo.methods.requests import no_answer, of_kind
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.outputs import Outputs, Sampling, in_groups

_WORDS, _IMAGES = ("language_model", "adapter"), ("connector", "decoder", "decoder_adapter")


class Thinker(AnswersWithVLM, Method):
    """Method of a language model that reasons about prompts and encodes them, and of a renderer that generates from its states.

    A stage's class adds its training step.

    Args:
        vlm: Qwen2.5-VL-7B in the paper (that of Qwen-Image).
        renderer: connector, decoder and codec; its reader says which states the decoder sees (``RewriteReader`` in the paper).
        reasoner: writes the thought and takes the rewrite from it; None generates from prompts as they are.
        adapter: low-rank additions to the language model; a reader of the base model leaves them out.
        decoder_adapter: low-rank additions to the renderer's decoder.

    Raises:
        ValueError: sizes of the blocks disagree.
    """

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: CaptionRenderer,
        reasoner: Reasoner | None = None,
        adapter: LoRA | None = None,
        decoder_adapter: LoRA | None = None,
    ) -> None:
        super().__init__()
        renderer.match(vlm)
        self.vlm, self.renderer, self.reasoner = vlm, renderer, reasoner
        self.adapter, self.decoder_adapter = adapter, decoder_adapter
        if adapter is not None:
            adapter.attach(vlm.parts()["language_model"])
        if decoder_adapter is not None:
            decoder_adapter.attach(renderer.decoder.model)

    def parts(self) -> dict[str, nn.Module]:
        """Those of backbone and renderer, and where they are, ``adapter`` and ``decoder_adapter``."""
        more = {"adapter": self.adapter, "decoder_adapter": self.decoder_adapter}
        return {**self.vlm.parts(), **self.renderer.parts(), **{name: part for name, part in more.items() if part is not None}}

    def check_trained(self, trained: Sequence[str]) -> None:
        """Refuse parts that no loss reaches."""
        if others := sorted(set(trained) - {*_WORDS, *_IMAGES}):
            raise UserError("training.trained", f"'{others[0]}'", f"some of {', '.join((*_WORDS, *_IMAGES))}")

    def precomputable(self) -> dict[str, Precomputable]:
        """``latents`` of the images to generate."""
        return {"latents": Precomputable(self.renderer.codec, lambda batch: stacked(self.renderer.latents(batch)), "row")}

    # -- use -----------------------------------------------------------------------------------------------------------------

    @property
    def refuses(self) -> frozenset[str]:
        """Images to generate from, what the renderer does not take, and thinking where there is no reasoner."""
        return frozenset({"images", *(() if self.reasoner else ("think",))}) | self.renderer.refuses

    def think(self, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """See ``Thinks``.

        Raises:
            UserError: there is no reasoner.
        """
        if self.reasoner is None:
            raise UserError("method.reasoner", "none", "a Reasoner, which writes before an image is generated")
        return self.reasoner(self.vlm, batch, seeds)

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """Images of the rows' own words, in the renderer's own size where none is said; see ``outputs.Draws``.

        Raises:
            UserError: a row has input images.
        """
        batch.assert_no_images(type(self).__name__)
        return self.renderer.generate(self.vlm, words_of(batch), seeds, None, self.adapter, sampling)

    def condition(self, texts: Sequence[str]) -> Tokens:
        """The decoder's condition of texts ``[R, N, E]``, with a gradient into the connector only."""
        return self.renderer.condition(self.vlm, texts, None, self.adapter)

    # -- validation ----------------------------------------------------------------------------------------------------------

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return {*self.renderer.objective.makes, "generated", "round_trips", "answers", "nll", "num_tokens", "marked"}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs for metrics, of rows of one kind.

        Rows that ask for an image: ``answers``, the thoughts about their prompts, and ``marked``, the share of them that have the
        marker; ``generated`` from the rewrites and from noise that depends on the row alone; ``round_trips``; the decoder's terms
        under the rows' own words. Without a reasoner the prompts stand for their rewrites. Other rows: greedy ``answers``, ``nll``
        and ``num_tokens``.
        """
        if not batch.requested:
            output, longest = self.vlm(self.vlm.inputs_of(batch)), self.wanted.max_new_tokens
            answers = self.answer(batch, longest) if longest else [""] * len(batch)
            return Outputs(nll=output.nll, num_tokens=output.num_tokens, answers=answers)
        return in_groups(lambda rows: self._images(rows, batch_idx), batch, [target.shape for target in batch.requested])

    def _images(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of rows that ask for images of one size."""
        condition = self.condition(words_of(batch))
        generator = torch.Generator(condition.values.device).manual_seed(batch_idx)
        outputs = Outputs(self.renderer.losses(batch, condition, generator))
        seeds = [zlib.crc32(key.encode()) for key in batch.keys]
        thoughts = self._thoughts(batch, seeds)
        outputs.answers = [thought.text for thought in thoughts]
        outputs.scalars["marked"] = torch.tensor([float(thought.marked) for thought in thoughts], device=self.device).mean()
        if self.wanted.generates(batch_idx):
            height, width = batch.requested[0].shape[-2:]
            outputs.generated = self.generate(told(batch, thoughts), seeds, Sampling(size=(height, width)))
            outputs.round_trips = self.renderer.round_trip(self.vlm, batch.requested)
        return outputs

    def _thoughts(self, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        if self.reasoner is not None:
            return self.think(batch, seeds)
        return [Thought(words, words) for words in words_of(batch)]


class ThinkThenGenerate(Thinker):
    """Stage of supervised training: the language model learns to think before it rewrites, the decoder to generate what is said.

    Rows with an answer (a thought about a prompt, a fact) train ``adapter`` or ``language_model`` by next-token prediction; rows
    with an image train ``connector``, ``decoder`` or ``decoder_adapter`` by the decoder's objective, under the states of the row's
    own words. Neither loss reaches the other's parts. In the paper the first alone is this stage, and Dual-GRPO (``DualGRPO``)
    follows; the decoder is a public one.

    Reference: "Think-Then-Generate: Reasoning-Aware Text-to-Image Diffusion with LLM Encoders" (arXiv 2601.10332), and its released
    code, which is for inference only.

    Args:
        vlm, renderer, reasoner, adapter, decoder_adapter: see ``Thinker``.
        drop_prompt: share of prompts replaced by the renderer's negative prompt in training, so that guidance has a meaning (our
            choice).
    """

    takes_mixed = True

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: CaptionRenderer,
        reasoner: Reasoner | None = None,
        adapter: LoRA | None = None,
        decoder_adapter: LoRA | None = None,
        drop_prompt: Share = 0.1,
    ) -> None:
        super().__init__(vlm, renderer, reasoner, adapter, decoder_adapter)
        self.drop_prompt = drop_prompt

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows that show an image, and in training those that train nothing here."""
        batch.assert_no_images("Think-Then-Generate")
        for row, wants_image in enumerate(batch.has_target):
            if not scoring and not (set(self.trained) & set(_IMAGES if wants_image else _WORDS)):
                found = "an image to generate" if wants_image else "a text to answer"
                raise UserError("", found, f"rows that train {' or '.join(self.trained)}", row=row)

    def units(self, batch: Batch) -> dict[str, float]:
        """Answer ``tokens``, and ``images``."""
        return {"tokens": self.vlm.count_labels(of_kind(batch, False)), "images": sum(batch.has_target)}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``text_loss`` and the decoder's terms, as far as parts of theirs are trained, and ``loss``, their sum."""
        losses: dict[str, Tensor] = {}
        if set(self.trained) & set(_WORDS):
            words = of_kind(batch, False)
            inputs = self.vlm.inputs_of(words if len(words) else no_answer())  # ranks wait for each other's gradients
            self.token_counts = inputs.token_counts
            output = self.vlm(inputs)
            losses["text_loss"] = output.loss * self.share("tokens", output.num_tokens.sum())
        if set(self.trained) & set(_IMAGES):
            losses |= self._image_losses(of_kind(batch, True))
        terms = [losses[name] for name in ("text_loss", "image_loss") if name in losses]
        return {**losses, "loss": torch.stack(terms).sum()}

    def _image_losses(self, rows: Batch) -> dict[str, Tensor]:
        """The decoder's terms, ``image_loss`` among them; 0 of a blank image where no row asks for one."""
        count, size = len(rows), self.renderer.image_size
        if not count:
            blank = torch.zeros(3, size, size, device=self.device)
            rows = Batch(["nothing"], [[{"role": "user", "text": ""}]], targets=[blank])
        dropped = torch.rand(len(rows)) < self.drop_prompt
        pairs = zip(words_of(rows), dropped.tolist(), strict=True)
        terms = self.renderer.losses(rows, self.condition([self.renderer.negative_prompt if drop else own for own, drop in pairs]))
        share = self.share("images", count) * (count > 0)
        return {("image_loss" if name == "loss" else name): value * share for name, value in terms.items()}
