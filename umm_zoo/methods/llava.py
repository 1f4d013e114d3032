"""Method of visual instruction tuning: LLaVA, the baseline of the understanding methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.latent_codec import SOURCE_LATENTS, LatentCodec
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.preparation import Preparation, WholeRows
from umm_zoo.batch import Batch, map_by_size, stacked
from umm_zoo.blocks.fusion import TokenFusion
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.outputs import Outputs


class LLaVA(AnswersWithVLM, Method):
    """Method of next-token prediction on the answers of conversations about images, and on nothing else.

    LLaVA-1.5 trains in two stages: the projector alone on captions (``trained: [projector]``), then projector and language model on
    instructions (``trained: [projector, language_model]``); the vision tower stays frozen. Any ``VLMBackbone`` will do.

    Reference: Liu et al., "Improved Baselines with Visual Instruction Tuning" (arXiv 2310.03744).

    Args:
        vlm: the model; its parts are the method's.
        packing: rows of unequal lengths are trained on without their padding, each attending to itself alone; equal results, and
            worth it where much of a batch is padding.
        codec: frozen, beside the vision tower: its latents of the same square are fused with the tower's tokens (EMMA, arXiv
            2512.04810). None, as in LLaVA, has neither.
        fusion: of the two, in the projector's place: ``training.trained`` names it ``projector``.

    Raises:
        UserError: a codec without a fusion, or the other way round; a model that takes none; grids or widths that do not fit.
    """

    makes = ("loss", "nll", "num_tokens", "answers")

    def __init__(
        self, vlm: VLMBackbone, packing: bool = False, codec: LatentCodec | None = None, fusion: TokenFusion | None = None
    ) -> None:
        super().__init__()
        self.vlm, self.fuses = vlm, codec is not None
        if codec is not None and fusion is not None:
            vlm.fuse(codec, fusion)
        elif codec is not None or fusion is not None:
            found, missing = ("a codec", "fusion") if fusion is None else ("a fusion", "codec")
            raise UserError("method", f"{found} without a {missing}", "both, or neither")
        if packing:
            vlm.pack_rows()

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone."""
        return self.vlm.parts()

    def check_trained(self, trained: Sequence[str]) -> None:
        """Refuse the codec, which stays as it is."""
        if "codec" in trained:
            raise UserError("training.trained", "'codec', which no loss reaches", "parts without the codec")

    def precomputable(self) -> dict[str, Precomputable]:
        """``source_latents``, a fusion's latents of the input images."""
        if not self.fuses:
            return {}
        codec = cast(LatentCodec, self.vlm.parts()["codec"])

        @torch.no_grad()
        def compute(batch: Batch) -> Tensor:
            return stacked(map_by_size(codec.encode, batch.images)) if batch.images else torch.zeros(0, codec.latent_channels, 1, 1)

        return {SOURCE_LATENTS: Precomputable(codec, compute, "image")}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, the mean over all answer tokens of the optimiser step."""
        inputs = self.vlm.inputs_of(batch)
        self.token_counts = inputs.token_counts
        output = self.vlm(inputs)
        return {"loss": output.loss * self.share("tokens", output.num_tokens.sum())}

    def units(self, batch: Batch) -> dict[str, float]:
        """Answer ``tokens``."""
        return {"tokens": self.vlm.count_labels(batch)}

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows that the backbone cannot read whole."""
        self.vlm.check_conversations(batch, scoring and self.wanted.max_new_tokens > 0)

    def preparation(self, scoring: bool) -> Preparation | None:
        """See ``Prepares``: what the backbone reads."""
        return self.vlm.preparation(WholeRows(scoring and self.wanted.max_new_tokens > 0))

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Teacher-forced ``loss``, ``nll`` and ``num_tokens``, and greedy ``answers`` to the last question of each row."""
        output = self.vlm(self.vlm.inputs_of(batch))
        longest = self.wanted.max_new_tokens
        answers = self.answer(batch, longest) if longest else [""] * len(batch)
        return Outputs({"loss": output.loss}, nll=output.nll, num_tokens=output.num_tokens, answers=answers)
