"""First stage of UAE: connector and decoder learn to generate what long captions say."""

from __future__ import annotations

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Batch, image_of_each_row
from umm_zoo.errors import Share, UserError
from umm_zoo.methods.uae.base import UAEBase
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.outputs import TokenCount


class UAE(UAEBase):
    """Stage in which connector and decoder learn to generate images from long captions that the frozen language model encodes.

    Flow matching on pairs of image and long caption. The paper trains ``connector`` and ``decoder`` on 700,000 images of 1024 px
    with captions of more than 250 tokens; learning rate, batch and steps are not published, so those of the experiment files are
    our choice.

    Then come ``GenerationForUnderstanding`` and ``UnderstandingForGeneration``, with the same blocks and ``after:`` this one.

    Reference: Yan et al., "Unified Multimodal Models as Auto-Encoders" (arXiv 2509.09666), first titled "Can Understanding and
    Generation Truly Benefit Together -- or Just Coexist?", and its released code.

    Args:
        vlm: Qwen2.5-VL-3B in the paper; frozen here.
        renderer: ``CaptionRenderer``.
        adapter: of the second stage, where this one comes after it (as a control of the third).
        captions: of validation.
        drop_caption: share of captions replaced by the negative prompt, so that guidance away from it has a meaning (our choice;
            the paper states none).
    """

    trainable = ("connector", "decoder")
    renderer: CaptionRenderer

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: CaptionRenderer,
        adapter: LoRA | None = None,
        captions: CaptionSampling | None = None,
        drop_caption: Share = 0.1,
    ) -> None:
        super().__init__(vlm, renderer, captions=captions, adapter=adapter)
        self.drop_caption = drop_caption

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows without a caption, in training."""
        if not scoring and "" in (captions := batch.answers()):
            raise UserError("", "no caption", "an assistant turn with the caption", row=captions.index(""))

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's terms.

        Raises:
            UserError: a row has no caption or no image.
        """
        self.check_rows(batch, scoring=False)
        captions = batch.answers()
        dropped = (torch.rand(len(captions)) < self.drop_caption).tolist()
        texts = [self.renderer.negative_prompt if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        condition = self.renderer.condition(self.vlm, texts, image_of_each_row(batch), self.adapter)  # [B, N, E]
        self.token_counts = {"text": TokenCount.of(condition)}
        return self.over_step(self.renderer.losses(batch, condition), "rows", len(batch))
