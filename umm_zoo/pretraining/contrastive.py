"""Method that trains an image encoder and a text encoder on pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.features import TextImageEncoder
from umm_zoo.batch import Batch, image_of_each_row, map_by_size
from umm_zoo.errors import Positive, UserError
from umm_zoo.method import Method
from umm_zoo.objectives.contrast import ContrastiveLoss, WordSwaps
from umm_zoo.outputs import Outputs


class Contrastive(Method):
    """Method of contrast: each image with its caption, away from the other captions and from hard negatives.

    The caption of a row is its last assistant turn, or its prompt where it has none (text-to-image rows). Each micro-batch of each
    rank contrasts its own rows, by definition: a step that is shared out otherwise is another step, though each row weighs alike.
    The number of rows that are contrasted is ``batch_size / (ranks * accumulate_grad_batches)``.

    Args:
        encoder: both towers; its logit scale (and bias, where it has one) is trained with it.
        contrast: softmax (CLIP) or sigmoid (SigLIP).
        negatives: where captions that differ in one attribute come from; None for none.
        max_scale: the logit scale is kept at or below this (CLIP, section 2.5).
    """

    makes = ("loss", "scale", "hard_accuracy", "image_features", "text_features")

    def __init__(
        self, encoder: TextImageEncoder, contrast: ContrastiveLoss, negatives: WordSwaps | None = None, max_scale: Positive = 100.0
    ) -> None:
        super().__init__()
        self.encoder, self.contrast, self.negatives = encoder, contrast, negatives
        self.max_log_scale = math.log(max_scale)

    def parts(self) -> dict[str, nn.Module]:
        """``encoder``."""
        return {"encoder": self.encoder}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss, and how often a row's own caption beats its hard negatives, over the micro-batch: its rows are the contrast."""
        outputs = self._compare(batch, None)
        losses = {**self.over_step({"loss": outputs.scalars["loss"]}, "rows", len(batch)), "scale": outputs.scalars["scale"]}
        if self.negatives is not None:
            wins = outputs.scalars.get("hard_accuracy", losses["loss"].new_zeros(()))
            losses |= self.over_step({"hard_accuracy": wins}, "swapped", outputs.counts.get("hard_accuracy", 0))
        return losses

    def units(self, batch: Batch) -> dict[str, float]:
        """``rows``, and those ``swapped``, which have hard negatives."""
        swapped = 0 if self.negatives is None else self.negatives.count(captions(batch))
        return {"rows": len(batch), "swapped": swapped}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Adds ``image_features`` and ``text_features``; hard negatives are drawn from a fixed seed.

        ``hard_accuracy`` is over the rows that have hard negatives, as its count says; without any it is NaN.
        """
        outputs = self._compare(batch, torch.Generator().manual_seed(batch_idx))
        outputs.scalars.setdefault("hard_accuracy", torch.tensor(torch.nan))
        outputs.counts.setdefault("hard_accuracy", 0)
        return outputs

    def _compare(self, batch: Batch, generator: torch.Generator | None) -> Outputs:
        images = torch.stack(map_by_size(self.encoder, image_of_each_row(batch)))
        return compare(self.encoder, images, captions(batch), self.contrast, self.negatives, self.max_log_scale, generator)


def compare(
    encoder: TextImageEncoder,
    vectors: Tensor,
    texts: list[str],
    contrast: ContrastiveLoss,
    negatives: WordSwaps | None,
    max_log_scale: float,
    generator: torch.Generator | None = None,
) -> Outputs:
    """Contrast of images with their texts: ``loss``, ``scale``, ``hard_accuracy`` of the rows that have negatives, both features.

    Args:
        encoder: of the texts; its logit scale, and bias where it has one, are those of the logits.
        vectors: ``[B, F]`` of the images, not normalised.
        texts: B.
        contrast, negatives: see ``Contrastive``.
        max_log_scale: the logarithm of the scale is kept at or below this.
        generator: of the negatives.
    """
    images = F.normalize(vectors.float(), dim=-1)  # [B, F]
    wrong = [[] for _ in texts] if negatives is None else negatives.of(texts, generator)
    counts = [len(row) for row in wrong]
    features = F.normalize(encoder.encode_text(texts + [text for row in wrong for text in row]).float(), dim=-1)
    own, rest = features[: len(texts)], features[len(texts) :]
    rivals = images.new_zeros(len(texts), max(counts, default=0), images.shape[-1])  # [B, K, F]
    valid = torch.arange(rivals.shape[1]) < torch.tensor(counts)[:, None]  # [B, K]
    valid = valid.to(images.device)
    rivals = rivals.masked_scatter(valid[..., None], rest)
    same = torch.tensor([[a == b for b in texts] for a in texts], device=images.device)
    scale, bias = _scale_and_bias(encoder, max_log_scale)
    scalars = {"loss": contrast(images, own, rivals, scale, bias, same, valid), "scale": scale.detach()}
    outputs = Outputs(scalars, image_features=images, text_features=own)
    if valid.any():
        cosines = torch.einsum("bf,bkf->bk", images, rivals).masked_fill(~valid, -1.0)
        wins = ((images * own).sum(dim=-1) > cosines.amax(dim=1))[valid.any(dim=1)].float()
        outputs.scalars["hard_accuracy"], outputs.counts["hard_accuracy"] = wins.mean(), len(wins)
    return outputs


def _scale_and_bias(encoder: TextImageEncoder, max_log_scale: float) -> tuple[Tensor, Tensor]:
    log_scale = encoder.model.logit_scale.clamp(max=max_log_scale)
    bias = getattr(encoder.model, "logit_bias", None)
    return log_scale.exp().reshape(()), log_scale.new_zeros(()) if bias is None else bias.reshape(())


def captions(batch: Batch) -> list[str]:
    """The words of each row about its image.

    Raises:
        UserError: a row has no text.
    """
    texts = []
    for key, answer, conversation in zip(batch.keys, batch.answers(), batch.conversations, strict=True):
        text = answer or (conversation[-1]["text"] if conversation else "")
        if not text:
            raise UserError(key, "no caption", "an answer or a prompt")
        texts.append(text)
    return texts
