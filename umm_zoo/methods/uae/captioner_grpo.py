"""Second stage of UAE: the language model learns to write captions from which the image can be generated again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.generation import Samples, take_rows
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Batch, image_of_each_row
from umm_zoo.errors import Count
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.reinforcement import Reinforcement, Rollout, check_reference
from umm_zoo.methods.uae.renderers import Renderer
from umm_zoo.methods.uae.rollouts import Phases, Rollouts, SharedNoise, portions
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.outputs import Sampling
from umm_zoo.rewards.base import Reward


@dataclass(kw_only=True)
class CaptionRollout(Rollout):
    """Rollout of G captions of each row, with the prompts of the language model.

    Shape:
        - inputs: the B prompts, embedded; no graph
        - samples: R captions; weights ``[R, T]`` of their tokens in the loss
        - old: ``[R, T]`` log-probabilities under the policy that wrote, once they are needed; None before
    """

    inputs: VLMInputs
    samples: Samples
    weights: Tensor
    old: Tensor | None = None


class GenerationForUnderstanding(Reinforcement[CaptionRollout]):
    """Stage of GRPO on the language model alone; connector, decoder, codec and reward stay frozen.

    Each step: the images are encoded once and captioned G times with the KV cache; the frozen renderer generates from every
    caption, from noise that its group shares; the reward compares the image generated with the one described; the tokens are scored
    once with a gradient. With one update per rollout the log-probabilities under the policy that wrote are those of this very pass,
    and nothing is scored twice. No gradient passes through the renderer, whose condition the paper lets drift with the policy
    (``BaseTextReader`` does not).

    In the paper's fourth and fifth versions this is the whole method, applied to existing models: the renderer is then a
    ``BridgeRenderer``.

    Trained is ``adapter``, or ``language_model`` for all of it, with AdamW at 1e-6 in the paper; ``vision_tower`` and
    ``projector`` are for the control in which they do not stay frozen. Defaults are the paper's where it has any (G 4, temperature
    1, KL weight 1e-6 in ``GRPO``).

    Reference: Yan et al., 2025, arXiv 2509.09666, section 2 and supplement 3.

    Args:
        vlm, renderer, captions, reward: see ``UAEBase``.
        objective: of the tokens.
        adapter: rank 32, alpha 64 on all linear layers in the release; None trains the weights themselves.
        rollouts: groups and their use; None is groups of 4. Noise is ``SharedNoise`` unless said.
        num_steps: of the renderer while training; 10 in the released cold start, None is the renderer's own.

    Raises:
        ValueError: sizes disagree, captions without chance, or a KL without an adapter to switch off.
    """

    trainable = ("adapter", "language_model", "vision_tower", "projector")
    watched = {"kl": "weight", "clip_fraction": "weight"}
    loss_unit = "aggregated"
    rollout_class = CaptionRollout
    objective: GRPO

    def __init__(
        self,
        vlm: Qwen25VL,
        renderer: Renderer,
        reward: Reward,
        objective: GRPO,
        adapter: LoRA | None = None,
        captions: CaptionSampling | None = None,
        rollouts: Rollouts | None = None,
        num_steps: Count | None = 10,
    ) -> None:
        check_reference(objective.kl_weight, adapter, "an adapter")
        super().__init__(vlm, renderer, captions=captions, adapter=adapter, reward=reward)
        if self.captions.temperature <= 0:
            raise ValueError(f"captions.temperature: found {self.captions.temperature}, expected more than 0")
        self.objective, self.rollouts, self.phases = objective, rollouts or Rollouts(group=4), Phases()
        self.noise, self.num_steps = self.rollouts.noise or SharedNoise(), num_steps

    # -- sampling ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> CaptionRollout:
        """Caption, generate, reward; nothing keeps a gradient."""
        images, group, how = image_of_each_row(batch), self.rollouts.group, self.captions
        with self.phases("caption", self.device):
            inputs = self._questions(images)
            samples = self.vlm.sample_from(inputs, group, how.max_new_tokens, how.temperature)
        seeds = self.noise(len(images), group)
        with self.phases("generate", self.device):
            rows = portions(torch.arange(len(seeds)), self.rollouts.micro_batch)
            generated = torch.cat([self.images_of_samples(samples, images, seeds, some) for some in rows])
        return CaptionRollout(
            batch=batch,
            images=images,
            captions=samples.texts,
            generated=generated,
            rewards=self.judge(generated, batch),
            inputs=inputs,
            samples=samples,
            weights=self.objective.aggregation(samples.mask),
        )

    def images_of_samples(self, samples: Samples, images: Tensor, seeds: list[int], rows: Tensor) -> Tensor:
        """Images of some captions, in the renderer's steps of training."""
        numbers = rows.tolist()
        return self.images_of_captions(
            [samples.texts[row] for row in numbers],
            [seeds[row] for row in numbers],
            images[(rows // self.rollouts.group).to(images.device)],
            Sampling(num_steps=self.num_steps),
        )

    def _questions(self, images: Tensor) -> VLMInputs:
        """The prompts, once per image."""
        count = len(images)
        with evaluation_mode(self.vlm):
            return self.vlm.embed(self.captions.conversations(count), images, [1] * count, for_generation=True)

    # -- scoring -------------------------------------------------------------------------------------------------------------

    def scored(self, rollout: CaptionRollout) -> Tensor:
        """A caption whose group is all alike counts in the mean, but carries no gradient, unless through the KL."""
        everything = torch.ones_like(rollout.advantages, dtype=torch.bool)
        return everything if self.objective.kl_weight else rollout.advantages != 0

    def counts(self, rollout: CaptionRollout) -> dict[str, float]:
        """Rows, tokens, what the aggregation is a mean over, and the weight of the tokens in it."""
        mask, aggregated = rollout.samples.mask, float(self.objective.aggregation.count(rollout.samples.mask))
        weight = aggregated * float(rollout.weights.sum())
        return {"rows": len(rollout.rewards), "tokens": float(mask.sum()), "aggregated": aggregated, "weight": weight}

    def described(self, rollout: CaptionRollout) -> dict[str, tuple[Tensor, str]]:
        """As ``Reinforcement``'s; also lengths and entropy of the captions."""
        samples = rollout.samples
        lengths = samples.mask.sum(dim=1).float()
        return {
            **super().described(rollout),
            "caption_tokens": (lengths.mean(), "rows"),
            "at_limit": ((lengths == self.captions.max_new_tokens).float().mean(), "rows"),
            # minus the log-probability of the sampled tokens: the entropy's unbiased estimate, per token
            "entropy": (-samples.log_probs.sum() / samples.mask.sum().clamp(min=1), "tokens"),
        }

    def loss_parts(self, rollout: CaptionRollout, rows: list[Tensor]) -> list[Callable[[], dict[str, Tensor]]]:
        """One part per portion of captions."""
        if self.rollouts.updates_per_rollout > 1 and rollout.old is None:
            rollout.old = torch.zeros_like(rollout.samples.log_probs)
        return [partial(self._part, rollout, some) for some in rows]

    def _part(self, rollout: CaptionRollout, rows: Tensor) -> dict[str, Tensor]:
        """The share of some captions in the loss."""
        tokens, mask = rollout.samples.tokens[rows], rollout.samples.mask[rows]
        length = int(mask.sum(dim=1).max())
        tokens, mask = tokens[:, :length], mask[:, :length]
        prompts = self._prompts(rollout, rows // self.rollouts.group)
        scored = self.log_probs(prompts, tokens, mask)
        reference = None
        if self.objective.kl_weight and self.adapter is not None:
            with torch.no_grad(), self.adapter.disabled():
                reference = self.log_probs(prompts, tokens, mask)
        old = None
        if rollout.old is not None:
            if rollout.times_used == 0:
                rollout.old[rows, :length] = scored.detach().to(rollout.old.dtype)
            old = rollout.old[rows, :length]
        weights = rollout.weights[rows, :length]
        out = self.objective(scored, mask, rollout.advantages[rows], old, reference, weights)
        share = weights.sum() / rollout.weights.sum().clamp(min=1e-12)
        return {"loss": out["loss"], **{name: share * out[name] for name in self.watched}}

    def _prompts(self, rollout: CaptionRollout, groups: Tensor) -> VLMInputs:
        """The prompts of some rows; with a graph where an embedding or the tower is trained, otherwise as they were encoded."""
        if {"vision_tower", "projector", "language_model"} & set(self.trained):
            return self._questions(rollout.images[groups.to(rollout.images.device)])
        return take_rows(rollout.inputs, groups)

    def log_probs(self, prompts: VLMInputs, tokens: Tensor, mask: Tensor) -> Tensor:
        """Of sampled tokens ``[R, T]`` behind their prompts: ``[R, T]``, 0 outside the mask."""
        found, _ = self.vlm.log_probs(self.vlm.with_answers(prompts, tokens, mask), self.captions.temperature)
        return found[:, -tokens.shape[1] :]  # entry i is that of token i + 1, and the tokens are the last of the sequence
