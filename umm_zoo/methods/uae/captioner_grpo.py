"""UAE's second stage: the language model learns to write captions from which the image can be drawn again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.generation import Samples
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Batch, image_of_each_row
from umm_zoo.methods.uae.pretraining import CAPTION_PROMPT, UAEBase
from umm_zoo.methods.uae.renderers import Renderer
from umm_zoo.methods.uae.rollouts import GroupNoise, Phases, SharedNoise, portions
from umm_zoo.objectives.accumulation import accumulated
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.rewards.base import Reward
from umm_zoo.training.optimization import OptimizerFactory, Schedule


@dataclass
class CaptionRollout:
    """B images, G captions of each, what was drawn from them and what that is worth.

    Shape:
        - inputs: the B prompts, embedded; no graph
        - samples: R = B * G captions
        - drawn: ``[R, 3, H, W]``; rewards ``[B, G]``; advantages ``[R]``; weights ``[R, T]``
        - old: ``[R, T]`` log-probabilities under the policy that wrote, once they are needed; None before
    """

    batch: Batch
    images: Tensor
    inputs: VLMInputs
    samples: Samples
    drawn: Tensor
    rewards: Tensor
    advantages: Tensor
    weights: Tensor
    old: Tensor | None = None
    times_used: int = 0


class GenerationForUnderstanding(UAEBase):
    """GRPO on the language model alone; connector, decoder, codec, vision tower and reward stay frozen.

    Each step: the images are encoded once and captioned G times with the KV cache; every caption is drawn by the frozen renderer,
    from noise that its group shares; the reward compares drawing and image; the tokens are scored once with a gradient. With one
    update per rollout the log-probabilities under the policy that wrote are those of this very pass, and nothing is scored twice.
    No gradient passes through the renderer, whose condition the paper lets drift with the policy (``BaseTextReader`` does not).

    In the paper's fourth and fifth versions this is the whole method, applied to existing models: the renderer is then a
    ``BridgeRenderer``.

    Defaults are the paper's where it has any (G 4, temperature 1, KL weight 1e-6 in ``GRPO``).

    Reference: Yan et al., 2025, arXiv 2509.09666, section 2 and supplement 3.

    Args:
        vlm: the captioner.
        renderer: draws the captions.
        reward: of a drawing.
        objective: of the tokens.
        optimizer: builds the optimiser; AdamW at 1e-6 in the paper.
        trained: ``adapter``, or ``language_model`` for all of it; the vision tower must stay frozen (``vision_tower`` is for the
            control in which it does not).
        schedule: learning rate over the steps; None is constant.
        adapter: rank 32, alpha 64 on all linear layers in the release; None trains the weights themselves.
        group: G.
        noise: seeds of a group; None is ``SharedNoise``.
        draw_steps: of sampling while training; 10 in the released cold start, None is the renderer's own.
        updates_per_rollout: optimiser steps on the same captions; 1 is on-policy, of more the loader's batches in between are not
            looked at.
        micro_batch: captions that are drawn, or scored with a gradient, at a time; None is all.
        prompt: asks for the caption.
        max_new_tokens: longest caption.
        temperature: of the captions.
        num_drawn_batches: batches of each validation that are captioned and redrawn; None is all.

    Raises:
        ValueError: sizes disagree, a group of one, or a KL without an adapter to switch off.
    """

    reward: Reward

    def __init__(
        self,
        vlm: Qwen25VL,
        renderer: Renderer,
        reward: Reward,
        objective: GRPO,
        optimizer: OptimizerFactory,
        trained: list[str],
        schedule: Schedule | None = None,
        adapter: LoRA | None = None,
        group: int = 4,
        noise: GroupNoise | None = None,
        draw_steps: int | None = 10,
        updates_per_rollout: int = 1,
        micro_batch: int | None = None,
        prompt: str = CAPTION_PROMPT,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        num_drawn_batches: int | None = None,
    ) -> None:
        if group < 2 or updates_per_rollout < 1 or temperature <= 0:
            raise ValueError(
                "method: group must be >= 2, updates_per_rollout >= 1 and temperature > 0, "
                f"found {group}, {updates_per_rollout} and {temperature}"
            )
        if objective.kl_weight and adapter is None:
            raise ValueError(
                f"objective.kl_weight: found {objective.kl_weight}, expected without an adapter is 0: the reference policy is the "
                "model with its adapter switched off"
            )
        super().__init__(
            vlm,
            renderer,
            optimizer,
            trained,
            schedule,
            adapter,
            None,
            reward,
            prompt,
            max_new_tokens,
            temperature,
            num_drawn_batches,
        )
        self.objective, self.group, self.noise = objective, group, noise or SharedNoise()
        self.draw_steps, self.updates_per_rollout, self.micro_batch = draw_steps, updates_per_rollout, micro_batch
        self.phases = Phases()
        self.rollout: CaptionRollout | None = None
        # an embedding or a tower that is trained must be run again with a graph; otherwise the prompts are embedded once
        embedding = [vlm.parts()["vision_tower"], vlm.parts()["projector"], vlm.model.get_input_embeddings()]
        self._embeds_anew = any(p.requires_grad for part in embedding for p in part.parameters())

    # -- one step ------------------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, and what to watch: rewards, their spread within groups, lengths, entropy, clipping, KL, seconds per phase."""
        self.phases.restart()
        if self.rollout is None or self.rollout.times_used >= self.updates_per_rollout:
            self.rollout = self.roll_out(batch)
        rollout = self.rollout
        if self.updates_per_rollout > 1 and rollout.old is None:
            rollout.old = torch.zeros_like(rollout.samples.log_probs)
        logs: list[dict[str, Tensor]] = []
        with self.phases("score", self.device):
            parts = [partial(self._part, rollout, rows, logs) for rows in self._scored_rows(rollout)]
            # a single part keeps its graph; several give theirs up one after the other
            loss = parts[0]() if len(parts) == 1 else accumulated(parts, [p for p in self.parameters() if p.requires_grad])
        rollout.times_used += 1
        summary = {"loss": loss, **self._watched(rollout)}
        for name in ("kl", "clip_fraction"):
            summary[name] = torch.stack([log[name] for log in logs]).sum() if logs else torch.zeros_like(loss)
        seconds = {f"seconds/{name}": torch.tensor(value) for name, value in self.phases.seconds.items()}
        return {**summary, **seconds}

    def _scored_rows(self, rollout: CaptionRollout) -> list[Tensor]:
        """Captions in portions; those that carry no gradient, because their group is all alike, are left out."""
        wanted = torch.ones_like(rollout.advantages, dtype=torch.bool) if self.objective.kl_weight else rollout.advantages != 0
        return portions(wanted.nonzero()[:, 0], self.micro_batch)

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> CaptionRollout:
        """Caption, draw, score; nothing keeps a gradient."""
        images = image_of_each_row(batch)
        size = len(images)
        with self.phases("caption", self.device):
            with evaluation_mode(self.vlm):
                inputs = self.vlm.embed(self.caption_prompts(size), images, [1] * size, for_generation=True)
            samples = self.vlm.sample_from(inputs, self.group, self.max_new_tokens, self.temperature)
        seeds = self.noise(size, self.group)
        with self.phases("draw", self.device):
            drawn = [self._drawn(samples, images, seeds, rows) for rows in portions(torch.arange(len(seeds)), self.micro_batch)]
        with self.phases("reward", self.device):
            candidates = torch.cat(drawn)
            rewards = self.reward(candidates, batch).unflatten(0, (size, self.group))  # [B, G]
        advantages = self.objective.advantage(rewards).flatten()
        weights = self.objective.aggregation(samples.mask)
        return CaptionRollout(batch, images, inputs, samples, candidates, rewards, advantages, weights)

    def _drawn(self, samples: Samples, images: Tensor, seeds: list[int], rows: Tensor) -> Tensor:
        numbers = rows.tolist()
        return self.renderer.draw(
            self.vlm,
            [samples.texts[row] for row in numbers],
            [seeds[row] for row in numbers],
            images[(rows // self.group).to(images.device)],
            self.adapter,
            self.draw_steps,
        )

    def _part(self, rollout: CaptionRollout, rows: Tensor, logs: list[dict[str, Tensor]]) -> Tensor:
        """The share of some captions in the loss."""
        tokens, mask = rollout.samples.tokens[rows], rollout.samples.mask[rows]
        length = int(mask.sum(dim=1).max())
        tokens, mask = tokens[:, :length], mask[:, :length]
        prompts = self._prompts(rollout, rows // self.group)
        scored = self._log_probs(prompts, tokens, mask)
        reference = None
        if self.objective.kl_weight and self.adapter is not None:
            with torch.no_grad(), self.adapter.disabled():
                reference = self._log_probs(prompts, tokens, mask)
        old = None
        if rollout.old is not None:
            if rollout.times_used == 0:
                rollout.old[rows, :length] = scored.detach().to(rollout.old.dtype)
            old = rollout.old[rows, :length]
        weights = rollout.weights[rows, :length]
        out = self.objective(scored, mask, rollout.advantages[rows], old, reference, weights)
        share = weights.sum() / rollout.weights.sum().clamp(min=1e-12)
        logs.append({name: share * out[name] for name in ("kl", "clip_fraction")})
        return out["loss"]

    def _prompts(self, rollout: CaptionRollout, groups: Tensor) -> VLMInputs:
        """The prompts of some rows."""
        if self._embeds_anew:
            with evaluation_mode(self.vlm):
                images = rollout.images[groups.to(rollout.images.device)]
                count = len(groups)
                return self.vlm.embed(self.caption_prompts(count), images, [1] * count, for_generation=True)
        own = rollout.inputs
        return replace(
            own,
            token_ids=own.token_ids[groups],
            embeddings=own.embeddings[groups],
            attention_mask=own.attention_mask[groups],
            position_ids=own.position_ids.index_select(own.position_ids.ndim - 2, groups),
            labels=own.labels[groups],
            image_mask=own.image_mask[groups],
        )

    def _log_probs(self, prompts: VLMInputs, tokens: Tensor, mask: Tensor) -> Tensor:
        """Of the drawn tokens, ``[rows, T]``, 0 outside the mask."""
        found, _ = self.vlm.log_probs(self.vlm.with_answers(prompts, tokens, mask), self.temperature)
        return found[:, -tokens.shape[1] :]  # entry i is that of token i + 1, and the tokens are the last of the sequence

    @torch.no_grad()
    def _watched(self, rollout: CaptionRollout) -> dict[str, Tensor]:
        rewards, samples = rollout.rewards, rollout.samples
        lengths = samples.mask.sum(dim=1).float()
        finite = rewards.nan_to_num(0.0)
        return {
            "reward": finite.mean(),
            "reward_std": finite.std(dim=1).mean(),
            "zero_advantage": (rollout.advantages.unflatten(0, rewards.shape) == 0).all(dim=1).float().mean(),
            "caption_tokens": lengths.mean(),
            "at_limit": (lengths == self.max_new_tokens).float().mean(),
            # minus the log-probability of what was drawn: the entropy's unbiased estimate, per token
            "entropy": -samples.log_probs.sum() / samples.mask.sum().clamp(min=1),
        }

    # -- for callbacks -------------------------------------------------------------------------------------------------------

    def rollout_outputs(self) -> tuple[dict[str, Any], Batch] | None:
        """The first caption of each row of the last rollout as metrics want it, and its batch; ``RolloutMetrics`` asks."""
        if self.rollout is None:
            return None
        first = slice(None, None, self.group)
        outputs = {
            "answers": self.rollout.samples.texts[first],
            "generated": self.rollout.drawn[first],
            "originals": self.rollout.images,
        }
        return outputs, self.rollout.batch


__all__ = ["CaptionRollout", "GenerationForUnderstanding"]
