"""Dual-GRPO: the language model learns to think and the decoder to generate what was thought, from one rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.generation import take_rows
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.batch import Batch, Tokens
from umm_zoo.errors import UserError
from umm_zoo.methods.dual_settings import Balance, ConstantBalance, ThoughtImages
from umm_zoo.methods.reasoning import Reasoner, told, words_of
from umm_zoo.methods.think_then_generate import Thinker
from umm_zoo.methods.uae.decoder_grpo import without
from umm_zoo.methods.uae.reinforcement import check_reference
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.methods.uae.rollouts import IndependentNoise, Phases, Rollouts, portions, rows_of
from umm_zoo.methods.uae.token_policy import TextPolicy, TextRollout
from umm_zoo.objectives.base import Predictor
from umm_zoo.objectives.flow_grpo import FlowGRPO, Trajectory
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.objectives.guidance import DetachedGuidance
from umm_zoo.rewards.base import Reward


@dataclass(kw_only=True)
class ThoughtRollout(TextRollout):
    """Rollout of J thoughts about each of B prompts and K images of each: R = B J thoughts, R K images, those of one side by side.

    Shape:
        - rewards: ``[B, J]``, means over the images of a thought; image_rewards ``[B, J, K]``, of the decoder
        - condition, negative: ``[R, N, E]``, of the rewrites; negative ``[1, N, E]``, None without guidance
        - path: states ``[S + 1, R K, C, h, w]``
        - marked: ``[R]``, 1 where the thought has its marker
        - image_advantages: ``[R K]``
    """

    image_rewards: Tensor
    condition: Tokens
    negative: Tokens | None
    path: Trajectory
    marked: Tensor
    image_advantages: Tensor


class DualGRPO(Thinker, TextPolicy[ThoughtRollout]):
    """Stage of reinforcement of both networks: GRPO on the tokens of thoughts, Flow-GRPO on the steps of images, from one rollout.

    Each step: J thoughts about each prompt; K images of the rewrite of each, sampled stochastically with all their steps; two
    rewards of every image. A thought's reward is the mean of the first over its images, and its advantage that among the J of its
    prompt. An image is rewarded by the second, under the rewrite that it was generated from in the place of the user's prompt, and
    compared with the images of the same thought (``ThoughtImages``): what a better thought brings is not the decoder's merit.

    Neither loss reaches the other's parts, and the renderer should read without the language model's adapter (``RewriteReader``),
    so that the condition of a text stays the same while the model learns to think. ``training.trained`` names ``adapter`` and
    ``decoder_adapter`` (or ``decoder``), ``AdamW.part_lr`` a learning rate for each.

    Not published, so our choice: J, K, the rewards' weights, what the decoder's advantage compares, learning rates.

    Reference: "Think-Then-Generate" (arXiv 2601.10332).

    Args:
        vlm, renderer, reasoner, adapter, decoder_adapter: see ``Thinker``; the reasoner's temperature is that of the draws.
        text_reward: of thoughts, by their images: what the prompt means (image-grounded semantics in the paper).
        image_reward: of images, given the rewrite (realism and aesthetics in the paper).
        objective: of the tokens.
        image_objective: of the steps; its advantage is ``BatchStandardised`` where it states none.
        rollouts: J is its ``group``; None is groups of 4. Noise is ``IndependentNoise`` unless said.
        images: K of each thought, and their comparison.
        balance: weights of the two losses; None is 1 and 1.

    Raises:
        ValueError: sizes disagree, thoughts without chance, single images to be compared with one another, a KL without an adapter
            to switch off, or a decoder whose steps are no flow's.
    """

    losses = {"text_loss": "aggregated", "image_loss": "scored"}
    watched = {
        "kl": "weight",
        "clip_fraction": "weight",
        "image_kl": "scored",
        "image_clip_fraction": "scored",
        "ratio_spread": "scored",
    }
    rollout_class = ThoughtRollout
    reward = None

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: CaptionRenderer,
        reasoner: Reasoner,
        text_reward: Reward,
        image_reward: Reward,
        objective: GRPO,
        image_objective: FlowGRPO,
        adapter: LoRA | None = None,
        decoder_adapter: LoRA | None = None,
        rollouts: Rollouts | None = None,
        images: ThoughtImages | None = None,
        balance: Balance | None = None,
    ) -> None:
        check_reference(objective.kl_weight, adapter, "an adapter")
        check_reference(image_objective.kl_weight, decoder_adapter, "a decoder_adapter")
        super().__init__(vlm, renderer, reasoner, adapter, decoder_adapter)
        self.text_reward, self.image_reward = text_reward, image_reward
        self.objective, self.image_objective = objective, image_objective
        self.rollouts, self.images = rollouts or Rollouts(group=4), images or ThoughtImages()
        self.balance, self.writing, self.phases = balance or ConstantBalance(), reasoner, Phases()
        self.noise = self.rollouts.noise or IndependentNoise()
        self.scale = renderer.guidance if self.images.guidance is None else self.images.guidance
        self._check(reasoner)
        if not isinstance(renderer.objective, FlowMatching):
            raise ValueError(f"renderer.objective: found {type(renderer.objective).__name__}, expected FlowMatching")
        image_objective.match(renderer.objective.schedule)

    def _check(self, reasoner: Reasoner) -> None:
        if reasoner.temperature <= 0:
            raise ValueError(f"reasoner.temperature: found {reasoner.temperature}, expected more than 0: thoughts are compared")
        if self.images.each < 2 and self.images.compared == "thought" and self.balance.ever()[1]:
            raise ValueError("images: found 1 of each thought, expected 2 or more where those of a thought are compared")

    def parts(self) -> dict[str, torch.nn.Module]:
        """As the base class, and the two rewards."""
        return {**super().parts(), "text_reward": self.text_reward, "image_reward": self.image_reward}

    def check_trained(self, trained: Sequence[str]) -> None:
        """As the base class; refuse a language model that would read otherwise while it learns to write, and the connector."""
        super().check_trained(trained)
        if "connector" in trained:
            raise UserError("training.trained", "'connector', which no reward reaches", "an adapter or the network of either side")
        if "language_model" in trained:
            expected = "adapter: its renderer reads with the language model as it was"
            raise UserError("training.trained", "'language_model'", expected)
        weights = dict(zip(("adapter", "decoder"), self.balance.ever(), strict=True))
        if not any(weights[name.removesuffix("_adapter")] for name in trained):
            raise UserError(
                "training.trained", f"{list(trained)}, whose loss has no weight", "a part of the side that method.balance weighs"
            )

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows that show an image."""
        batch.assert_no_images(type(self).__name__)

    # -- sampling ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> ThoughtRollout:
        """Think, generate, reward twice; nothing keeps a gradient."""
        assert self.reasoner is not None
        count, group, each = len(batch), self.rollouts.group, self.images.each
        with self.phases("think", self.device), evaluation_mode(self.vlm):
            how = self.reasoner
            inputs = self.vlm.embed(how.questions(batch), None, [0] * count, for_generation=True)
            samples = self.vlm.sample_from(inputs, group, how.max_new_tokens, how.temperature)
            thoughts = how.thoughts(batch, samples.texts)
            rewritten = told(batch.select([row for row in range(count) for _ in range(group)]), thoughts)
        with self.phases("generate", self.device):
            condition = self.condition(words_of(rewritten))
            negative = self.renderer.negative(self.vlm, 1, self.adapter) if self.scale != 1 else None
            noise = self.renderer.noise(self.noise(count, group * each), self.device)
            path = self._sampled(noise, condition, negative)
            places = portions(torch.arange(len(noise), device=self.device), self.rollouts.micro_batch)
            generated = [image for rows in places for image in self.renderer.decoded(path.samples[rows])]
        with self.phases("reward", self.device):
            of_thoughts = self.text_reward(generated, batch).view(count, group, each)
            of_images = self.image_reward(generated, rewritten).view(count, group, each)
        return ThoughtRollout(
            batch=batch,
            images=batch.requested if all(batch.has_target) else [],
            captions=samples.texts,
            generated=generated,
            rewards=of_thoughts.mean(dim=2),
            inputs=inputs,
            samples=samples,
            weights=self.objective.aggregation(samples.mask),
            image_rewards=of_images,
            condition=condition,
            negative=negative,
            path=path,
            marked=torch.tensor([float(thought.marked) for thought in thoughts], device=self.device),
            image_advantages=of_images.new_zeros(of_images.numel()),
        )

    def _sampled(self, noise: Tensor, condition: Tokens, negative: Tokens | None) -> Trajectory:
        """Ways from noise ``[R K, C, h, w]`` to images, in micro-batches."""
        parts = []
        for rows in portions(torch.arange(len(noise), device=self.device), self.rollouts.micro_batch):
            own = rows_of(condition, rows // self.images.each)
            parts.append(self.image_objective.rollout(self._velocity(negative, len(rows)), noise[rows], own))
        return Trajectory(torch.cat([part.states for part in parts], 1), torch.cat([part.log_probs for part in parts], 1))

    def _velocity(self, negative: Tokens | None, count: int) -> Predictor:
        """The decoder's, guided away from the negative prompt in ``count`` rows."""
        away = None if negative is None else rows_of(negative, torch.zeros(count, dtype=torch.long, device=self.device))
        return DetachedGuidance(self.renderer.decoder, away, self.scale)

    def set_advantages(self, rollouts: Sequence[ThoughtRollout]) -> None:
        """Of thoughts among those of their prompt, of images among those of their thought or prompt."""
        super().set_advantages(rollouts)
        first = 0 if self.images.compared == "thought" else 1
        groups = [rollout.image_rewards.flatten(first, first + 1) for rollout in rollouts]
        for rollout, own in zip(rollouts, self.advantages_of(rollouts, groups, self.image_objective), strict=True):
            rollout.image_advantages = own

    # -- scoring -------------------------------------------------------------------------------------------------------------

    def counts(self, rollout: ThoughtRollout) -> dict[str, float]:
        """As the base class; also ``scored``: images with an advantage, over which alone their loss is a mean."""
        return {**super().counts(rollout), "scored": float((rollout.image_advantages != 0).sum())}

    def described(self, rollout: ThoughtRollout) -> dict[str, tuple[Tensor, str]]:
        """As the base class; also the images' reward and the share of thoughts with their marker."""
        finite = rollout.image_rewards.nan_to_num(0.0)
        means = {"image_reward": finite.mean(), "marked": rollout.marked.mean()}
        return {**super().described(rollout), **{name: (value, "rows") for name, value in means.items()}}

    def prompts_of(self, rollout: ThoughtRollout, groups: Tensor) -> VLMInputs:
        """The questions as they were encoded: what embeds them is frozen."""
        return take_rows(rollout.inputs, groups)

    def loss_parts(self, rollout: ThoughtRollout) -> list[Callable[[], dict[str, Tensor]]]:
        """One part per portion of thoughts, and one per trained step and portion of images, of the losses that have a weight."""
        text, image = self.balance(self.step.number)
        parts: list[Callable[[], dict[str, Tensor]]] = []
        if text:
            parts += [partial(_renamed, part, {"loss": "text_loss"}) for part in self.text_parts(rollout, text)]
        if image:
            images = self.portions_of(rollout.image_advantages != 0)
            pairs = [(step, rows) for step in self.image_objective.trained_steps for rows in images]
            parts += [partial(self._image_part, rollout, *pair, image) for pair in pairs]
        if len(parts) == 1:  # by itself it would leave the other network's weights without a graph
            parts.append(lambda: {"text_loss": torch.zeros((), device=self.device)})
        return parts

    def _image_part(self, rollout: ThoughtRollout, step: int, rows: Tensor, weight: float) -> dict[str, Tensor]:
        """The share of one step of some images in the loss, which is the mean over all scored images and trained steps."""
        velocity = self._velocity(rollout.negative, len(rows))
        adapter = self.decoder_adapter if self.image_objective.kl_weight else None
        reference = None if adapter is None else partial(without, adapter, velocity)
        path = Trajectory(rollout.path.states[:, rows], rollout.path.log_probs[:, rows])
        condition, gains = rows_of(rollout.condition, rows // self.images.each), rollout.image_advantages[rows]
        out = self.image_objective.step_loss(velocity, path, step, condition, gains, reference)
        share = len(rows) / (float((rollout.image_advantages != 0).sum()) * len(self.image_objective.trained_steps))
        names = {"loss": "image_loss", "kl": "image_kl", "clip_fraction": "image_clip_fraction", "ratio_spread": "ratio_spread"}
        weights = {"loss": weight * share}
        return {names[name]: weights.get(name, share) * value for name, value in out.items()}


def _renamed(part: Callable[[], dict[str, Tensor]], names: dict[str, str]) -> dict[str, Tensor]:
    """The values of a part by other names."""
    return {names.get(name, name): value for name, value in part().items()}
