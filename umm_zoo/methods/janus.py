"""Method of one autoregressive model that reads images and generates them, token by token."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.generation import choose_rows
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.preparation import Preparation
from umm_zoo.backbones.unified import UnifiedAR
from umm_zoo.batch import Batch, Task, stacked
from umm_zoo.errors import Share, UserError, Weight
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.methods.requests import AnswerRows, check_kinds, no_answer, of_kind, request_batch
from umm_zoo.objectives.step import blocks_are_sharded
from umm_zoo.objectives.tokens import AutoregressiveTokens, TokenObjective
from umm_zoo.outputs import Outputs, Sampling, TokenCount, add_counts, stand_in_counts

#: Name in ``Batch.extras`` of what ``data_pipelines.precompute`` stored.
PRECOMPUTED = "codes"


class Janus(AnswersWithVLM, Method):
    """Method of next-token prediction on the words of answers and on the tokens of images, each with a head of its own.

    Of rows without a target, *answer rows*, it is the cross-entropy of their answers, as in LLaVA; of rows with one, *image rows*,
    that of the target's codes behind the prompt alone. ``loss = text_loss + image_weight * image_loss``, each the mean over its
    tokens of the optimiser step (of an image's tokens: over their codes); how often each kind comes is a matter of the data. A
    uniform head has ``image_loss_uniform`` = ln K, 9.70 at 16,384 codes. Users report 4.7 of a released model, and no more when
    it is trained on: judge by images.

    Three stages train (1) projector, image embeddings, image projector and image head, (2) also the language model, (3) also the
    vision tower; the codec stays frozen. Loss weights were not published, so equal ones are our choice; dropout of 10 % is from
    memory of the papers.

    Reference: Wu et al., "Janus: Decoupling Visual Encoding for Unified Multimodal Understanding and Generation" (arXiv
    2410.13848); Chen et al., "Janus-Pro" (arXiv 2501.17811). The code of their training was not released.

    Args:
        unified: the model; its parts are the method's.
        image_weight: of the image loss.
        dropout: share of image rows whose prompt is replaced by the one that says nothing, so that guidance has a meaning.
        guidance: scale of classifier-free guidance in generation; 1 is none (release: 5).
        temperature: of generation; 0 takes the likeliest token.
        tokens: how image tokens are learnt and generated; None is one after the other. ``MaskedTokens`` with a ``MaskedJanus`` is
            Show-o's way.

    Raises:
        UserError: a model that is not learnt in that way.
    """

    takes_mixed = True

    def __init__(
        self,
        unified: UnifiedAR,
        image_weight: Weight = 1.0,
        dropout: Share = 0.1,
        guidance: Weight = 5.0,
        temperature: Weight = 1.0,
        tokens: TokenObjective | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens or AutoregressiveTokens()
        self.tokens.check(unified)
        self.vlm, self.image_weight, self.dropout = unified, image_weight, dropout
        self.guidance, self.temperature = guidance, temperature
        self.grid = unified.generated_grid
        nats = sum(map(math.log, unified.codec.code_sizes)) / unified.codes_per_token
        self.uniform = {"text_loss_uniform": math.log(unified.vocabulary), "image_loss_uniform": nats}

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone."""
        return self.vlm.parts()

    def check_trained(self, trained: Sequence[str]) -> None:
        """The codec is frozen for good."""
        if "codec" in trained:
            raise UserError("training.trained", "'codec'", "other parts: codes are what the others learn to predict")

    def precomputable(self) -> dict[str, Precomputable]:
        """``codes`` of the images to generate."""
        return {PRECOMPUTED: Precomputable(self.vlm.codec, lambda batch: self.codes(batch).int(), "target")}

    # -- losses --------------------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, the two it is made of, and those of heads that know nothing.

        A batch of one kind of rows touches the parameters of the other kind too: ranks wait for each other's gradients.
        """
        answers, images = of_kind(batch, False), of_kind(batch, True)
        inputs = self.vlm.inputs_of(answers if len(answers) else no_answer())
        dropped = torch.rand(len(batch)) < self.dropout
        prompts, ids = self._image_inputs(images, dropped[torch.tensor(batch.has_target)])
        num_ids = len(images) * self.grid.num_cells
        counts = inputs.token_counts if len(answers) else stand_in_counts(inputs.token_counts)
        tokens = ids.numel() // self.vlm.codes_per_token
        asked = {**prompts.token_counts, "image": TokenCount(tokens, tokens)}
        self.token_counts = add_counts(counts, asked if num_ids else stand_in_counts(asked))
        output = self.vlm(inputs)
        text = output.loss * self.share("tokens", output.num_tokens.sum())
        image = self._image_loss(prompts, ids) * (num_ids > 0) * self.share("image_tokens", num_ids)
        uniform = {name: torch.full((), value, device=self.device) for name, value in self.uniform.items()}
        losses = {"loss": text + self.image_weight * image, "text_loss": text, "image_loss": image}
        return {**losses, **self.over_step(uniform, "rows", len(batch))}

    def units(self, batch: Batch) -> dict[str, float]:
        """Answer ``tokens``, ``image_tokens``; ``rows``."""
        words, ids = self.vlm.count_labels(of_kind(batch, False)), sum(batch.has_target) * self.grid.num_cells
        return {"tokens": words, "image_tokens": ids, "rows": len(batch)}

    def _image_loss(self, prompts: VLMInputs, ids: Tensor) -> Tensor:
        """Mean cross-entropy of codes ``[T, N * D]`` in nats."""
        return self.tokens(self.vlm, prompts, ids)[0].mean()

    def _image_inputs(self, rows: Batch, dropped: Tensor) -> tuple[VLMInputs, Tensor]:
        """Prompts and codes ``[T, N * D]`` of image rows; of one without content where there are none."""
        stored = {name: own for name, own in rows.extras.items() if name == PRECOMPUTED}
        if not len(rows):
            rows, dropped = replace(request_batch([""]), extras=stored), torch.tensor([True])
        ids = self.codes(rows).flatten(1).long().to(self.device)
        ids = ids if len(ids) else ids.new_zeros(1, self.grid.num_cells * self.vlm.codes_per_token)
        return self._prompts(rows, dropped), ids

    def _prompts(self, rows: Batch, dropped: Tensor) -> VLMInputs:
        """What stands before the image tokens of each row; of a dropped one the prompt that says nothing."""
        inputs = self.vlm.image_prompt(rows.user_texts())
        dropped = dropped | torch.tensor([task is Task.UNCONDITIONAL for task in rows.tasks])
        return choose_rows(send(dropped, self.device), self.vlm.unconditional(inputs), inputs) if dropped.any() else inputs

    @torch.no_grad()
    def codes(self, batch: Batch) -> Tensor:
        """Codes of the images to generate, ``[T, N, D]``: those of the shards where they hold any.

        Raises:
            UserError: an image has another size than the model generates, or the stored codes are another codec's.
        """
        stored = batch.extras.get(PRECOMPUTED)
        if stored is not None and len(stored):
            return self._checked(stacked(stored))
        if not batch.requested:
            if stored is None and blocks_are_sharded():  # other ranks have images, and call the codec's blocks
                self.vlm.codec.codes(torch.zeros(1, 3, *[self.vlm.generated_size] * 2, device=self.device))
            return torch.zeros(0, self.grid.num_cells, self.vlm.codes_per_token, dtype=torch.long)
        for target in batch.requested:
            self.vlm.assert_generates(target.shape[-2:], "data.target_size")
        return self.vlm.codec.codes(stacked(batch.requested))

    def _checked(self, codes: Tensor) -> Tensor:
        """Stored codes that are of the form that the codec's have."""
        expected = (self.grid.num_cells, self.vlm.codes_per_token)
        if codes.shape[1:] != expected:
            raise UserError(f"extras.{PRECOMPUTED}", f"{list(codes.shape[1:])} for an image", f"{list(expected)}, the codec's")
        return codes

    # -- validation ----------------------------------------------------------------------------------------------------------

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        losses = ("text_loss", "image_loss", "text_loss_uniform", "image_loss_uniform")
        return (*losses, "nll", "num_tokens", "answers", "generated", "round_trips", *self.tokens.makes)

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows that the backbone cannot read whole, and those that show an image and ask for one."""
        for target in batch.requested:
            self.vlm.assert_generates(target.shape[-2:], "data.target_size")
        if (stored := batch.extras.get(PRECOMPUTED)) is not None and len(stored):
            codes, sizes = self._checked(stacked(stored)), torch.tensor(self.vlm.codec.code_sizes)
            if bool(((codes < 0) | (codes >= sizes)).any()):
                found = f"numbers from {int(codes.min())} to {int(codes.max())}"
                raise UserError(f"extras.{PRECOMPUTED}", found, f"0 or more and below {sizes.tolist()}, the codec's")
        answers = scoring and self.wanted.max_new_tokens > 0
        check_kinds(
            batch,
            "Janus",
            lambda rows: self.vlm.check_image_prompts(rows.user_texts()),
            lambda rows: self.vlm.check_conversations(rows, answers),
        )

    def preparation(self, scoring: bool) -> Preparation | None:
        """See ``Prepares``: the answer rows."""
        return self.vlm.preparation(AnswerRows(scoring and self.wanted.max_new_tokens > 0))

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs for metrics, of rows of one kind.

        Answer rows: ``text_loss``, ``nll`` and ``num_tokens``, greedy ``answers``. Image rows: ``image_loss`` under their own
        prompts (and under what ``tokens`` hides, every time the same), ``generated`` from a seed that depends on the row alone, and
        ``round_trips`` of the codec.
        """
        outputs = Outputs({name: torch.tensor(value) for name, value in self.uniform.items()})
        if not batch.requested:
            output = self.vlm(self.vlm.inputs_of(batch))
            longest = self.wanted.max_new_tokens
            outputs.answers = self.answer(batch, longest) if longest else [""] * len(batch)
            outputs.nll, outputs.num_tokens = output.nll, output.num_tokens
            losses = {"text_loss": output.loss, **{name: torch.zeros(()) for name in ("image_loss", *self.tokens.makes)}}
            rows = dict.fromkeys(self.tokens.makes, 0.0)
        else:
            prompts, ids = self._image_inputs(batch, torch.zeros(len(batch), dtype=torch.bool))
            found, shares = self.tokens(self.vlm, prompts, ids, torch.Generator().manual_seed(batch_idx))
            parts, rows = self.tokens.losses_by(found, shares)
            losses = {"text_loss": torch.zeros(()), "image_loss": found.mean(), **parts}
            outputs.answers = [""] * len(batch)
            outputs.nll, outputs.num_tokens = torch.zeros(len(batch)), torch.zeros(len(batch))
            if self.wanted.generates(batch_idx):
                outputs.generated = self.generate(batch, [zlib.crc32(key.encode()) for key in batch.keys])
                outputs.round_trips = list(self.vlm.images_of(ids))
        outputs.scalars |= losses
        num_ids = sum(batch.has_target) * self.grid.num_cells
        outputs.counts = {"text_loss": float(outputs.num_tokens.sum()), "image_loss": num_ids, **rows}
        return outputs

    # -- use -----------------------------------------------------------------------------------------------------------------

    @property
    def refuses(self) -> frozenset[str]:
        """Image tokens come one by one, in one size, and from words alone."""
        return frozenset({"images", "steps", "size"})

    @torch.no_grad()
    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """Images of what the rows say, in the one size that the model generates; see ``outputs.Draws``.

        Raises:
            UserError: a row has input images, or a setting is asked for that image tokens do not have.
        """
        sampling = sampling or Sampling()
        batch.assert_no_images("Janus")
        if sampling.num_steps is not None:
            raise UserError("num_steps", f"{sampling.num_steps}", "none: image tokens are generated one by one")
        if sampling.size is not None:
            self.vlm.assert_generates(sampling.size, "size")
        scale = self.guidance if sampling.guidance is None else sampling.guidance
        inputs = self._prompts(batch, torch.zeros(len(batch), dtype=torch.bool))
        samples = self.tokens.sample(self.vlm, inputs, seeds, scale, self.temperature)
        return list(self.vlm.images_of(samples.ids))

    def sample(self, prompts: Sequence[str], seed: int = 0, guidance: float | None = None) -> Tensor:
        """Images ``[len(prompts), 3, H, W]`` of texts of one's own; the k-th is generated from seed + k.

        images = Janus.load("runs/janus/toy/stage3").sample(["top left: a small red circle; background: grey"])
        """
        batch = request_batch(prompts).to(self.device)
        return stacked(self.generate(batch, [seed + row for row in range(len(prompts))], Sampling(guidance=guidance)))
