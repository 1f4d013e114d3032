"""Base class of UAE's stages: a captioner, a renderer, and their use together."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.generation import Samples
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.batch import Batch, Images, image_of_each_row, stacked
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.methods.requests import request_batch
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.renderers import CaptionRenderer, Renderer
from umm_zoo.outputs import Outputs, Sampling, in_groups
from umm_zoo.rewards.base import Reward


class UAEBase(AnswersWithVLM, Method):
    """Method of captioner and renderer as an auto-encoder: the caption is the code, judged by the image generated from it.

    A stage's class adds its training step.

    Attributes:
        trainable: parts that the stage's losses reach.

    Args:
        vlm: captions; its language model also reads the caption for the renderer.
        renderer: generates images from captions.
        captions: how captions are sampled; None is the paper's way.
        adapter: low-rank additions to the language model.
        decoder_adapter: low-rank additions to the renderer's decoder.
        reward: scores reconstructions; None where a stage has none.

    Raises:
        ValueError: sizes of the blocks disagree, or an adapter has nothing to stand beside.
    """

    trainable: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: Renderer,
        captions: CaptionSampling | None = None,
        adapter: LoRA | None = None,
        decoder_adapter: LoRA | None = None,
        reward: Reward | None = None,
    ) -> None:
        super().__init__()
        renderer.match(vlm)
        self.vlm, self.renderer, self.captions, self.reward = vlm, renderer, captions or CaptionSampling(), reward
        self.adapter, self.decoder_adapter = adapter, decoder_adapter
        if adapter is not None:
            adapter.attach(vlm.parts()["language_model"])
        if decoder_adapter is not None:
            if not isinstance(renderer, CaptionRenderer):
                raise ValueError(f"decoder_adapter: found a {type(renderer).__name__}, expected a CaptionRenderer")
            decoder_adapter.attach(renderer.decoder.model)

    def parts(self) -> dict[str, nn.Module]:
        """Those of backbone and renderer, and where they are, ``adapter``, ``decoder_adapter`` and ``reward``."""
        more = {"adapter": self.adapter, "decoder_adapter": self.decoder_adapter, "reward": self.reward}
        own = {name: part for name, part in more.items() if part is not None}
        return {**self.vlm.parts(), **self.renderer.parts(), **own}

    def check_trained(self, trained: Sequence[str]) -> None:
        """Parts that no gradient of the stage reaches stay frozen."""
        if others := sorted(set(trained) - set(self.trainable)):
            raise UserError("training.trained", f"'{others[0]}'", f"parts that this stage trains: {', '.join(self.trainable)}")

    def adapt(self, part: str, adapter: LoRA) -> None:
        """An adapter that the stage's policy can be without, as its reference, is an argument of the stage."""
        own = {"language_model": "adapter", "decoder": "decoder_adapter"}.get(part)
        if own in self.trainable:
            found, expected = f"an adapter of '{part}'", f"method.{own}: without it, {part} is the reference policy"
            raise UserError(f"adapters.{part}", found, expected)
        super().adapt(part, adapter)

    def precomputable(self) -> dict[str, Precomputable]:
        """``latents`` of the images, where the renderer's decoder is trained on them or judged by them."""
        if not isinstance(self.renderer, CaptionRenderer):
            return {}
        latents = self.renderer.latents
        return {"latents": Precomputable(self.renderer.codec, lambda batch: stacked(latents(batch)), "row")}

    # -- captions and images -------------------------------------------------------------------------------------------------

    def sampled_captions(
        self, images: Images, generator: torch.Generator | None = None, temperature: float | None = None
    ) -> Samples:
        """One caption per image; a temperature other than the method's own may be given."""
        count, how = len(images), self.captions
        heat = how.temperature if temperature is None else temperature
        return self.vlm.sample(how.conversations(count), images, [1] * count, 1, how.max_new_tokens, heat, generator)

    def images_of_captions(
        self, captions: Sequence[str], seeds: Sequence[int], images: Images | None = None, sampling: Sampling | None = None
    ) -> list[Tensor]:
        """Images of captions, of one size; the images that they describe are for readers that look."""
        return self.renderer.generate(self.vlm, captions, seeds, images, self.adapter, sampling)

    def made_again(
        self, captions: Sequence[str], seeds: Sequence[int], images: Sequence[Tensor], sampling: Sampling | None = None
    ) -> list[Tensor]:
        """Images of the captions of ``images``, each in the size that the renderer makes it again in (``Renderer.size_of``)."""
        sizes, made = [self.renderer.size_of(image) for image in images], dict[int, Tensor]()
        for size in dict.fromkeys(sizes):
            rows = [row for row, own in enumerate(sizes) if own == size]
            found = self.images_of_captions(
                [captions[row] for row in rows],
                [seeds[row] for row in rows],
                [images[row] for row in rows],
                replace(sampling or Sampling(), size=size),
            )
            made.update(zip(rows, found, strict=True))
        return [made[row] for row in range(len(images))]

    @property
    def refuses(self) -> frozenset[str]:
        """Images to generate from, and what the renderer does not take."""
        return frozenset({"images"}) | self.renderer.refuses

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """Images of what the rows say, in the renderer's own size where none is said; see ``outputs.Draws``.

        Raises:
            UserError: a row has input images.
        """
        batch.assert_no_images("UAE")
        return self.images_of_captions(batch.user_texts(), seeds, None, sampling)

    def sample(self, prompts: Sequence[str], seed: int = 0, num_steps: int | None = None) -> Tensor:
        """Images of texts of one's own; the k-th is generated from seed + k.

        images = UAE.load("runs/uae/toy/stage3").sample(["top left: a small red circle; background: grey"])
        """
        batch = request_batch(prompts).to(self.device)
        return stacked(self.generate(batch, [seed + row for row in range(len(prompts))], Sampling(num_steps=num_steps)))

    def reconstruct_from_captions(self, images: Images, seeds: Sequence[int]) -> tuple[list[str], list[Tensor]]:
        """See ``outputs.ReconstructsFromCaptions``; in the renderer's own size, for a caption says nothing of the image's."""
        captions = self.sampled_captions(images, temperature=0.0).texts
        return captions, self.images_of_captions(captions, seeds, images)

    def reconstruct(self, images: Images, seed: int = 0) -> list[Tensor]:
        """Images again from their likeliest captions, each in its own size where the renderer can; the k-th from seed + k."""
        captions = self.sampled_captions(images, temperature=0.0).texts
        return self.made_again(captions, [seed + k for k in range(len(images))], list(images))

    def round_trip(self, images: Images) -> list[Tensor]:
        """Images through the renderer's codec and back: the best that a reconstruction could be."""
        return self.renderer.round_trip(self.vlm, images)

    # -- validation ----------------------------------------------------------------------------------------------------------

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        made = {"answers", "caption_tokens", "mean_caption_tokens", "generated", "references", "from_true_captions", "columns"}
        if self.reward is not None:
            made |= {"rewards", "reward"}
        return {*made, *self.renderer.objective.makes} if isinstance(self.renderer, CaptionRenderer) else made

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Caption, reconstruct, compare; the same random numbers at every validation.

        ``answers`` (captions) with ``caption_tokens``, ``generated`` from them, ``references``, and where there is a reward
        ``rewards``; their means as the scalars ``mean_caption_tokens`` and ``reward``. For rows with true captions also
        ``from_true_captions`` from the same noise, and the decoder's terms on them at fixed times and noise. Images of one size go
        together, and are made again in their own size where the renderer can (``Renderer.size_of``).
        """
        return in_groups(lambda rows: self._validate(rows, batch_idx), batch, [image.shape for image in image_of_each_row(batch)])

    def _validate(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of rows whose images have one size."""
        images, truths = image_of_each_row(batch), batch.answers()
        outputs = Outputs(self._decoder_terms(batch, truths, batch_idx) if all(truths) else {})
        samples = self.sampled_captions(images, torch.Generator(self.device).manual_seed(batch_idx))
        outputs.answers, outputs.caption_tokens = samples.texts, samples.mask.sum(dim=1)
        outputs.scalars["mean_caption_tokens"] = outputs.caption_tokens.float().mean()
        if not self.wanted.generates(batch_idx):
            if self.reward is not None:
                outputs.scalars["reward"], outputs.counts["reward"] = torch.zeros(()), 0.0
            return outputs
        seeds = [zlib.crc32(key.encode()) for key in batch.keys]
        generated = self.made_again(samples.texts, seeds, images)
        outputs.references, outputs.generated = images, generated
        outputs.columns = {"original": images, "reconstruction": generated}
        if all(truths):
            best = self.made_again(truths, seeds, images)
            outputs.from_true_captions = outputs.columns["from the true caption"] = best
        if self.reward is not None:
            outputs.rewards = self.reward(generated, batch)
            outputs.scalars["reward"] = outputs.rewards.mean()
        return outputs

    def _decoder_terms(self, batch: Batch, captions: list[str], seed: int) -> dict[str, Tensor]:
        """The objective's terms on true captions, where the renderer is trained that way."""
        if not isinstance(self.renderer, CaptionRenderer):
            return {}
        condition = self.renderer.condition(self.vlm, captions, image_of_each_row(batch), self.adapter)
        return self.renderer.losses(batch, condition, torch.Generator(condition.values.device).manual_seed(seed))
