"""Second stage of UAE: the language model learns to write captions from which the image can be generated again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.equals import distinct
from umm_zoo.backbones.generation import Samples
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Batch, image_of_each_row
from umm_zoo.errors import Count
from umm_zoo.methods.uae.caption_policy import CaptionPolicy, CaptionRollout
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.renderers import Renderer
from umm_zoo.methods.uae.rollouts import Rollouts, SharedNoise, portions
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.outputs import Sampling
from umm_zoo.rewards.base import Reward


class GenerationForUnderstanding(CaptionPolicy[CaptionRollout]):
    """Stage of GRPO on the language model alone; connector, decoder, codec and reward stay frozen.

    Each step: the images are encoded once and captioned G times with the KV cache; the frozen renderer generates from every
    caption, from noise that its group shares; the reward compares the image generated with the one described; the tokens are scored
    once with a gradient. With one update per rollout the log-probabilities under the policy that wrote are those of this very pass,
    and nothing is scored twice. Equal captions of an image that start from the same noise give one image, generated and rewarded
    once; equal captions of an image are scored once, whatever their noise. No gradient passes through the renderer, whose condition
    the paper lets drift with the policy (``BaseTextReader`` does not).

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
    losses = {"loss": "aggregated"}
    watched = {"kl": "weight", "clip_fraction": "weight"}
    rollout_class = CaptionRollout

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: Renderer,
        reward: Reward,
        objective: GRPO,
        adapter: LoRA | None = None,
        captions: CaptionSampling | None = None,
        rollouts: Rollouts | None = None,
        num_steps: Count | None = 10,
    ) -> None:
        super().__init__(
            vlm=vlm,
            renderer=renderer,
            reward=reward,
            objective=objective,
            adapter=adapter,
            captions=captions,
            rollouts=rollouts,
            noise=SharedNoise(),
        )
        self.num_steps = num_steps

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> CaptionRollout:
        """Caption, generate, reward; nothing keeps a gradient."""
        images = image_of_each_row(batch)
        inputs, samples = self.write(images)
        seeds = self.noise(len(images), self.rollouts.group)
        with self.phases("generate", self.device):
            owners = [row for row in range(len(images)) for _ in range(self.rollouts.group)]
            firsts, places = distinct(zip(owners, samples.texts, seeds, strict=True))
            rows = portions(torch.tensor(firsts), self.rollouts.micro_batch)
            once = [image for some in rows for image in self.images_of_samples(samples, images, seeds, some)]
            generated = [once[place] for place in places]
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

    def images_of_samples(self, samples: Samples, images: list[Tensor], seeds: list[int], rows: Tensor) -> list[Tensor]:
        """Images of some captions, in the renderer's steps of training."""
        numbers = rows.tolist()
        return self.made_again(
            [samples.texts[row] for row in numbers],
            [seeds[row] for row in numbers],
            [images[row // self.rollouts.group] for row in numbers],
            Sampling(num_steps=self.num_steps),
        )

    def loss_parts(self, rollout: CaptionRollout) -> list[Callable[[], dict[str, Tensor]]]:
        """One part per portion of captions; one whose group is all alike counts in the mean, but carries no gradient."""
        return self.text_parts(rollout)
