"""Visual instruction tuning, the baseline of the understanding methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.batch import Batch
from umm_zoo.method import Method
from umm_zoo.training.optimization import OptimizerFactory, Schedule


class LLaVA(Method):
    """Next-token prediction on the answers of conversations about images, and on nothing else.

    LLaVA-1.5 trains in two stages: the projector alone on captions (``trained: [projector]``), then projector and language model on
    instructions (``trained: [projector, language_model]``); the vision tower stays frozen. Any ``VLMBackbone`` will do.

    Reference: Liu et al., "Improved Baselines with Visual Instruction Tuning" (arXiv 2310.03744).

    Args:
        vlm: the model; its parts are the method's.
        optimizer: builds the optimiser over the trained parts.
        trained: names among ``vision_tower``, ``projector``, ``language_model``.
        schedule: learning rate over the steps; None is constant.
        max_new_tokens: longest answer in validation (our choice: enough for one clause); 0 to only measure the loss.
    """

    def __init__(
        self,
        vlm: VLMBackbone,
        optimizer: OptimizerFactory,
        trained: list[str],
        schedule: Schedule | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.max_new_tokens = max_new_tokens
        self._num_tokens = torch.zeros((), dtype=torch.long)
        self.train_only(trained, optimizer, schedule)

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone."""
        return self.vlm.parts()

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, the mean over all answer tokens of the batch."""
        inputs = self.vlm.inputs_of(batch)
        self._num_tokens = inputs.attention_mask.sum()
        return {"loss": self.vlm(inputs).loss}

    def batch_tokens(self, batch: Batch) -> Tensor:
        """Tokens that the last training batch was made of, image tokens included and padding not; ``callbacks.Throughput`` asks."""
        return self._num_tokens

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Teacher-forced ``loss``, ``nll`` and ``num_tokens`` [B], and greedy ``answers`` to the last question of each row."""
        output = self.vlm(self.vlm.inputs_of(batch))
        answers = self.answer(batch) if self.max_new_tokens else [""] * len(batch)
        return {"loss": output.loss, "nll": output.nll, "num_tokens": output.num_tokens, "answers": answers}

    @torch.no_grad()
    def answer(self, batch: Batch, max_new_tokens: int | None = None, temperature: float = 0.0) -> list[str]:
        """Answers to a batch of prompts; a row's own last answer is not looked at."""
        return self.vlm.generate(
            batch.prompts(), batch.images, batch.image_counts, max_new_tokens or self.max_new_tokens, temperature
        )
