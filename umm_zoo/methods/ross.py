"""Method of visual instruction tuning in which the language model's outputs at the image tokens reconstruct the image."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMBackbone, VLMInputs, at
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.preparation import Preparation, WholeRows
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Images, Tokens, map_by_size, stacked
from umm_zoo.blocks.denoisers import Denoiser, RegressionHead
from umm_zoo.blocks.targets import ReconstructionTarget
from umm_zoo.blocks.transformer import as_map
from umm_zoo.errors import UserError, Weight
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.objectives.base import Objective
from umm_zoo.objectives.pairs import assert_trains
from umm_zoo.objectives.reduction import MeanOverImages, Reduction
from umm_zoo.outputs import Outputs

#: Name in ``Batch.extras`` of what ``data_pipelines.precompute`` stored.
PRECOMPUTED = "reconstruction_target"


class ROSS(AnswersWithVLM, Method):
    """Method of next-token prediction plus reconstruction of the input image from the language model's states at its tokens.

    The last states after the final norm, at the image positions and unshifted, pass a LayerNorm without affine and are the
    condition of a head, which denoises or regresses a target of the same image (section 3). The sum of both losses is minimised,
    with weight 1. Head and target exist for training only: answering is LLaVA's. Several images per row are reconstructed one by
    one (the release takes one per row).

    Two stages (released scripts): ``trained: [projector, head]`` on captions, then ``[projector, language_model, head]`` on
    instructions; vision tower and codec stay frozen. From fresh weights the language model feels the denoising loss from the third
    update on, see ``DenoiserHead``.

    Reference: Wang et al., "Reconstructive Visual Instruction Tuning" (arXiv 2410.09575).

    Args:
        vlm: the model that is trained; every image must take as many tokens as the target has.
        target: of the reconstruction.
        head: a ``Denoiser``, or a ``RegressionHead`` under a regression objective.
        objective: how the head is trained, and how a trained one samples.
        weight: of the reconstruction; 1 in the paper.
        reduction: how the losses of a batch become one; None is ``MeanOverImages``.
        packing: see ``LLaVA``.

    Raises:
        ValueError: sizes of the blocks disagree, or the head is not of the kind that the objective calls.
    """

    def __init__(
        self,
        vlm: VLMBackbone,
        target: ReconstructionTarget,
        head: Denoiser | RegressionHead,
        objective: Objective,
        weight: Weight = 1.0,
        reduction: Reduction | None = None,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.vlm, self.target, self.head, self.objective = vlm, target, head, objective
        self.weight, self.reduction = weight, reduction or MeanOverImages()
        if packing:
            vlm.pack_rows()
        assert_trains(objective, head)
        for mine, found, theirs, expected in (
            ("head.condition_dim", getattr(head, "condition_dim", None), "vlm.width", vlm.width),
            ("head.channels", getattr(head, "channels", None), "target.channels", target.channels),
            ("head.grid", getattr(head, "grid", None), "target.grid", target.grid),
            ("vlm.grid", getattr(vlm, "grid", None), "target.grid", (target.grid, target.grid)),
        ):
            if found is not None and found != expected:
                raise ValueError(f"{mine} is {found}, {theirs} is {expected}")

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone, ``head`` and ``target``."""
        return {**self.vlm.parts(), "head": self.head, "target": self.target}

    def precomputable(self) -> dict[str, Precomputable]:
        """``reconstruction_target``: what the target is made of, where a frozen network computes it."""
        if "target" in self.changing or not self.target.worth_storing:
            return {}
        target = self.target
        settings = {"kind": type(target).__name__.removeprefix("Frozen"), "image_size": target.image_size}
        settings |= {name: getattr(target, name, None) for name in ("grid", "channels", "pack", "sampled")}

        def compute(batch: Batch) -> Tensor:
            if batch.images:
                return target.to_store(torch.stack(map_by_size(target.prepare, batch.images)))
            device = next(target.parameters(), torch.empty(0)).device
            return target.to_store(torch.zeros(1, 3, target.image_size, target.image_size, device=device))[:0]  # not all take none

        return {PRECOMPUTED: Precomputable(target, compute, "image", settings)}

    # -- losses --------------------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss = language_loss + weight * reconstruction_loss``, and the two alone."""
        inputs = self.vlm.inputs_of(batch)
        self.token_counts = inputs.token_counts
        output = self.vlm(inputs)
        language = output.loss * self.share("tokens", output.num_tokens.sum())
        return self._losses(language, self.reconstruction_loss(batch, output.hidden, inputs))

    def units(self, batch: Batch) -> dict[str, float]:
        """Answer ``tokens``; ``images``, and ``samples`` that the reconstruction loss is a mean over."""
        samples = int(self.reduction.count(self._samples(batch)))
        return {"tokens": self.vlm.count_labels(batch), "images": sum(batch.image_counts), "samples": samples}

    def _losses(self, language: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        loss = language + self.weight * reconstruction
        return {"loss": loss, "language_loss": language, "reconstruction_loss": reconstruction}

    def reconstruction_loss(
        self, batch: Batch, hidden: Tensor, inputs: VLMInputs, generator: torch.Generator | None = None
    ) -> Tensor:
        """The reconstruction loss from last states ``[B, L, D]`` of inputs.

        The generator is for posterior, steps and noise.
        """
        self._check_grids(batch.images)
        samples = self._samples(batch)  # [S], one entry per image, and per row without where those take part
        has_image = send(samples, hidden.device)
        condition = _among_others(self.image_states(hidden, inputs.image_mask, inputs.image_places), samples)  # [S, N, D]
        targets = as_map(self._targets(batch, samples, hidden.device, generator))
        losses = self.objective.losses(self.target.predictor(self.head), targets, Tokens(condition), generator)
        num_images = self.step.total("images", has_image.sum(), has_image.device)
        return self.reduction(losses, has_image, num_images) * self.share("samples", self.reduction.count(has_image))

    def _check_grids(self, images: Images) -> None:
        """Refuse an image whose tokens are no square of the target's: their number alone would put them at other places."""
        side = self.target.grid
        for image in images:
            if (grid := self.vlm.image_grid(*image.shape[-2:])) != (side, side):
                found = f"an image of {image.shape[-2]} x {image.shape[-1]} px, which is {grid.h} x {grid.w} tokens"
                raise UserError("data.image_size", found, f"{side} x {side} tokens, the grid of method.target")

    def image_states(self, hidden: Tensor, image_mask: Tensor, places: Tensor | None = None) -> Tensor:
        """The states at the image tokens, image after image, normalised: ``[M, N, D]`` in float32; ``places`` are the mask's.

        Raises:
            ValueError: an image has another number of tokens than the target.
        """
        tokens = self.target.grid**2
        states = at(hidden, image_mask, places)  # [M*N, D]
        if len(states) % tokens:
            raise ValueError(f"{len(states)} image tokens in the batch are not a multiple of the target's {tokens}")
        states = states.unflatten(0, (-1, tokens)) if len(states) else hidden.new_zeros(0, tokens, hidden.shape[-1])
        return F.layer_norm(states.float(), states.shape[-1:], eps=1e-5)

    def _samples(self, batch: Batch) -> Tensor:
        """For every sample of the reconstruction loss, in the order of the rows, whether it is an image."""
        if self.reduction.counts_rows_without_image:
            return torch.tensor([flag for count in batch.image_counts for flag in ([True] * count or [False])])
        # without any image the head still runs, on a flat image that is then masked: all ranks must touch the same parameters
        return torch.tensor([True] * sum(batch.image_counts) or [False])

    def _targets(self, batch: Batch, samples: Tensor, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Targets ``[S, N, F]``, those of a flat image in the tower's mean colour where there is no image."""
        stored = batch.extras.get(PRECOMPUTED)
        given = None if stored is None else stacked(stored).to(device)
        if stored is None and batch.images:  # no weights here, so ranks need not have as many sizes
            given = torch.cat([self.target.prepare(image[None]) for image in batch.images])
        if given is None or not samples.all():
            mean = getattr(self.vlm, "image_mean", torch.full((1,), 0.5, device=device)).reshape(1, -1, 1, 1)
            flat = (2 * mean - 1).expand(1, 3, self.target.image_size, self.target.image_size)
            flat = flat if stored is None else self.target.to_store(flat)
            whole = flat.expand(len(samples), *flat.shape[1:])
            given = whole.clone() if given is None else _among_others(given, samples, whole)
        return self.target(given, generator) if stored is None else self.target.of_stored(given, generator)

    # -- looking at it -------------------------------------------------------------------------------------------------------

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        images = ("generated", "references", "columns") if self.target.has_images else ()
        return ("loss", "language_loss", "reconstruction_loss", "nll", "num_tokens", "answers", *images)

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows that the backbone cannot read whole."""
        self.vlm.check_conversations(batch, scoring and self.wanted.max_new_tokens > 0)

    def preparation(self, scoring: bool) -> Preparation | None:
        """See ``Prepares``: what the backbone reads."""
        return self.vlm.preparation(WholeRows(scoring and self.wanted.max_new_tokens > 0))

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """As LLaVA's; also both losses alone, under the same noise at every validation.

        ``columns`` to look at, and ``generated`` (reconstructions) with their ``references`` at the target's size, both of a row's
        first image; the latter two only where every row has an image.
        """
        inputs = self.vlm.inputs_of(batch)
        output = self.vlm(inputs)
        generator = torch.Generator(output.hidden.device).manual_seed(batch_idx)
        losses = self._losses(output.loss, self.reconstruction_loss(batch, output.hidden, inputs, generator))
        longest = self.wanted.max_new_tokens
        answers = self.answer(batch, longest) if longest else [""] * len(batch)
        outputs = Outputs(losses, nll=output.nll, num_tokens=output.num_tokens, answers=answers)
        if batch.images and self.target.has_images and self.wanted.generates(batch_idx):
            made = self._generate(self.image_states(output.hidden, inputs.image_mask, inputs.image_places), generator)
            images = batch.images
            columns = {"original": images, "round trip": self.round_trip(images), "reconstruction": made}
            outputs.columns = {name: _first_of_each_row(column, batch.image_counts) for name, column in columns.items()}
            if all(batch.image_counts):
                outputs.generated = outputs.columns["reconstruction"]
                outputs.references = _first_of_each_row(map_by_size(self.target.prepare, images), batch.image_counts)
        return outputs

    @property
    def refuses(self) -> frozenset[str]:
        """Reconstruction, where the target has no images."""
        return frozenset() if self.target.has_images else frozenset({"reconstruct"})

    @torch.no_grad()
    def reconstruct(self, images: Images, seed: int = 0) -> list[Tensor]:
        """Images again from what the language model makes of them, at the target's size.

        What follows an image cannot reach its states (attention is causal), so no question is needed.

        Raises:
            ValueError: the target cannot be turned back into an image.
        """
        self._check_grids(images)
        keys = [f"image {i}" for i in range(len(images))]
        conversations: list[Conversation] = [[{"role": "user", "text": IMAGE_MARKER}] for _ in keys]
        inputs = self.vlm.inputs_of(Batch(keys, conversations, list(images), [1] * len(keys)))
        states = self.image_states(self.vlm(inputs).hidden, inputs.image_mask, inputs.image_places)
        return self._generate(states, torch.Generator(states.device).manual_seed(seed))

    def round_trip(self, images: Images) -> list[Tensor]:
        """Images through the target and back: the best that a reconstruction could be, at the target's size."""
        return map_by_size(self.target.round_trip, images)

    @torch.no_grad()
    def _generate(self, states: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        shape = (len(states), self.target.channels, self.target.grid, self.target.grid)
        return list(self.target.images(self.objective.sample(self.target.predictor(self.head), shape, Tokens(states), generator)))


def _among_others(values: Tensor, samples: Tensor, others: Tensor | None = None) -> Tensor:
    """M values ``[M, ...]`` at those of S samples that have one, as a mask of the host says; the others have zeros, or theirs."""
    others = values.new_zeros(len(samples), *values.shape[1:]) if others is None else others
    return others.index_copy(0, send(samples.nonzero()[:, 0], values.device), values.to(others))


def _first_of_each_row(images: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Of M images one per row; a row without an image gets a grey one."""
    left = iter(images)
    rows = [[next(left) for _ in range(count)] for count in counts]
    return [own[0] if own else torch.zeros_like(images[0]) for own in rows]
