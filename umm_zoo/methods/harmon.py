"""Method of one masked encoder that reads images and generates them in rounds, beside a language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from umm_zoo.backbones.devices import send
from umm_zoo.backbones.generation import take_rows
from umm_zoo.backbones.harmon import HarmonBackbone
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.preparation import Preparation
from umm_zoo.batch import Batch, Grid, Images, Task, by_size, map_by_size, stacked
from umm_zoo.blocks.denoisers import Denoiser, RegressionHead
from umm_zoo.blocks.masked_autoencoder import MaskedDecoder
from umm_zoo.blocks.masking import CosineUnmasking, MaskRatio, TruncatedNormalRatio, Unmasking, random_places
from umm_zoo.blocks.transformer import as_tokens
from umm_zoo.errors import Count, Share, UserError, Weight
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.methods.conditioning import Prompts
from umm_zoo.methods.hidden_tokens import HiddenTokens
from umm_zoo.methods.requests import AnswerRows, check_kinds, no_answer, of_kind, request_batch, row_seeds
from umm_zoo.objectives.base import Objective
from umm_zoo.objectives.pairs import assert_trains
from umm_zoo.objectives.reduction import mean_over_groups
from umm_zoo.objectives.rounds import row_generators, uniform_rows
from umm_zoo.outputs import Outputs, Sampling


class Harmon(AnswersWithVLM, Method):
    """Method of next-token prediction on answers, and of a loss of each hidden image token given the others and a prompt.

    Of an image to generate, some tokens are hidden. The encoder sees the others behind its buffers; the language model, behind the
    prompt, adds to what it gives; the decoder fills in the hidden places, and from the state there the ``head`` denoises (or
    regresses) the token alone. Images to be read go through the same encoder whole. ``loss = text_loss + image_weight *
    image_loss``; the first is the mean over the answer tokens of the optimiser step, the second over its image rows, of each the
    mean over its hidden tokens: the release's mean over all of them where every row hides as many.

    To generate, all tokens are hidden at first, and every round draws some, each on its own, in a random order. How the
    released stages were trained before their fine-tuning was not published.

    Reference: Wu et al., "Harmonizing Visual Representations for Unified Multimodal Understanding and Generation" (arXiv
    2503.21979) and its released code; Li et al., MAR (arXiv 2406.11838).

    Args:
        vlm: language model, encoder and codec; its parts are the method's.
        decoder: gives each token's state.
        head: of one token: a ``TokenMLPHead``, or a ``RegressionHead`` under a regression objective.
        objective: how the head is trained and sampled; ``LearnedRangeVariance`` is MAR's.
        ratio: of hidden tokens; None is ``TruncatedNormalRatio()``.
        unmasking: rounds of generation; None is 64 by a cosine, under constant guidance.
        image_weight: of the image loss.
        dropout: share of image rows whose prompt is replaced by the one that says nothing.
        guidance: scale of classifier-free guidance; 1 is none.
        image_size: side in pixels of what is generated when nothing else is said.

    Raises:
        UserError: sizes of the blocks disagree.
        ValueError: the head is not of the kind that the objective calls.
    """

    makes = ("text_loss", "image_loss", "nll", "num_tokens", "answers", "generated", "round_trips")
    takes_mixed = True
    refuses = frozenset({"images", "steps"})

    def __init__(
        self,
        vlm: HarmonBackbone,
        decoder: MaskedDecoder,
        head: Denoiser | RegressionHead,
        objective: Objective,
        ratio: MaskRatio | None = None,
        unmasking: Unmasking | None = None,
        image_weight: Weight = 1.0,
        dropout: Share = 0.1,
        guidance: Weight = 3.0,
        image_size: Count = 512,
    ) -> None:
        super().__init__()
        self.vlm, self.decoder, self.head, self.objective = vlm, decoder, head, objective
        self.ratio, self.unmasking = ratio or TruncatedNormalRatio(), unmasking or CosineUnmasking()
        self.image_weight, self.dropout, self.guidance, self.image_size = image_weight, dropout, guidance, image_size
        self.hidden_tokens = HiddenTokens(vlm, decoder, head, objective, self.unmasking)
        self.words = Prompts(text_to_image="Generate an image: {}")
        for name, found, expected in (
            ("head.condition_dim", getattr(head, "condition_dim", None), decoder.width),
            ("head.channels", getattr(head, "channels", None), vlm.codec.latent_channels),
            ("decoder.encoder_width", decoder.decoder_embed.in_features, vlm.encoder.width),
            ("decoder.num_buffers", decoder.num_buffers, vlm.encoder.num_buffers),
            ("decoder.prompt_dim", decoder.prompt_dim, vlm.width),
        ):
            if found not in (None, expected):
                raise UserError(f"method.{name}", f"{found}", f"{expected}")
        assert_trains(objective, head)
        cells = vlm.codec.latent_grid(image_size, image_size).num_cells
        self.unmasking.counts(cells)  # refuses more rounds than tokens

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone, ``decoder`` and ``head``."""
        return {**self.vlm.parts(), "decoder": self.decoder, "head": self.head}

    def check_trained(self, trained: Sequence[str]) -> None:
        """The codec is frozen for good."""
        if "codec" in trained:
            raise UserError("training.trained", "'codec'", "other parts: its latents are what the others learn to predict")

    def precomputable(self) -> dict[str, Precomputable]:
        """``latents`` of the images to generate."""
        return {"latents": Precomputable(self.vlm.codec, self._latents, "target")}

    def _latents(self, batch: Batch) -> Tensor:
        codec = self.vlm.codec
        return stacked(codec.target_latents(batch)) if batch.requested else torch.zeros(0, codec.latent_channels, 1, 1)

    # -- losses --------------------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss`` and the two it is made of; a batch of one kind of rows touches the parameters of the other kind too."""
        answers, images = of_kind(batch, False), of_kind(batch, True)
        inputs = self.vlm.inputs_of(answers if len(answers) else no_answer())
        self.token_counts = inputs.token_counts
        output = self.vlm(inputs)
        text = output.loss * self.share("tokens", output.num_tokens.sum())
        dropped = (torch.rand(len(batch)) < self.dropout)[torch.tensor(batch.has_target)]
        rows, dropped = (images, dropped) if len(images) else (self._no_image(), torch.tensor([True]))
        image = self.image_loss(rows, dropped)
        image = image * (len(images) > 0) * self.share("images", len(images))
        return {"loss": text + self.image_weight * image, "text_loss": text, "image_loss": image}

    def units(self, batch: Batch) -> dict[str, float]:
        """Answer ``tokens`` and ``images`` to generate."""
        return {"tokens": self.vlm.count_labels(of_kind(batch, False)), "images": sum(batch.has_target), "rows": len(batch)}

    def _no_image(self) -> Batch:
        blank = torch.zeros(3, self.image_size, self.image_size, device=self.device)
        return Batch(["nothing"], request_batch([""]).conversations, targets=[blank], tasks=[Task.UNCONDITIONAL])

    def image_loss(self, batch: Batch, dropped: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean over image rows, of each the mean over its hidden tokens; the generator is for masks."""
        prompts = self.vlm.prompts(self._texts(batch, dropped.tolist()))
        groups = []
        for rows, latents in by_size(self.vlm.codec.target_latents(batch)):
            tokens, grid = as_tokens(latents).to(self.device), Grid(*latents.shape[-2:])
            hidden = self.ratio.masks(len(tokens), grid.num_cells, generator)
            own = take_rows(prompts, torch.tensor(rows or [0]))
            losses = self.hidden_tokens.losses(tokens, hidden, grid, own, generator)
            groups.append((len(rows), {"loss": losses.mean()}))
        return mean_over_groups(groups)["loss"]

    def _texts(self, batch: Batch, dropped: Sequence[bool]) -> list[str]:
        empty = [drop or task is Task.UNCONDITIONAL for drop, task in zip(dropped, batch.tasks, strict=True)]
        return self.words.apply(batch, ["nothing" if own else "full" for own in empty]).user_texts()

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``; images to generate need as many tokens as there are rounds."""
        self.vlm.try_images(inputs, targets)
        self.unmasking.counts(self.vlm.image_tokens(targets)[1].num_cells)

    # -- validation ----------------------------------------------------------------------------------------------------------

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows that the backbone cannot read whole, and those that show an image and ask for one."""
        answers = scoring and self.wanted.max_new_tokens > 0
        check_kinds(
            batch,
            "Harmon",
            lambda rows: self.vlm.check_rows(self.words.apply(rows, ["full"] * len(rows)), for_generation=True),
            lambda rows: self.vlm.check_conversations(rows, answers),
        )

    def preparation(self, scoring: bool) -> Preparation | None:
        """See ``Prepares``: the answer rows."""
        return self.vlm.preparation(AnswerRows(scoring and self.wanted.max_new_tokens > 0))

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs for metrics, of rows of one kind.

        Answer rows: ``text_loss``, ``nll``, ``num_tokens``, greedy ``answers``. Image rows: ``image_loss`` under the same masks and
        noise at every validation, ``generated`` from a seed that depends on the row alone, ``round_trips`` of the codec.
        """
        if not batch.requested:
            output, longest = self.vlm(self.vlm.inputs_of(batch)), self.wanted.max_new_tokens
            answers = self.answer(batch, longest) if longest else [""] * len(batch)
            scalars, counts = {"text_loss": output.loss, "image_loss": torch.zeros(())}, float(output.num_tokens.sum())
            own = {"nll": output.nll, "num_tokens": output.num_tokens, "answers": answers}
            return Outputs(scalars, {"text_loss": counts, "image_loss": 0.0}, **own)
        generator = torch.Generator().manual_seed(batch_idx)
        loss = self.image_loss(batch, torch.zeros(len(batch), dtype=torch.bool), generator)
        none = torch.zeros(len(batch))
        outputs = Outputs({"text_loss": torch.zeros(()), "image_loss": loss}, {"text_loss": 0.0}, [""] * len(batch), none, none)
        if self.wanted.generates(batch_idx):
            made = dict[int, Tensor]()
            for places, stack in by_size(batch.requested):
                seeds, size = [row_seeds(batch)[place] for place in places], (stack.shape[-2], stack.shape[-1])
                made.update(zip(places, self.generate(batch.select(places), seeds, Sampling(size=size)), strict=True))
            outputs.generated = [made[place] for place in range(len(batch))]
            outputs.round_trips = self.round_trip(batch.requested)
        return outputs

    # -- use -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """Images of what the rows say; see ``outputs.Draws``.

        Raises:
            UserError: a row has input images, a size that the codec cannot make, or fewer tokens than rounds.
        """
        sampling = sampling or Sampling()
        batch.assert_no_images("Harmon")
        if sampling.num_steps is not None:
            raise UserError("num_steps", f"{sampling.num_steps}", "none: rounds are those of method.unmasking")
        grid = self.vlm.codec.latent_grid(*(sampling.size or (self.image_size, self.image_size)))
        tokens = torch.zeros(len(batch), grid.num_cells, self.vlm.codec.latent_channels, device=self.device)
        hidden = torch.ones(tokens.shape[:2], dtype=torch.bool)
        scale = self.guidance if sampling.guidance is None else sampling.guidance
        texts, empty = self._texts(batch, [False] * len(batch)), self.words.unconditional
        made = self.hidden_tokens.fill_in(tokens, hidden, grid, texts, empty, row_generators(seeds), scale)
        return self._images(made, grid)

    def sample(self, prompts: Sequence[str], seed: int = 0, guidance: float | None = None) -> Tensor:
        """Images ``[len(prompts), 3, H, W]`` of texts of one's own; the k-th is generated from seed + k."""
        batch = request_batch(prompts).to(self.device)
        return stacked(self.generate(batch, [seed + row for row in range(len(prompts))], Sampling(guidance=guidance)))

    @torch.no_grad()
    def reconstruct(self, images: Images, seed: int = 0) -> list[Tensor]:
        """Images again, a random half of the tokens from the other half and then the other way round: none is copied.

        Under the prompt that says nothing, and without guidance; the k-th image from seed + k. Our choice: Harmon has no such task.
        """
        made = dict[int, Tensor]()
        for places, stack in by_size(images):
            tokens, grid = self.vlm.image_tokens(stack.to(self.device))
            generators = row_generators([seed + place for place in places])
            halves = random_places(uniform_rows(generators, grid.num_cells), grid.num_cells // 2)
            empty, fill_in = self.words.unconditional, self.hidden_tokens.fill_in
            texts = [empty] * len(places)
            first, second = (fill_in(tokens, hidden, grid, texts, empty, generators, 1.0) for hidden in (halves, ~halves))
            whole = torch.where(send(halves, self.device)[..., None], first, second)
            made.update(zip(places, self._images(whole, grid), strict=True))
        return [made[place] for place in range(len(images))]

    @torch.no_grad()
    def round_trip(self, images: Images) -> list[Tensor]:
        """Images through the codec and back: the best that a reconstruction could be."""
        return map_by_size(lambda stack: self.vlm.codec.decode(self.vlm.codec.encode(stack)).clamp(-1, 1), images)

    def _images(self, tokens: Tensor, grid: Grid) -> list[Tensor]:
        latents = tokens.transpose(1, 2).unflatten(2, tuple(grid))
        return list(self.vlm.codec.decode(latents).clamp(-1, 1))
