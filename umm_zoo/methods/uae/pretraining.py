"""A unified model as an auto-encoder: a caption is the code, and the image drawn from it says how good the code is."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.generation import Samples
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Turn, image_of_each_row
from umm_zoo.errors import MistakeError
from umm_zoo.method import Method
from umm_zoo.methods.uae.renderers import CaptionRenderer, Renderer
from umm_zoo.rewards.base import Reward
from umm_zoo.training.optimization import OptimizerFactory, Schedule

#: What the captioner is asked, word for word as released (blanks at ends of lines and asterisks included); the image is last.
CAPTION_PROMPT = (
    "You are an expert vision-language model. \n"
    "Your task is: Given an input image, generate a **textual description** of the image. "
    'If there is text in the image, transcribe it inside double quotes "". \n'
    f"Now, carefully analyze the input image and output the full description. {IMAGE_MARKER}"
)


class UAEBase(Method):
    """What UAE's stages share: a captioner, a renderer, and how both are looked at.

    Args:
        vlm: captions; its language model also reads the caption for the renderer.
        renderer: draws from the caption alone.
        optimizer, trained, schedule: as in every method; parts are those of ``vlm`` and ``renderer``, ``adapter`` and
            ``decoder_adapter``.
        adapter: low-rank additions to the language model.
        decoder_adapter: low-rank additions to the renderer's decoder.
        reward: scores redrawn images; None where a stage has none.
        prompt: asks for the caption, with one ``<image>``.
        max_new_tokens: longest caption.
        temperature: of captions, in training and validation.
        num_drawn_batches: batches of each validation that are captioned and redrawn; None is all.

    Raises:
        ValueError: sizes of the blocks disagree, or an adapter has nothing to stand beside.
    """

    def __init__(
        self,
        vlm: Qwen25VL,
        renderer: Renderer,
        optimizer: OptimizerFactory,
        trained: list[str],
        schedule: Schedule | None,
        adapter: LoRA | None,
        decoder_adapter: LoRA | None,
        reward: Reward | None,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        num_drawn_batches: int | None,
    ) -> None:
        super().__init__()
        if prompt.count(IMAGE_MARKER) != 1:
            raise ValueError(f"prompt: found {prompt.count(IMAGE_MARKER)} {IMAGE_MARKER} markers, expected one")
        if isinstance(renderer, CaptionRenderer) and renderer.connector.in_dim != vlm.width:
            raise ValueError(f"connector.in_dim is {renderer.connector.in_dim}, vlm.width is {vlm.width}")
        self.vlm, self.renderer, self.reward = vlm, renderer, reward
        self.adapter, self.decoder_adapter = adapter, decoder_adapter
        self.prompt, self.max_new_tokens, self.temperature = prompt, max_new_tokens, temperature
        self.num_drawn_batches = num_drawn_batches
        if adapter is not None:
            adapter.attach(vlm.parts()["language_model"])
        if decoder_adapter is not None:
            if not isinstance(renderer, CaptionRenderer):
                raise ValueError(f"decoder_adapter: found a {type(renderer).__name__}, expected a CaptionRenderer")
            decoder_adapter.attach(renderer.decoder.model)
        self.train_only(trained, optimizer, schedule)

    def parts(self) -> dict[str, nn.Module]:
        """Those of backbone and renderer, and where they are, ``adapter``, ``decoder_adapter`` and ``reward``."""
        more = {"adapter": self.adapter, "decoder_adapter": self.decoder_adapter, "reward": self.reward}
        return {
            **self.vlm.parts(),
            **self.renderer.parts(),
            **{name: part for name, part in more.items() if part is not None},
        }

    # -- captions and images -----------------------------------------------------------------------------------------------

    def caption_prompts(self, count: int) -> list[Conversation]:
        """The question, once per image."""
        return [[Turn(role="user", text=self.prompt)] for _ in range(count)]

    def caption(self, images: Tensor, generator: torch.Generator | None = None, temperature: float | None = None) -> Samples:
        """One caption per image ``[B, 3, H, W]``."""
        count = len(images)
        own = self.temperature if temperature is None else temperature
        return self.vlm.sample(self.caption_prompts(count), images, [1] * count, 1, self.max_new_tokens, own, generator)

    def draw(self, captions: Sequence[str], seeds: Sequence[int], images: Tensor | None = None) -> Tensor:
        """Images ``[R, 3, H, W]`` of captions; what they describe is for readers that look."""
        return self.renderer.draw(self.vlm, captions, seeds, images, self.adapter)

    def sample(self, prompts: Sequence[str], seed: int = 0, num_steps: int | None = None) -> Tensor:
        """Draw texts of one's own; the k-th image is drawn from seed + k.

        images = UAE.load("runs/uae/toy/stage3").sample(["top left: a small red circle; background: grey"])
        """
        seeds = [seed + row for row in range(len(prompts))]
        return self.renderer.draw(self.vlm, prompts, seeds, None, self.adapter, num_steps)

    def redraw(self, images: Tensor, seeds: Sequence[int], temperature: float = 0.0) -> tuple[list[str], Tensor]:
        """Captions of images ``[B, 3, H, W]``, the likeliest by default, and what is drawn from them."""
        captions = self.caption(images, temperature=temperature).texts
        return captions, self.draw(captions, seeds, images)

    @torch.no_grad()
    def answer(self, batch: Batch, max_new_tokens: int | None = None, temperature: float = 0.0) -> list[str]:
        """Answers to a batch of prompts; a row's own last answer is not looked at."""
        return self.vlm.generate(
            batch.prompts(), batch.images, batch.image_counts, max_new_tokens or self.max_new_tokens, temperature
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Caption, redraw, compare; the same draws at every validation.

        ``answers`` and ``caption_tokens`` [B], ``images`` redrawn from them, ``originals``, ``rewards`` [B] and ``reward`` (their
        mean); for rows with a true caption ``oracle_images`` drawn from it from the same noise (the ceiling), and ``loss`` of the
        decoder on it. ``columns`` to look at. Batches after ``num_drawn_batches`` give ``loss`` alone.
        """
        originals, truths = image_of_each_row(batch), batch.answers()
        outputs: dict[str, Any] = self._decoder_loss(batch, originals, truths, batch_idx) if all(truths) else {}
        if self.num_drawn_batches is not None and batch_idx >= self.num_drawn_batches:
            return outputs
        seeds = [zlib.crc32(key.encode()) for key in batch.keys]
        samples = self.caption(originals, torch.Generator(self.device).manual_seed(batch_idx))
        drawn = self.draw(samples.texts, seeds, originals)
        lengths = samples.mask.sum(dim=1)
        outputs |= {"answers": samples.texts, "caption_tokens": lengths, "mean_caption_tokens": lengths.float().mean()}
        outputs |= {"generated": drawn, "originals": originals}
        outputs["columns"] = {"original": originals, "redrawn": drawn}
        if all(truths):
            outputs["oracle_images"] = self.draw(truths, seeds, originals)
            outputs["columns"]["from the true caption"] = outputs["oracle_images"]
        if self.reward is not None:
            outputs["rewards"] = self.reward(drawn, batch)
            outputs["reward"] = outputs["rewards"].mean()
        return outputs

    def _decoder_loss(self, batch: Batch, images: Tensor, captions: list[str], seed: int) -> dict[str, Any]:
        """The decoder's loss on true captions at fixed times and noise, where the renderer is trained that way."""
        if not isinstance(self.renderer, CaptionRenderer):
            return {}
        condition = self.renderer.condition(self.vlm, captions, images, self.adapter)
        latents = self.renderer.codec.encode(images)
        generator = torch.Generator(latents.device).manual_seed(seed)
        return dict(self.renderer.objective(self.renderer.decoder, latents, condition, generator))


class UAE(UAEBase):
    """UAE's first stage: connector and decoder learn to draw long captions that the frozen language model has read.

    Flow matching on pairs of image and long caption. The paper trains on 700,000 images of 1024 px with captions of more than
    250 tokens; learning rate, batch and steps are not published, so those of the experiment files are our choice.

    Then come ``GenerationForUnderstanding`` and ``UnderstandingForGeneration``, with the same blocks and ``after:`` this one.

    Reference: Yan et al., "Unified Multimodal Models as Auto-Encoders" (arXiv 2509.09666), first titled "Can Understanding and
    Generation Truly Benefit Together -- or Just Coexist?", and its released code.

    Args:
        vlm: Qwen2.5-VL-3B in the paper; frozen here.
        renderer: ``CaptionRenderer``.
        optimizer: builds the optimiser over the trained parts.
        trained: ``connector`` and ``decoder`` in the paper.
        schedule: learning rate over the steps; None is constant.
        adapter: of the second stage, where this one comes after it (as a control of the third).
        prompt: asks for captions in validation; the released one by default.
        max_new_tokens: longest caption; 512 in the released demo.
        temperature: of captions in validation; 1 as in the reinforcement that follows.
        drop_caption: share of captions replaced by the negative prompt, so that guidance away from it has a meaning (our choice;
            the paper states none).
        stored_latents: name in ``Batch.extras`` of precomputed latents; None computes them.
        num_drawn_batches: batches of each validation that are captioned and redrawn; None is all.

    Raises:
        ValueError: sizes of the blocks disagree.
    """

    renderer: CaptionRenderer

    def __init__(
        self,
        vlm: Qwen25VL,
        renderer: CaptionRenderer,
        optimizer: OptimizerFactory,
        trained: list[str],
        schedule: Schedule | None = None,
        adapter: LoRA | None = None,
        prompt: str = CAPTION_PROMPT,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        drop_caption: float = 0.1,
        stored_latents: str | None = None,
        num_drawn_batches: int | None = None,
    ) -> None:
        super().__init__(
            vlm,
            renderer,
            optimizer,
            trained,
            schedule,
            adapter,
            None,
            None,
            prompt,
            max_new_tokens,
            temperature,
            num_drawn_batches,
        )
        self.drop_caption, self.stored_latents = drop_caption, stored_latents

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's terms.

        Raises:
            MistakeError: a row has no caption or no image.
        """
        captions = batch.answers()
        if "" in captions:
            raise MistakeError("found no caption, expected rows with an assistant turn", captions.index(""))
        images = image_of_each_row(batch)
        left_out = (torch.rand(len(captions)) < self.drop_caption).tolist()
        negative = self.renderer.negative_prompt
        told = [negative if out else caption for caption, out in zip(captions, left_out, strict=True)]
        condition = self.renderer.condition(self.vlm, told, images, self.adapter)
        return self.renderer.objective(self.renderer.decoder, self._latents(batch, images), condition)

    @torch.no_grad()
    def _latents(self, batch: Batch, images: Tensor) -> Tensor:
        if self.stored_latents is None:
            return self.renderer.codec.encode(images)
        if self.stored_latents not in batch.extras:
            raise MistakeError(f"found no stored '{self.stored_latents}', expected {sorted(batch.extras)}", row=0)
        return batch.extras[self.stored_latents].float()


__all__ = ["CAPTION_PROMPT", "UAE", "UAEBase"]
