"""Visual instruction tuning in which the language model's outputs at the image tokens must reconstruct the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Tokens
from umm_zoo.blocks.denoisers import Denoiser, RegressionHead
from umm_zoo.blocks.targets import ReconstructionTarget
from umm_zoo.blocks.transformer import as_map
from umm_zoo.errors import MistakeError
from umm_zoo.method import Method
from umm_zoo.objectives.base import Objective
from umm_zoo.objectives.reduction import MeanOverImages, Reduction
from umm_zoo.objectives.regression import Regression
from umm_zoo.training.optimization import OptimizerFactory, Schedule

#: Name in ``Batch.extras`` of what ``data_pipelines.precompute`` stored.
_PRECOMPUTED = "reconstruction_target"


class ROSS(Method):
    """Next-token prediction plus reconstruction of the input image from the language model's states at its tokens.

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
        target: what is reconstructed.
        head: a ``Denoiser``, or a ``RegressionHead`` under a regression objective.
        objective: how the head is trained, and how a trained one draws.
        optimizer: builds the optimiser over the trained parts.
        trained: names among ``vision_tower``, ``projector``, ``language_model``, ``head``.
        schedule: learning rate over the steps; None is constant.
        weight: of the reconstruction; 1 in the paper.
        reduction: how the losses of a batch become one; None is ``MeanOverImages``.
        stored_targets: name in ``Batch.extras`` of targets that were computed beforehand (``latents`` for a codec's); None computes
            them.
        stored_cells: name in ``Batch.extras`` of ``[M, grid, grid]`` masks, True where a cell counts; None counts all, padding
            included, as the release does.
        max_new_tokens: longest answer in validation; 0 to only measure the losses.
        num_drawn_batches: batches of each validation whose reconstructions are drawn, for the sample grid (our choice: one).

    Raises:
        ValueError: sizes of the blocks disagree, or the head is not of the kind that the objective calls.
    """

    def __init__(
        self,
        vlm: VLMBackbone,
        target: ReconstructionTarget,
        head: Denoiser | RegressionHead,
        objective: Objective,
        optimizer: OptimizerFactory,
        trained: list[str],
        schedule: Schedule | None = None,
        weight: float = 1.0,
        reduction: Reduction | None = None,
        stored_targets: str | None = None,
        stored_cells: str | None = None,
        max_new_tokens: int = 16,
        num_drawn_batches: int = 1,
    ) -> None:
        super().__init__()
        self.vlm, self.target, self.head, self.objective = vlm, target, head, objective
        self.weight, self.reduction = weight, reduction or MeanOverImages()
        self.stored_targets, self.stored_cells = stored_targets, stored_cells
        self.max_new_tokens, self.num_drawn_batches = max_new_tokens, num_drawn_batches
        self._num_tokens = torch.zeros((), dtype=torch.long)
        self._check_blocks()
        self.train_only(trained, optimizer, schedule)

    def _check_blocks(self) -> None:
        if isinstance(self.head, RegressionHead) != isinstance(self.objective, Regression):
            raise ValueError(
                f"head and objective: a {type(self.objective).__name__} cannot train a {type(self.head).__name__}; "
                "regression objectives go with regression heads, all others with denoisers"
            )
        for mine, found, theirs, expected in (
            ("head.condition_dim", getattr(self.head, "condition_dim", None), "vlm.width", self.vlm.width),
            ("head.channels", getattr(self.head, "channels", None), "target.channels", self.target.channels),
            ("head.grid", getattr(self.head, "grid", None), "target.grid", self.target.grid),
            ("vlm.grid", getattr(self.vlm, "grid", None), "target.grid", (self.target.grid, self.target.grid)),
        ):
            if found is not None and found != expected:
                raise ValueError(f"{mine} is {found}, {theirs} is {expected}")

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone, ``head`` and ``target``."""
        return {**self.vlm.parts(), "head": self.head, "target": self.target}

    def precomputable(self) -> dict[str, Precomputable]:
        """``reconstruction_target``: what the target is made of, where a frozen network computes it."""
        if self.stored_targets is not None or "target" in self.trained or not self.target.worth_storing:
            return {}
        target = self.target
        settings = {"kind": type(target).__name__.removeprefix("Frozen"), "image_size": target.image_size}
        settings |= {name: getattr(target, name, None) for name in ("grid", "channels", "pack", "sampled")}

        def compute(batch: Batch) -> Tensor:
            if batch.images is not None:
                return target.to_store(batch.images)
            device = next(target.parameters(), torch.empty(0)).device
            return target.to_store(torch.zeros(0, 3, target.image_size, target.image_size, device=device))

        return {_PRECOMPUTED: Precomputable(target, compute, "image", settings)}

    # -- losses --------------------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss = language_loss + weight * reconstruction_loss``, and the two alone."""
        inputs = self.vlm.inputs_of(batch)
        self._num_tokens = inputs.attention_mask.sum()
        output = self.vlm(inputs)
        reconstruction = self.reconstruction_loss(batch, output.hidden, inputs.image_mask)
        return {
            "loss": output.loss + self.weight * reconstruction,
            "language_loss": output.loss,
            "reconstruction_loss": reconstruction,
        }

    def batch_tokens(self, batch: Batch) -> Tensor:
        """Tokens that the last training batch was made of, image tokens included and padding not; ``callbacks.Throughput`` asks."""
        return self._num_tokens

    def reconstruction_loss(
        self, batch: Batch, hidden: Tensor, image_mask: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The reconstruction loss of a batch whose language-model states are given.

        Args:
            batch: its images.
            hidden: ``[B, L, D]`` last states.
            image_mask: ``[B, L]``.
            generator: for posterior, steps and noise.
        """
        has_image = self._samples(batch).to(hidden.device)  # [S], one entry per image, and per row without where those take part
        states = self.image_states(hidden, image_mask)  # [M, N, D]
        condition = states.new_zeros(len(has_image), *states.shape[1:]).masked_scatter(has_image[:, None, None], states)
        targets = self._targets(batch, has_image, generator)
        cells = None
        if self.stored_cells is not None:
            stored = _extra(batch, self.stored_cells).bool()  # [M, grid, grid]
            cells = stored.new_ones(len(has_image), *stored.shape[1:])
            cells[has_image] = stored
        losses = self.objective.losses(self.target.predictor(self.head), as_map(targets), Tokens(condition), generator, cells)
        return self.reduction(losses, has_image)

    def image_states(self, hidden: Tensor, image_mask: Tensor) -> Tensor:
        """The states at the image tokens, image after image, normalised: ``[M, N, D]`` in float32.

        Raises:
            ValueError: an image has another number of tokens than the target.
        """
        tokens = self.target.grid**2
        states = hidden[image_mask]  # [M*N, D]
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

    def _targets(self, batch: Batch, has_image: Tensor, generator: torch.Generator | None) -> Tensor:
        """Targets ``[S, N, F]``, those of a flat image in the tower's mean colour where there is no image."""
        if has_image.all() and self.stored_targets is not None:
            return self.target.of_stored(_extra(batch, self.stored_targets))
        if self.stored_targets is None and _PRECOMPUTED in batch.extras:
            return self.target.of_stored(self._with_flat(batch.extras[_PRECOMPUTED].to(has_image.device), has_image), generator)
        images = batch.images
        if images is None or not has_image.all():
            size = (self.target.image_size,) * 2 if images is None else images.shape[-2:]
            mean = torch.as_tensor(getattr(self.vlm, "image_mean", 0.5), device=has_image.device).reshape(1, -1, 1, 1)
            flat = (2 * mean - 1).expand(len(has_image), 3, *size).clone()
            if images is not None:
                flat[has_image] = images.to(flat)
            images = flat
        targets = self.target(images, generator)
        if batch.images is not None and self.stored_targets is not None:
            targets[has_image] = self.target.of_stored(_extra(batch, self.stored_targets)).to(targets)
        return targets

    def _with_flat(self, stored: Tensor, has_image: Tensor) -> Tensor:
        """Stored entries ``[M, …]`` in their places among the samples ``[S, …]``, those of a flat image in the others."""
        if has_image.all():
            return stored
        mean = torch.as_tensor(getattr(self.vlm, "image_mean", 0.5), device=has_image.device).reshape(1, -1, 1, 1)
        flat = (2 * mean - 1).expand(1, 3, self.target.image_size, self.target.image_size)
        entry = self.target.to_store(flat)
        whole = entry.expand(len(has_image), *entry.shape[1:]).clone()
        if len(stored):
            whole[has_image] = stored.to(whole)
        return whole

    # -- looking at it -------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """As LLaVA's; also both losses alone, under the same noise at every validation.

        Of the first batches ``columns`` to look at, and ``images`` (reconstructions) with their ``originals`` at the target's
        size; both are of a row's first image, and None where nothing was drawn or a row has no image.
        """
        inputs = self.vlm.inputs_of(batch)
        output = self.vlm(inputs)
        generator = torch.Generator(output.hidden.device).manual_seed(batch_idx)
        reconstruction = self.reconstruction_loss(batch, output.hidden, inputs.image_mask, generator)
        outputs: dict[str, Any] = {
            "loss": output.loss + self.weight * reconstruction,
            "language_loss": output.loss,
            "reconstruction_loss": reconstruction,
            "nll": output.nll,
            "num_tokens": output.num_tokens,
            "answers": self.answer(batch) if self.max_new_tokens else [""] * len(batch),
            "generated": None,
            "originals": None,
        }
        if batch.images is not None and self.target.has_images and batch_idx < self.num_drawn_batches:
            drawn = self._draw(self.image_states(output.hidden, inputs.image_mask), generator)
            outputs["columns"] = _first_of_each_row(
                {"original": batch.images, "round trip": self.round_trip(batch.images), "reconstruction": drawn},
                batch.image_counts,
            )
            if all(batch.image_counts):
                outputs["generated"] = outputs["columns"]["reconstruction"]
                seen = _first_of_each_row({"original": self.target.prepare(batch.images)}, batch.image_counts)
                outputs["originals"] = seen["original"]
        return outputs

    @torch.no_grad()
    def answer(self, batch: Batch, max_new_tokens: int | None = None, temperature: float = 0.0) -> list[str]:
        """Answers to a batch of prompts; a row's own last answer is not looked at, and neither head nor target is used."""
        return self.vlm.generate(
            batch.prompts(), batch.images, batch.image_counts, max_new_tokens or self.max_new_tokens, temperature
        )

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Draw the images of a batch from the language model's states, ``[M, 3, H, W]`` in [-1, 1] at the target's size.

        Raises:
            ValueError: the target cannot be turned back into an image.
        """
        inputs = self.vlm.inputs_of(batch)
        return self._draw(self.image_states(self.vlm(inputs).hidden, inputs.image_mask), generator)

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images ``[M, 3, H, W]`` again from what the language model makes of them.

        What follows an image cannot reach its states (attention is causal), so no question is needed.

        Raises:
            ValueError: the target cannot be turned back into an image.
        """
        keys = [f"image {i}" for i in range(len(images))]
        conversations: list[Conversation] = [[{"role": "user", "text": IMAGE_MARKER}] for _ in keys]
        return self.sample(Batch(keys, conversations, images, [1] * len(keys)), generator)

    def round_trip(self, images: Tensor) -> Tensor:
        """Images through the target and back: the best that a reconstruction could be."""
        return self.target.round_trip(images)

    @torch.no_grad()
    def _draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (len(states), self.target.channels, self.target.grid, self.target.grid)
        return self.target.images(self.objective.sample(self.target.predictor(self.head), shape, Tokens(states), generator))


def _extra(batch: Batch, name: str) -> Tensor:
    if name not in batch.extras:
        raise MistakeError(f"{batch.keys[0]}: the batch has no stored '{name}', found {sorted(batch.extras)}")
    return batch.extras[name]


def _first_of_each_row(images: dict[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """``[M, 3, H, W]`` -> ``[B, 3, H, W]`` each; a row without an image gets a grey one."""
    starts = [sum(counts[:row]) for row in range(len(counts))]
    return {
        name: torch.stack(
            [values[start] if count else torch.zeros_like(values[0]) for start, count in zip(starts, counts, strict=True)]
        )
        for name, values in images.items()
    }
