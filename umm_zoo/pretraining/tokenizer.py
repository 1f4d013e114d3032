"""Method that trains a visual tokenizer to give images back from their codes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from umm_zoo.backbones.visual_tokenizer import PIXEL, Tokenized, VisualTokenizer
from umm_zoo.batch import Batch, Images, by_size, image_of_each_row, map_by_size, stacked
from umm_zoo.errors import Share, Weight
from umm_zoo.objectives.reduction import mean_over_groups
from umm_zoo.outputs import Outputs, in_groups
from umm_zoo.pretraining.judged import Judged, Judges


class Tokenizer(Judged):
    """Method of a visual tokenizer: pixels from codes, what its quantizers ask for, and what a paper adds.

    One image per row, its first input image or its target. Images of validation are decoded from the integers and never from the
    forward pass. Tables that follow averages, and the codec's shift and scaling, move once per optimiser step.

    Args:
        tokenizer: encoder, branches and decoder.
        mse_weight, l1_weight: of the squared and the absolute difference of pixels.
        quantizer_weight: of the quantizers' own losses, the mean of all branches.
        statistics_momentum: see ``Judged``.
        judges: beside the pixels; None is none.
    """

    codec: VisualTokenizer
    understood = PIXEL  #: the branch of ``Outputs.tokens``
    codec_argument, codec_kind = "tokenizer", VisualTokenizer

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        mse_weight: Weight = 1.0,
        l1_weight: Weight = 0.0,
        quantizer_weight: Weight = 1.0,
        statistics_momentum: Share = 0.99,
        judges: Judges | None = None,
    ) -> None:
        super().__init__(tokenizer, judges, statistics_momentum)
        self.mse_weight, self.l1_weight, self.quantizer_weight = mse_weight, l1_weight, quantizer_weight

    @classmethod
    def load_codec(cls, source: str | Path, trust: Sequence[str] = (), raw_weights: bool = False) -> VisualTokenizer:
        """See ``Judged.load_codec``: a ``TokenCodec`` and a ``LatentCodec``."""
        return cast(VisualTokenizer, super().load_codec(source, trust, raw_weights))

    def parts(self) -> dict[str, nn.Module]:
        """``encoder``, ``branches`` and ``decoder`` of the tokenizer, and the judges."""
        return {name: getattr(self.codec, name) for name in ("encoder", "branches", "decoder")} | self.judges.parts()

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``."""
        for images in (inputs, targets):
            self.codec.tokenize(images)

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Terms of the images of a micro-batch, those of one size together; what a quantizer asks for is a mean over its groups."""
        self.codec.remember(not self.step.weightless)
        found = [(places, *self._group(stack, batch.select(places))) for places, stack in by_size(image_of_each_row(batch))]
        self.remember(torch.stack([moments for *_, moments in found]).sum(dim=0))
        order = [place for places, *_ in found for place in places]
        vectors = torch.cat([vector for _, _, vector, _ in found])[torch.tensor(order, device=self.device).argsort()]
        losses = self.batch_losses(mean_over_groups([(len(places), own) for places, own, *_ in found]), vectors, batch)
        losses["loss"] = losses["loss"] + 0 * vectors.float().sum()  # all of the encoder takes part
        return self.over_step(self.judges.settled(losses, self.codec.decoder, self.step.number), "rows", len(batch))

    def _group(self, images: Tensor, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Means over images of one size, the encoder's vector of each, and the moments of their latents."""
        tokenized = self.codec.tokenize(images)
        made = self._made(tokenized, images)
        losses = self._pixel_losses(made, images)
        for name, squeezed in tokenized.squeezed.items():
            for term, value in squeezed.quantized.losses.items():
                losses[f"{name}/{term}" if len(tokenized.squeezed) > 1 else f"quantizer/{term}"] = value
        if asked := [squeezed.quantized.losses["loss"] for squeezed in tokenized.squeezed.values() if squeezed.quantized.losses]:
            losses["loss"] = losses["loss"] + self.quantizer_weight * torch.stack(asked).mean()
        losses = self.paper_losses(losses, tokenized, images, batch)
        moments = self.codec.moments(tokenized.squeezed[PIXEL].quantized.embeddings.detach())
        return self.judges.competing(losses, images, made, self.step.number), tokenized.vector, moments

    def paper_losses(self, losses: dict[str, Tensor], tokenized: Tokenized, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms of images of one size with those that a paper adds, in ``loss`` too; here nothing."""
        return losses

    def batch_losses(self, losses: dict[str, Tensor], vectors: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms with those that a paper adds of all rows of a batch together, whose vectors these are; here nothing."""
        return losses

    def _made(self, tokenized: Tokenized, images: Tensor) -> Tensor:
        return self.codec.pixels(tokenized.squeezed[PIXEL].tokens, tokenized.grid).to(images.dtype)

    def _pixel_losses(self, made: Tensor, images: Tensor) -> dict[str, Tensor]:
        losses = {"mse": F.mse_loss(made, images), "l1": F.l1_loss(made, images)}
        loss = self.mse_weight * losses["mse"] + self.l1_weight * losses["l1"]
        return self.judges.seen({"loss": loss, **losses}, images, made)

    def units(self, batch: Batch) -> dict[str, float]:
        """``rows``."""
        return {"rows": len(batch)}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Move statistics, and tables that follow averages, once for the whole step."""
        super().on_before_optimizer_step(optimizer)
        if self._moments is not None:
            self.codec.after_step(self.step.skipping)

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        perceptual = () if self.judges.perceptual is None else ("perceptual",)
        return ("loss", "mse", "l1", *perceptual, "generated", "references", "codes", "tokens", "image_features")

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Pixel losses, ``codes``, ``generated`` from them, ``references``, and the encoder's ``image_features``.

        ``tokens`` are what leaves the bottleneck of the branch ``understood``: as wide in every tokenizer of one encoder.
        """
        return in_groups(self._validate, batch, [image.shape for image in image_of_each_row(batch)])

    def _validate(self, batch: Batch) -> Outputs:
        """Outputs of rows whose images have one size."""
        images = stacked(image_of_each_row(batch))
        tokenized = self.codec.tokenize(images)
        quantizer = tokenized.squeezed[PIXEL].quantized
        made = self.codec.images(tokenized.codes, tokenized.grid) if quantizer.codes.shape[-1] else self.round_trip(images)
        losses = self._pixel_losses(self._made(tokenized, images), images)
        outputs = Outputs(losses, generated=list(made), references=list(images))
        outputs.codes, outputs.image_features = list(tokenized.codes), F.normalize(tokenized.vector.float(), dim=-1)
        outputs.tokens = list(tokenized.squeezed[self.understood].tokens)
        return outputs

    def reconstruct(self, images: Images, seed: int = 0) -> list[Tensor]:
        """Images through their codes and back; no noise is in it, whatever the seed."""
        return self.round_trip(images)

    @torch.no_grad()
    def round_trip(self, images: Images) -> list[Tensor]:
        """Images through the tokenizer and back."""
        return map_by_size(lambda stack: self.codec.decode(self.codec.encode(stack)).clamp(-1, 1), images)
