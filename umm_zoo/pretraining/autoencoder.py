"""Methods that train an image codec."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.codecs import DCCodec
from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.latent_codec import LatentCodec, draw
from umm_zoo.batch import Batch, Images, by_size, image_of_each_row, map_by_size, stacked
from umm_zoo.blocks.discriminators import Discriminator
from umm_zoo.errors import Share, UserError, Weight
from umm_zoo.objectives.adversarial import AdversarialLoss
from umm_zoo.objectives.perceptual import PerceptualDistance
from umm_zoo.objectives.reduction import mean_over_groups
from umm_zoo.outputs import Outputs, in_groups
from umm_zoo.pretraining.judged import Judged, Judges


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, variance) from N(0, 1) in nats, averaged over all elements, ``[]``."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


class Autoencoder(Judged):
    """Method that trains a codec to reconstruct images, with a slight pull of its latents towards a standard normal.

    The loss of latent diffusion's codecs (Rombach et al., 2022, arXiv 2112.10752, appendix G): pixel distance, perceptual distance,
    KL, and an adversarial term, which needs far more data than a small codec and is off by default.

    Args:
        codec: the network that is trained.
        l1_weight: of the mean absolute difference of pixels.
        mse_weight: of the mean squared difference (it is what PSNR measures).
        kl_weight: of the KL term per latent element, in nats. The paper's code has 1e-6 on sums over an image; ours (on means) is
            larger, because a small world needs a smooth latent space more than the last decibel.
        statistics_momentum: see ``Judged``.
        perceptual, perceptual_weight, discriminator, adversarial: see ``Judges``.
    """

    def __init__(
        self,
        codec: LatentCodec,
        perceptual: PerceptualDistance | FeatureEncoder | None = None,
        l1_weight: Weight = 1.0,
        mse_weight: Weight = 0.0,
        kl_weight: Weight = 1e-4,
        perceptual_weight: Weight = 0.1,
        statistics_momentum: Share = 0.99,
        discriminator: Discriminator | None = None,
        adversarial: AdversarialLoss | None = None,
    ) -> None:
        super().__init__(codec, Judges(perceptual, perceptual_weight, discriminator, adversarial), statistics_momentum)
        self.l1_weight, self.mse_weight, self.kl_weight = l1_weight, mse_weight, kl_weight

    def parts(self) -> dict[str, nn.Module]:
        """``codec``, and ``perceptual`` and ``discriminator`` where there are such."""
        return {"codec": self.codec, **self.judges.parts()}

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``."""
        for images in (inputs, targets):
            self.codec.decode(self.codec.encode(images))

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruct every image of the batch, inputs and targets."""
        moments, groups, images = torch.zeros(3, device=self.device), [], [*batch.images, *batch.requested]
        for places, stack in by_size(images or self._blank()):
            mean, log_variance = self.codec.posterior(stack)
            moments = moments + self.codec.moments(mean) * bool(images and places)
            groups.append((len(places), self._competing(stack, mean, log_variance, draw(mean, log_variance))))
        self.remember(moments)
        return self._over_images(groups, len(images))

    def _blank(self) -> list[Tensor]:
        """An image where a batch has none: all ranks call the same networks."""
        side = self.codec.downsampling * -(-64 // self.codec.downsampling)
        if self.judges.discriminator is not None:
            side = self.judges.discriminator.image_size or side
        return [torch.zeros(3, side, side, device=self.device, dtype=next(self.codec.parameters()).dtype)]

    def _over_images(self, groups: list[tuple[int, dict[str, Tensor]]], count: int) -> dict[str, Tensor]:
        """Means over all images of the step, zeros of a batch without any."""
        means = mean_over_groups(groups)
        if self.judges.discriminator is not None:
            means = self.judges.settled(means, self.codec.model.decoder, self.step.number)
        return self.over_step({name: mean * (count > 0) for name, mean in means.items()}, "images", count)

    def units(self, batch: Batch) -> dict[str, float]:
        """``images``, inputs and targets."""
        return {"images": len(batch.images) + len(batch.requested)}

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        without = {"kl": isinstance(self.codec, DCCodec), "perceptual": self.judges.perceptual is None}
        return ("loss", "l1", "mse", *(name for name in without if not without[name]), "generated", "references")

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """The losses, ``generated`` (reconstructions from the posterior mean), ``references``; images of one size go together."""
        return in_groups(self._validate, batch, [image.shape for image in image_of_each_row(batch)])

    def _validate(self, batch: Batch) -> Outputs:
        """Outputs of rows whose images have one size."""
        images = stacked(image_of_each_row(batch))
        mean, log_variance = self.codec.posterior(images)
        losses = self._losses(images, self._expanded(images, mean), mean, log_variance)
        reconstructed = self.codec.decode(self.codec.normalise(mean)).clamp(-1, 1)
        return Outputs(losses, generated=list(reconstructed), references=list(images))

    def reconstruct(self, images: Images, seed: int = 0) -> list[Tensor]:
        """Images through the codec and back; no noise is in it, whatever the seed."""
        return self.round_trip(images)

    @torch.no_grad()
    def round_trip(self, images: Images) -> list[Tensor]:
        """Images through the codec and back."""
        return map_by_size(lambda stack: self.codec.decode(self.codec.encode(stack)).clamp(-1, 1), images)

    def _expanded(self, images: Tensor, latents: Tensor) -> Tensor:
        """Reconstructions of ``images`` from the network's own latents."""
        return self.codec.expand(latents).to(images.dtype)

    def _competing(self, images: Tensor, mean: Tensor, log_variance: Tensor | None, latents: Tensor) -> dict[str, Tensor]:
        """Losses of the reconstruction, and the terms of the competition with the discriminator."""
        found = self._expanded(images, latents)
        return self.judges.competing(self._losses(images, found, mean, log_variance), images, found, self.step.number)

    def _losses(self, images: Tensor, found: Tensor, mean: Tensor, log_variance: Tensor | None) -> dict[str, Tensor]:
        losses = {"l1": F.l1_loss(found, images), "mse": F.mse_loss(found, images)}
        loss = self.l1_weight * losses["l1"] + self.mse_weight * losses["mse"]
        if log_variance is not None:
            losses["kl"] = kl_to_standard_normal(mean, log_variance)
            loss = loss + self.kl_weight * losses["kl"]
        return self.judges.seen({"loss": loss, **losses}, images, found)


class DecoderTuning(Autoencoder):
    """Method that trains a codec's decoder further while its latents stay what they are, bit for bit.

    What Stable Diffusion's ``ft-MSE`` decoders are to its codec: whatever was trained on the latents goes on to fit, and its
    images become sharper. Noise is added to the latents, because those that a model generates are never quite true.

    Args:
        codec: whose decoder is trained.
        l1_weight, mse_weight: see ``Autoencoder``.
        noise: standard deviation of what is added to normalised latents while training (our choice).
        perceptual, perceptual_weight, discriminator, adversarial: see ``Autoencoder``.
    """

    def __init__(
        self,
        codec: LatentCodec,
        l1_weight: Weight = 1.0,
        mse_weight: Weight = 4.0,
        noise: Weight = 0.1,
        perceptual: PerceptualDistance | FeatureEncoder | None = None,
        perceptual_weight: Weight = 0.1,
        discriminator: Discriminator | None = None,
        adversarial: AdversarialLoss | None = None,
    ) -> None:
        self.noise = noise
        super().__init__(
            codec,
            perceptual,
            l1_weight,
            mse_weight,
            kl_weight=0.0,
            perceptual_weight=perceptual_weight,
            discriminator=discriminator,
            adversarial=adversarial,
        )

    def check_trained(self, trained: Sequence[str]) -> None:
        """The latents must not change."""
        allowed = ["decoder", *(["discriminator"] if self.judges.discriminator is not None else [])]
        if any(name not in allowed for name in trained) or "decoder" not in trained:
            raise UserError("training.trained", f"{list(trained)}", f"{allowed}", "the latents must stay what they are")

    def parts(self) -> dict[str, nn.Module]:
        """``decoder``, ``encoder`` with whatever else the codec has, and the judges."""
        decoder = self.codec.model.decoder
        rest = nn.ModuleList(part for part in self.codec.model.children() if part is not decoder)
        return {"decoder": decoder, "encoder": rest, **self.judges.parts()}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruct every image of the batch from its latents and a little noise."""
        groups, images = [], [*batch.images, *batch.requested]
        for places, stack in by_size(images or self._blank()):
            with torch.no_grad():
                mean, log_variance = self.codec.posterior(stack)
                noisy = mean + torch.randn_like(mean) * self.noise / self.codec.scaling
            groups.append((len(places), self._competing(stack, mean, log_variance, noisy)))
        return self._over_images(groups, len(images))
