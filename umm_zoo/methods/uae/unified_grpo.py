"""UAE's second family: one model learns to write captions, and to generate the image again from them, by one reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.unified import ImageSamples
from umm_zoo.batch import Batch, Task, image_of_each_row
from umm_zoo.method import MakeOptimizer
from umm_zoo.methods.uae.caption_policy import CaptionPolicy, CaptionRollout
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.rollouts import IndependentNoise, Rollouts, SharedNoise, portions
from umm_zoo.methods.uae.segments import SEGMENTS, ImageSampling, Segment, SegmentWeights
from umm_zoo.methods.uae.token_renderer import TokenRenderer, unified
from umm_zoo.objectives.grpo import GRPO, ConstantLength
from umm_zoo.outputs import Outputs
from umm_zoo.rewards.base import Reward

#: What stands before the names of values that are watched.
_PREFIXES: dict[Segment, str] = {"text": "", "image": "image_"}


@dataclass(kw_only=True)
class UnifiedRollout(CaptionRollout):
    """Rollout of G captions of each row and K images of each caption: I = R K images, those of a caption side by side.

    ``rewards`` are those of captions, the means over their images.

    Shape:
        - image_ids, image_weights: ``[I, N]``
        - image_log_probs: ``[I, N]``, of the sampler: to be watched, never to be learnt from
        - image_rewards: ``[B, G, K]``; image_advantages ``[I]``
        - image_old: ``[I, N]``, as ``old``
    """

    image_ids: Tensor
    image_log_probs: Tensor
    image_weights: Tensor
    image_rewards: Tensor
    image_advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    image_old: Tensor | None = None


class UnifiedCaptionAndDrawing(CaptionPolicy[UnifiedRollout]):
    """Stage of GRPO on one autoregressive model, which writes a caption and generates the image again from it (Janus).

    Each step: the images are captioned G times; each caption is read in a new conversation, which holds its text and no image, and
    the model draws image tokens behind it; one reward, of the decoded image against the one described, is that of both segments.
    Its tokens are scored once with a gradient: those of the caption behind the image, those of the image behind the caption. The
    vision tower, the projector, and all that belongs to image tokens alone (codec, embeddings, projector, head) stay frozen.

    Where several updates use a rollout the old log-probabilities are computed again as in training: in bfloat16 those of the
    cached sampler are off by more than the clip. The reference of the KL is the model with its adapter switched off, under the same
    scoring. Noise is independent within a group: of images drawn from shared random numbers the group's mean depends on the very
    draws that it is a baseline for.

    Trained is ``adapter``, or ``language_model`` for all of it. The paper states G 4, a learning rate of 1e-6, temperature 1 and a
    KL weight of 1e-6, and neither the contexts nor the scoring of image tokens; public code of the same kind differs:

    ========================  =======================================================================================
    T2I-R1 (7B)               G 8, ``scoring: conditional``, ``concatenated`` with ``TokenMean``, KL weight .01, 1e-6
    ULM-R1 (1B)               G 8, ``scoring: conditional``, the two means added (``SequenceMean``), KL weight 0, 4e-6
    UniRL                     ``scoring: guided``, clip 1e-2, an adapter at 1e-4
    ========================  =======================================================================================

    All three sample with guidance 5. At guidance 1 the scorings are one, and no second row is run.

    Reference: Yan et al., 2025, arXiv 2509.09666, section 2; T2I-R1 (arXiv 2505.00703); ULM-R1 (arXiv 2505.17534).

    Args:
        vlm: reads and generates.
        renderer: guidance and temperature, in training as in use.
        reward, captions: see ``UAEBase``.
        objective: of the tokens; its aggregation weighs those of captions. Clip 1e-2 where guidance is 5 or more (our choice).
        adapter: None trains the weights themselves.
        rollouts: groups and their use; None is groups of 4. Noise is ``IndependentNoise`` unless said.
        segments: what is trained, of ``text`` and ``image``. ``text`` alone is the first family's objective with this renderer, and
            lets the images drift with the shared weights; ``image`` alone learns to draw what the model writes.
        weights: of the segments in the loss.
        images: of a caption.

    Raises:
        ValueError: sizes disagree, captions or image tokens without chance, noise that is shared, a KL without an adapter to
            switch off, or log-probabilities that are not those of the sampled distribution where a ratio is made of them.
    """

    trainable = ("adapter", "language_model")
    rollout_class = UnifiedRollout
    renderer: TokenRenderer

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: TokenRenderer,
        reward: Reward,
        objective: GRPO,
        adapter: LoRA | None = None,
        captions: CaptionSampling | None = None,
        rollouts: Rollouts | None = None,
        segments: Sequence[Segment] = ("text", "image"),
        weights: SegmentWeights | None = None,
        images: ImageSampling | None = None,
    ) -> None:
        super().__init__(
            vlm=vlm,
            renderer=renderer,
            reward=reward,
            objective=objective,
            adapter=adapter,
            captions=captions,
            rollouts=rollouts,
            noise=IndependentNoise(),
        )
        self.segments = [name for name in SEGMENTS if name in segments]
        if not self.segments or set(segments) - set(SEGMENTS):
            raise ValueError(f"segments: found {list(segments)}, expected one or both of {', '.join(SEGMENTS)}")
        self.weights, self.images = weights or SegmentWeights(), images or ImageSampling()
        self.scale = renderer.guidance if self.images.scoring == "guided" else 1.0
        self._check()
        units = {"text": "aggregated", "image": "aggregated" if self.weights.concatenated else "rows"}
        self.losses = {f"{segment}_loss": units[segment] for segment in self.segments}
        prefixes = [_PREFIXES[segment] for segment in self.segments]
        self.watched = {f"{prefix}{name}": f"{prefix}weight" for prefix in prefixes for name in ("kl", "clip_fraction")}

    def _check(self) -> None:
        shared, trained = isinstance(self.noise, SharedNoise), "image" in self.segments
        if shared and (trained or self.images.per_caption > 1):
            what = "the segment image is trained" if trained else f"there are {self.images.per_caption} images of a caption"
            raise ValueError(f"rollouts.noise: found SharedNoise, expected IndependentNoise where {what}")
        if trained and (self.renderer.temperature <= 0 or self.renderer.top_k is not None):
            found = f"temperature {self.renderer.temperature} and top_k {self.renderer.top_k}"
            raise ValueError(f"renderer: found {found}, expected more than 0 and no top_k where the segment image is trained")
        if trained and self.scale != self.renderer.guidance and self.rollouts.updates_per_rollout > 1:
            found = f"conditional with {self.rollouts.updates_per_rollout} updates per rollout"
            raise ValueError(f"images.scoring: found {found}, expected guided: its ratios are not those of what was sampled")

    def train_only(self, trained: Sequence[str], make_optimizer: MakeOptimizer | None = None) -> None:
        """As the base class; without the segment ``text`` the output layer of words stays as it is, for no gradient reaches it."""
        super().train_only(trained, make_optimizer)
        if "text" not in self.segments:
            tied = self.vlm.token_embeddings
            for parameter in self.vlm.lm_head.parameters():
                parameter.requires_grad_(parameter is tied and parameter.requires_grad)

    # -- sampling ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> UnifiedRollout:
        """Caption, draw, reward; nothing keeps a gradient."""
        images, group, each = image_of_each_row(batch), self.rollouts.group, self.images.per_caption
        inputs, samples = self.write(images)
        with self.phases("generate", self.device):
            drawn, generated = self._draw(samples.texts, self.noise(len(images), group * each))
        rewards = self.judge(generated, batch).unflatten(1, (group, each))
        text, image = self._token_weights(samples.mask, drawn.ids)
        return UnifiedRollout(
            batch=batch,
            images=images,
            captions=samples.texts,
            generated=generated,
            rewards=rewards.mean(dim=2),
            inputs=inputs,
            samples=samples,
            weights=text,
            image_ids=drawn.ids,
            image_log_probs=drawn.log_probs,
            image_weights=image,
            image_rewards=rewards,
        )

    def _draw(self, captions: Sequence[str], seeds: Sequence[int]) -> tuple[ImageSamples, list[Tensor]]:
        """K images of each caption, a micro-batch at a time."""
        each, size = self.images.per_caption, self.rollouts.micro_batch
        drawn: list[ImageSamples] = []
        generated: list[Tensor] = []
        for rows in portions(torch.arange(len(captions)), size and max(1, size // each)):
            first, last = int(rows[0]), int(rows[-1]) + 1
            drawn.append(self.renderer.draw(self.vlm, captions[first:last], seeds[first * each : last * each]))
            generated += self.renderer.images(self.vlm, drawn[-1].ids)
        samples = ImageSamples(torch.cat([one.ids for one in drawn]), torch.cat([one.log_probs for one in drawn]))
        return samples, generated

    def _token_weights(self, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens of captions ``[R, T]`` and of images ``[I, N]``: an image always has all of its own."""
        if not self.weights.concatenated:
            return self.objective.aggregation(mask), ConstantLength(ids.shape[1])(torch.ones_like(ids, dtype=torch.bool))
        text, image = self.objective.aggregation(self._pairs(mask, ids)).split([mask.shape[1], ids.shape[1]], dim=1)
        return text.unflatten(0, (len(mask), -1)).sum(dim=1), image

    def _pairs(self, mask: Tensor, ids: Tensor) -> Tensor:
        """Tokens of each image behind those of its caption, ``[I, T + N]`` bool."""
        return torch.cat([mask.repeat_interleave(len(ids) // len(mask), dim=0), torch.ones_like(ids, dtype=torch.bool)], dim=1)

    def set_advantages(self, rollouts: Sequence[UnifiedRollout]) -> None:
        """See ``ImageSampling.compared``; of one image per caption, and of all of a row, a caption's is the mean of its images'."""
        each = self.images.per_caption
        if each > 1 and self.images.compared == "caption":
            super().set_advantages(rollouts)
            own = self.advantages_of(rollouts, [rollout.image_rewards.flatten(0, 1) for rollout in rollouts])
        else:
            own = self.advantages_of(rollouts, [rollout.image_rewards.flatten(1) for rollout in rollouts])
            for rollout, advantages in zip(rollouts, own, strict=True):
                rollout.advantages = advantages.unflatten(0, (-1, each)).mean(dim=1)
        for rollout, advantages in zip(rollouts, own, strict=True):
            rollout.image_advantages = advantages

    # -- scoring -------------------------------------------------------------------------------------------------------------

    def counts(self, rollout: UnifiedRollout) -> dict[str, float]:
        """As the base class; also the weight of image tokens."""
        counts = super().counts(rollout)
        over = float(counts["rows"])  # of images every row has as many
        if self.weights.concatenated:
            over = float(self.objective.aggregation.count(self._pairs(rollout.samples.mask, rollout.image_ids)))
            counts |= {"aggregated": over, "weight": over * float(rollout.weights.sum())}
        return {**counts, "image_weight": over * float(rollout.image_weights.sum())}

    def described(self, rollout: UnifiedRollout) -> dict[str, tuple[Tensor, str]]:
        """As the base class; also the entropy of image tokens."""
        return {**super().described(rollout), "image_entropy": (-rollout.image_log_probs.mean(), "rows")}

    def loss_parts(self, rollout: UnifiedRollout) -> list[Callable[[], dict[str, Tensor]]]:
        """One part per portion of captions and one per portion of images, of the segments that are trained."""
        parts: list[Callable[[], dict[str, Tensor]]] = []
        if "text" in self.segments:
            parts += [partial(_named, part, "text") for part in self.text_parts(rollout, self.weights.text)]
        if "image" in self.segments:
            if self.rollouts.updates_per_rollout > 1 and rollout.image_old is None:
                rollout.image_old = torch.zeros_like(rollout.image_log_probs)
            rows = self.portions_of(self.scored(rollout.image_advantages))
            parts += [partial(_named, partial(self._image_part, rollout, some), "image") for some in rows]
        return parts

    def _image_part(self, rollout: UnifiedRollout, rows: Tensor) -> dict[str, Tensor]:
        """The share of some images in the loss."""
        ids = rollout.image_ids[rows]
        captions = [rollout.captions[row] for row in (rows // self.images.per_caption).tolist()]
        return self.surrogate(
            partial(self.image_log_probs, captions, ids),
            torch.ones_like(ids, dtype=torch.bool),
            self.weights.image * rollout.image_advantages[rows],
            rollout.image_weights,
            rollout.image_old,
            rows,
            rollout.times_used == 0,
        )

    def image_log_probs(self, captions: Sequence[str], ids: Tensor) -> Tensor:
        """Of image tokens ``[I, N]`` behind their captions, whatever image these describe: ``[I, N]``."""
        prompts = self.renderer.prompt(self.vlm, captions)
        return unified(self.vlm).image_log_probs(prompts, ids, self.scale, self.renderer.temperature)

    # -- validation ----------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """As the base class; where all rows ask questions (``Task.QUESTION``) these are answered, and nothing is generated."""
        if any(task is not Task.QUESTION for task in batch.tasks):
            return super().validation_step(batch, batch_idx)
        names = ("reward", "mean_caption_tokens")
        none, counts = dict.fromkeys(names, torch.zeros((), device=self.device)), dict.fromkeys(names, 0.0)
        return Outputs(none, counts, answers=self.answer(batch, self.wanted.max_new_tokens))


def _named(part: Callable[[], dict[str, Tensor]], segment: Segment) -> dict[str, Tensor]:
    """The values of a part, by the names of its segment."""
    return {f"{segment}_loss" if name == "loss" else f"{_PREFIXES[segment]}{name}": value for name, value in part().items()}
