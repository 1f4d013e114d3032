"""UAE's third stage: the decoder learns to draw all that a caption says, by Flow-GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Batch, Tokens, image_of_each_row
from umm_zoo.methods.uae.pretraining import CAPTION_PROMPT, UAEBase
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.methods.uae.rollouts import GroupNoise, IndependentNoise, Phases, portions, rows_of
from umm_zoo.objectives.accumulation import accumulated
from umm_zoo.objectives.base import Predictor
from umm_zoo.objectives.flow_grpo import DetachedGuidance, FlowGRPO, Trajectory
from umm_zoo.rewards.base import Reward
from umm_zoo.training.optimization import OptimizerFactory, Schedule


@dataclass
class DrawingRollout:
    """B captions, G drawings of each.

    Shape:
        - condition, negative: ``[R, N, E]``, R = B * G; negative None without guidance
        - path: states ``[S + 1, R, C, h, w]``; drawn ``[R, 3, H, W]``; rewards ``[B, G]``; advantages ``[R]``
    """

    batch: Batch
    images: Tensor
    captions: list[str]
    condition: Tokens
    negative: Tokens | None
    path: Trajectory
    drawn: Tensor
    rewards: Tensor
    advantages: Tensor
    times_used: int = 0


class UnderstandingForGeneration(UAEBase):
    """Flow-GRPO on the decoder; the language model that writes and reads the captions stays frozen.

    Each step: one caption per image, G stochastic drawings of it with all their steps, the reward of the last state, and the
    clipped surrogate of every trained step, each with its own backward pass. The reference of the KL is the decoder with its
    adapter switched off. Evaluation stays deterministic, with the renderer's own sampler.

    The paper gives no numbers for this stage; defaults are Flow-GRPO's released ones (group 24, guidance 4.5 here and in training).

    Reference: Yan et al., 2025, arXiv 2509.09666 (versions 1 to 3); Liu et al., 2025, arXiv 2505.05470.

    Args:
        vlm: writes and reads captions, with the second stage's adapter.
        renderer: its decoder is trained.
        reward: of a drawing.
        objective: of the steps.
        optimizer: builds the optimiser; AdamW at 3e-4 with weight decay 1e-4 for an adapter in Flow-GRPO.
        trained: ``decoder_adapter``, or ``decoder`` for all of it (which needs a learning rate of 1e-5 to 5e-5).
        schedule: learning rate over the steps; None is constant.
        adapter: that of the second stage, frozen.
        decoder_adapter: rank 32, alpha 64 on the attention projections; None trains the decoder's own weights.
        group: G.
        noise: seeds of the initial noise; None is ``IndependentNoise``.
        guidance: scale in sampling and training, the unconditional branch detached; None is the renderer's own.
        updates_per_rollout: optimiser steps on the same drawings; of more than 1 the loader's batches in between are not looked at.
        micro_batch: drawings that are sampled, or scored with a gradient, at a time; None is all.
        from_true_captions: draw from the captions of the data instead of the model's own (our addition, a control).
        prompt: asks for the caption.
        max_new_tokens: longest caption.
        temperature: of the captions.
        num_drawn_batches: batches of each validation that are captioned and redrawn; None is all.

    Raises:
        ValueError: sizes disagree, a group of one, or a KL without an adapter to switch off.
    """

    renderer: CaptionRenderer
    reward: Reward

    def __init__(
        self,
        vlm: Qwen25VL,
        renderer: CaptionRenderer,
        reward: Reward,
        objective: FlowGRPO,
        optimizer: OptimizerFactory,
        trained: list[str],
        schedule: Schedule | None = None,
        adapter: LoRA | None = None,
        decoder_adapter: LoRA | None = None,
        group: int = 24,
        noise: GroupNoise | None = None,
        guidance: float | None = 4.5,
        updates_per_rollout: int = 1,
        micro_batch: int | None = None,
        from_true_captions: bool = False,
        prompt: str = CAPTION_PROMPT,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        num_drawn_batches: int | None = None,
    ) -> None:
        if group < 2 or updates_per_rollout < 1:
            raise ValueError(f"method: group must be >= 2 and updates_per_rollout >= 1, found {group} and {updates_per_rollout}")
        if objective.kl_weight and decoder_adapter is None:
            raise ValueError(
                f"objective.kl_weight: found {objective.kl_weight}, expected without a decoder_adapter is 0: the reference is the "
                "decoder with its adapter switched off"
            )
        super().__init__(
            vlm,
            renderer,
            optimizer,
            trained,
            schedule,
            adapter,
            decoder_adapter,
            reward,
            prompt,
            max_new_tokens,
            temperature,
            num_drawn_batches,
        )
        self.objective, self.group, self.noise = objective, group, noise or IndependentNoise()
        self.guidance = renderer.guidance if guidance is None else guidance
        self.updates_per_rollout, self.micro_batch = updates_per_rollout, micro_batch
        self.from_true_captions = from_true_captions
        self.phases = Phases()
        self.rollout: DrawingRollout | None = None

    # -- one step ------------------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, and what to watch: rewards, their spread, clipping, KL, seconds per phase."""
        self.phases.restart()
        if self.rollout is None or self.rollout.times_used >= self.updates_per_rollout:
            self.rollout = self.roll_out(batch)
        rollout, steps = self.rollout, self.objective.trained_steps
        wanted = torch.ones_like(rollout.advantages, dtype=torch.bool) if self.objective.kl_weight else rollout.advantages != 0
        rows = portions(wanted.nonzero()[:, 0], self.micro_batch)
        logs: list[dict[str, Tensor]] = []
        with self.phases("score", self.device):
            parts = [partial(self._part, rollout, step, some, logs) for step in steps for some in rows]
            loss = accumulated(parts, [p for p in self.parameters() if p.requires_grad])
        rollout.times_used += 1
        finite = rollout.rewards.nan_to_num(0.0)
        summary = {
            "loss": loss,
            "reward": finite.mean(),
            "reward_std": finite.std(dim=1).mean(),
            "zero_advantage": (rollout.advantages.unflatten(0, finite.shape) == 0).all(dim=1).float().mean(),
        }
        for name in ("kl", "clip_fraction", "ratio_spread"):
            summary[name] = torch.stack([log[name] for log in logs]).sum() if logs else torch.zeros_like(loss)
        seconds = {f"seconds/{name}": torch.tensor(value) for name, value in self.phases.seconds.items()}
        return {**summary, **seconds}

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> DrawingRollout:
        """Caption, sample, score; nothing keeps a gradient."""
        images = image_of_each_row(batch)
        size, group = len(images), self.group
        with self.phases("caption", self.device):
            captions = batch.answers() if self.from_true_captions else self.caption(images).texts
            one = self.renderer.condition(self.vlm, captions, images, self.adapter)
            mask = None if one.mask is None else one.mask.repeat_interleave(group, 0)
            condition = Tokens(one.values.repeat_interleave(group, 0), mask)  # [R, N, E]
            negative = self.renderer.negative(self.vlm, size * group, self.adapter) if self.guidance != 1 else None
        noise = self.renderer.noise(self.noise(size, group), self.device)
        with self.phases("draw", self.device):
            paths, drawn = [], []
            for rows in portions(torch.arange(len(noise), device=self.device), self.micro_batch):
                velocity = self._velocity(negative, rows)
                paths.append(self.objective.rollout(velocity, noise[rows], rows_of(condition, rows)))
                drawn.append(self.renderer.decoded(paths[-1].samples))
            path = Trajectory(torch.cat([p.states for p in paths], 1), torch.cat([p.log_probs for p in paths], 1))
        with self.phases("reward", self.device):
            candidates = torch.cat(drawn)
            rewards = self.reward(candidates, batch).unflatten(0, (size, group))
        advantages = self.objective.advantage(rewards).flatten()
        return DrawingRollout(batch, images, list(captions), condition, negative, path, candidates, rewards, advantages)

    def _velocity(self, negative: Tokens | None, rows: Tensor) -> Predictor:
        return DetachedGuidance(self.renderer.decoder, None if negative is None else rows_of(negative, rows), self.guidance)

    def _part(self, rollout: DrawingRollout, step: int, rows: Tensor, logs: list[dict[str, Tensor]]) -> Tensor:
        """The share of one step of some drawings in the loss, which is the mean over all drawings and trained steps."""
        velocity = self._velocity(rollout.negative, rows)
        adapter = self.decoder_adapter if self.objective.kl_weight else None
        reference = None if adapter is None else partial(_without, adapter, velocity)
        some = Trajectory(rollout.path.states[:, rows], rollout.path.log_probs[:, rows])
        out = self.objective.step_loss(velocity, some, step, rows_of(rollout.condition, rows), rollout.advantages[rows], reference)
        share = len(rows) / (len(rollout.advantages) * len(self.objective.trained_steps))
        logs.append({name: share * out[name] for name in ("kl", "clip_fraction", "ratio_spread")})
        return share * out["loss"]

    # -- for callbacks -------------------------------------------------------------------------------------------------------

    def rollout_outputs(self) -> tuple[dict[str, Any], Batch] | None:
        """The first drawing of each row of the last rollout as metrics want it, and its batch; ``RolloutMetrics`` asks."""
        if self.rollout is None:
            return None
        outputs = {
            "answers": self.rollout.captions,
            "generated": self.rollout.drawn[:: self.group],
            "originals": self.rollout.images,
        }
        return outputs, self.rollout.batch


def _without(adapter: LoRA, velocity: Predictor, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
    with adapter.disabled():
        return velocity(noisy, time, condition)
