"""Third stage of UAE: the decoder learns to generate all that a caption says, by Flow-GRPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Batch, Tokens, image_of_each_row
from umm_zoo.errors import Weight
from umm_zoo.methods.uae.base import UAEBase
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.reinforcement import Reinforcement, Rollout, check_reference
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.methods.uae.rollouts import IndependentNoise, Phases, Rollouts, portions, rows_of
from umm_zoo.objectives.base import Predictor
from umm_zoo.objectives.flow_grpo import FlowGRPO, Trajectory
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import DetachedGuidance
from umm_zoo.rewards.base import Reward


@dataclass(kw_only=True)
class ImageRollout(Rollout):
    """Rollout of G images from the one caption of each row, with the steps that led to them.

    Shape:
        - condition, negative: ``[R, N, E]``; negative None without guidance
        - paths: of images of one size each, states ``[S + 1, r, C, h, w]``; numbers ``[r]``: which of the R images these are
    """

    condition: Tokens
    negative: Tokens | None
    paths: list[Trajectory]
    numbers: list[Tensor]


class UnderstandingForGeneration(UAEBase, Reinforcement[ImageRollout]):
    """Stage of Flow-GRPO on the decoder; the language model that writes and reads the captions stays frozen.

    Each step: one caption per image, G images sampled stochastically from it with all their steps, the reward of the last state,
    and the clipped surrogate of every trained step, each with its own backward pass. Images without an advantage, such as those of
    groups whose rewards are all equal, are dropped before the mean, and their KL with them; without any others nothing moves.
    The reference of the KL is the decoder with its adapter switched off. Evaluation stays deterministic, with the renderer's own
    sampler.

    Trained is ``decoder_adapter``, or ``decoder`` for all of it (which needs a learning rate of 1e-5 to 5e-5). The paper gives no
    numbers for this stage; defaults are Flow-GRPO's released ones (group 24, guidance 4.5 here and in training; AdamW at 3e-4 with
    weight decay 1e-4 for an adapter).

    Reference: Yan et al., 2025, arXiv 2509.09666 (versions 1 to 3); Liu et al., 2025, arXiv 2505.05470.

    Args:
        vlm, captions, reward: see ``UAEBase``.
        renderer: its decoder is trained.
        objective: of the steps, on the schedule that the renderer draws on where it states none.
        adapter: that of the second stage, frozen.
        decoder_adapter: rank 32, alpha 64 on the attention projections; None trains the decoder's own weights.
        rollouts: groups and their use; None is groups of 24. Noise is ``IndependentNoise`` unless said.
        guidance: scale in sampling and training, the unconditional branch detached; None is the renderer's own.
        from_true_captions: generate from the captions of the data instead of the model's own (our addition, a control).

    Raises:
        ValueError: sizes disagree, or a KL without an adapter to switch off.
    """

    trainable = ("decoder_adapter", "decoder")
    losses = {"loss": "scored"}
    watched = {"kl": "scored", "clip_fraction": "scored", "ratio_spread": "scored"}
    rollout_class = ImageRollout
    renderer: CaptionRenderer
    objective: FlowGRPO

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: CaptionRenderer,
        reward: Reward,
        objective: FlowGRPO,
        adapter: LoRA | None = None,
        decoder_adapter: LoRA | None = None,
        captions: CaptionSampling | None = None,
        rollouts: Rollouts | None = None,
        guidance: Weight | None = 4.5,
        from_true_captions: bool = False,
    ) -> None:
        check_reference(objective.kl_weight, decoder_adapter, "a decoder_adapter")
        super().__init__(vlm, renderer, captions=captions, adapter=adapter, decoder_adapter=decoder_adapter, reward=reward)
        self.objective, self.rollouts, self.phases = objective, rollouts or Rollouts(group=24), Phases()
        self.noise, self.from_true_captions = self.rollouts.noise or IndependentNoise(), from_true_captions
        self.guidance = renderer.guidance if guidance is None else guidance
        if not isinstance(renderer.objective, FlowMatching):
            found = type(renderer.objective).__name__
            raise ValueError(
                f"renderer.objective: found {found}, expected FlowMatching: a policy gradient of a flow trains its steps"
            )
        objective.match(renderer.objective.schedule)

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> ImageRollout:
        """Caption, sample, reward; nothing keeps a gradient."""
        images, group = image_of_each_row(batch), self.rollouts.group
        with self.phases("caption", self.device):
            captions = batch.answers() if self.from_true_captions else self.sampled_captions(images).texts
            one = self.renderer.condition(self.vlm, captions, images, self.adapter)
            mask = None if one.mask is None else one.mask.repeat_interleave(group, 0)
            condition = Tokens(one.values.repeat_interleave(group, 0), mask)  # [R, N, E]
            negative = self.renderer.negative(self.vlm, len(condition.values), self.adapter) if self.guidance != 1 else None
        seeds, sizes = self.noise(len(images), group), [self.renderer.size_of(image) for image in images for _ in range(group)]
        paths, numbers, made = list[Trajectory](), list[Tensor](), dict[int, Tensor]()
        with self.phases("generate", self.device):
            for size in dict.fromkeys(sizes):
                own = [number for number, other in enumerate(sizes) if other == size]
                noise = self.renderer.noise([seeds[number] for number in own], self.device, size)
                numbers.append(torch.tensor(own, device=self.device))
                paths.append(self._sampled(noise, condition, negative, numbers[-1]))
                made.update(zip(own, self._decoded(paths[-1]), strict=True))
        generated = [made[number] for number in range(len(sizes))]
        return ImageRollout(
            batch=batch,
            images=images,
            captions=[caption for caption in captions for _ in range(group)],
            generated=generated,
            rewards=self.judge(generated, batch),
            condition=condition,
            negative=negative,
            paths=paths,
            numbers=numbers,
        )

    def _sampled(self, noise: Tensor, condition: Tokens, negative: Tokens | None, numbers: Tensor) -> Trajectory:
        """Ways from noise ``[r, C, h, w]`` to images of one size, in micro-batches; ``numbers`` says which of all they are."""
        parts = []
        for rows in portions(torch.arange(len(noise), device=self.device), self.rollouts.micro_batch):
            own = numbers[rows]
            parts.append(self.objective.rollout(self._velocity(negative, own), noise[rows], rows_of(condition, own)))
        return Trajectory(torch.cat([part.states for part in parts], 1), torch.cat([part.log_probs for part in parts], 1))

    def _decoded(self, path: Trajectory) -> list[Tensor]:
        """The images at the ends."""
        parts = portions(torch.arange(len(path.samples), device=self.device), self.rollouts.micro_batch)
        return [image for rows in parts for image in self.renderer.decoded(path.samples[rows])]

    def _velocity(self, negative: Tokens | None, rows: Tensor) -> Predictor:
        return DetachedGuidance(self.renderer.decoder, None if negative is None else rows_of(negative, rows), self.guidance)

    def scored(self, rollout: ImageRollout) -> Tensor:
        """Images with an advantage; as in Flow-GRPO's release the others, KL and all, are dropped before the mean.

        The release keeps a few of them by chance, so that its batches come out even, and does not run where there are no others.
        """
        return rollout.advantages != 0

    def counts(self, rollout: ImageRollout) -> dict[str, float]:
        """Rows, and scored images."""
        return {"rows": len(rollout.rewards), "scored": float(self.scored(rollout).sum())}

    def loss_parts(self, rollout: ImageRollout) -> list[Callable[[], dict[str, Tensor]]]:
        """One part per trained step and portion of images."""
        scored = self.scored(rollout)
        portions_of_paths = [
            (path, numbers, some)
            for path, numbers in zip(rollout.paths, rollout.numbers, strict=True)
            for some in self.portions_of(scored[numbers])
        ]
        return [
            partial(self._part, rollout, step, *portion) for step in self.objective.trained_steps for portion in portions_of_paths
        ]

    def _part(self, rollout: ImageRollout, step: int, path: Trajectory, numbers: Tensor, places: Tensor) -> dict[str, Tensor]:
        """The share of one step of some images in the loss, which is the mean over all scored images and trained steps."""
        rows = numbers[places]
        velocity = self._velocity(rollout.negative, rows)
        adapter = self.decoder_adapter if self.objective.kl_weight else None
        reference = None if adapter is None else partial(without, adapter, velocity)
        some = Trajectory(path.states[:, places], path.log_probs[:, places])
        out = self.objective.step_loss(velocity, some, step, rows_of(rollout.condition, rows), rollout.advantages[rows], reference)
        share = len(rows) / (int(self.scored(rollout).sum()) * len(self.objective.trained_steps))
        return {name: share * out[name] for name in ("loss", *self.watched)}


def without(adapter: LoRA, velocity: Predictor, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
    """A velocity by the network without its adapter: the reference policy's."""
    with adapter.disabled():
        return velocity(noisy, time, condition)
