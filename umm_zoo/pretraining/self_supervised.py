"""Methods that train an image encoder without label or text: invariance between two views, and masked prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import numbers
from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.features import DINOv2Features
from umm_zoo.batch import Batch, image_of_each_row, map_by_size
from umm_zoo.errors import Count, Natural, Share, UserError, Weight
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs


class Views(nn.Module):
    """Random versions of images that show the same thing: shifted, lighter or darker, noisy, with a square missing.

    Milder than the crops and colour jitter of natural images, which would teach that place and colour do not matter: here they are
    what the image is about (our choice).

    Shape:
        - forward: ``[B, 3, H, W]`` to the same

    Args:
        max_shift: pixels along each axis, edges repeated.
        brightness: largest change of level, in the scale [-1, 1].
        noise: standard deviation.
        hole: side of the missing (grey) square in pixels; 0 for none.
    """

    def __init__(self, max_shift: Natural = 1, brightness: Weight = 0.1, noise: Weight = 0.05, hole: Natural = 4) -> None:
        super().__init__()
        self.max_shift, self.brightness, self.noise, self.hole = max_shift, brightness, noise, hole

    def forward(self, images: Tensor) -> Tensor:
        """One random view of each image."""
        B, _, H, W = images.shape
        device, s = images.device, self.max_shift
        padded = F.pad(images, (s, s, s, s), mode="replicate")
        rows = torch.randint(2 * s + 1, (B, 1), device=device) + numbers(device, H)  # [B, H]
        columns = torch.randint(2 * s + 1, (B, 1), device=device) + numbers(device, W)  # [B, W]
        index = numbers(device, B)[:, None, None]
        view = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # [B, 3, H, W]
        level = (torch.rand(B, 1, 1, 1, device=device) * 2 - 1) * self.brightness
        view = view + level + torch.randn_like(view) * self.noise
        if self.hole:
            top = torch.randint(H - self.hole + 1, (B, 1), device=device)
            left = torch.randint(W - self.hole + 1, (B, 1), device=device)
            y, x = numbers(device, H), numbers(device, W)
            tall = (y >= top) & (y < top + self.hole)  # [B, H]
            wide = (x >= left) & (x < left + self.hole)  # [B, W]
            view = view.masked_fill((tall[:, :, None] & wide[:, None, :])[:, None], 0.0)
        return view.clamp(-1, 1)


def variance_hinge(features: Tensor) -> Tensor:
    """Shortfall below 1 of the standard deviation of each feature ``[B, F]``, averaged (VICReg, equation 1)."""
    return F.relu(1 - (features.var(dim=0) + 1e-4).sqrt()).mean()


def off_diagonal_covariance(features: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances of ``[B, F]``, divided by F (VICReg, equation 4)."""
    centred = features - features.mean(dim=0)
    covariance = centred.T @ centred / (len(features) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / features.shape[1]


class SelfSupervised(Method):
    """Method that trains an image encoder without labels, under random numbers of its own; a subclass has the losses."""

    encoder: FeatureEncoder

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """The losses under random numbers of a fixed seed, and the features of the images as they are."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch_idx)
            losses = self.training_losses(batch)
        return Outputs(losses, image_features=torch.stack(map_by_size(self.encoder, image_of_each_row(batch))))


class VICReg(SelfSupervised):
    """Method of invariance between views of an image, while each feature keeps its variance and features do not repeat each other.

    Bardes et al., 2022, arXiv 2105.04906, section 4; no negatives, no teacher, no momentum. The vectors compared are those of an
    expander, a small MLP behind the encoder that is thrown away afterwards.

    Variance, covariance and the expander's batch norm are of a micro-batch of a rank by definition: a step that is shared out
    otherwise is another step, though each row weighs alike.

    Args:
        encoder: trained; its pooled vector enters the expander.
        views: makes the random versions.
        expander_dim: width of the expander and its output (paper 8192 at width 2048; ours four times less in proportion).
        invariance_weight, variance_weight, covariance_weight: section 4.2.
    """

    makes = ("loss", "invariance", "variance", "covariance", "image_features")

    def __init__(
        self,
        encoder: FeatureEncoder,
        views: Views | None = None,
        expander_dim: Count = 128,
        invariance_weight: Weight = 25.0,
        variance_weight: Weight = 25.0,
        covariance_weight: Weight = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.views = encoder, views or Views()
        self.expander = nn.Sequential(
            nn.Linear(encoder.width, expander_dim), nn.BatchNorm1d(expander_dim), nn.ReLU(), nn.Linear(expander_dim, expander_dim)
        )
        self.weights = (invariance_weight, variance_weight, covariance_weight)

    def parts(self) -> dict[str, nn.Module]:
        """``encoder`` and ``expander``."""
        return {"encoder": self.encoder, "expander": self.expander}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The three terms over two views of each image.

        Raises:
            UserError: the batch has one row only, which has no variance.
        """
        images = image_of_each_row(batch)
        if len(images) < 2:
            raise UserError("data.batch_size", f"a batch of {len(images)}", "2 rows or more for VICReg")

        def seen(stack: Tensor) -> Tensor:
            return self.encoder(self.views(stack))

        one, two = (self.expander(torch.stack(map_by_size(seen, images))) for _ in range(2))  # [B, F] each
        terms = {
            "invariance": F.mse_loss(one, two),
            "variance": 0.5 * (variance_hinge(one) + variance_hinge(two)),
            "covariance": off_diagonal_covariance(one) + off_diagonal_covariance(two),
        }
        loss = sum((w * term for w, term in zip(self.weights, terms.values(), strict=True)), one.new_zeros(()))
        return self.over_step({"loss": loss, **terms}, "rows", len(batch))


class MaskedImageModelling(SelfSupervised):
    """Method that predicts the pixels of hidden patches, and of the whole image from the class token alone.

    The first term is SimMIM (Xie et al., 2022, arXiv 2111.09886): hidden patches carry the mask token through the encoder, one
    linear layer predicts their pixels, the loss is L1 over hidden pixels. It leaves the class token untrained, and that token is
    what scores compare; so a second, small decoder must reconstruct the image from it (our choice).

    Args:
        encoder: trained; its network takes a mask.
        mask_ratio: share of hidden patches (paper 0.6).
        summary_weight: of the second term.
        hidden_dim: width of its decoder.
    """

    makes = ("loss", "masked", "summary", "image_features")
    encoder: DINOv2Features

    def __init__(
        self, encoder: DINOv2Features, mask_ratio: Share = 0.6, summary_weight: Weight = 1.0, hidden_dim: Count = 256
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_ratio, self.summary_weight = mask_ratio, summary_weight
        self.patch = encoder.image_size // encoder.grid.h
        pixels = 3 * self.patch**2
        self.decoder = nn.ModuleDict(
            {
                "patches": nn.Linear(encoder.token_width, pixels),
                "summary": nn.Sequential(
                    nn.LayerNorm(encoder.width),
                    nn.Linear(encoder.width, hidden_dim),
                    nn.GELU(),
                    nn.Linear(hidden_dim, encoder.grid.num_cells * pixels),
                ),
            }
        )

    def parts(self) -> dict[str, nn.Module]:
        """``encoder`` and ``decoder``."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Both terms under random masks."""
        images = image_of_each_row(batch)
        pixels = torch.stack(map_by_size(lambda stack: self.encoder.pixels(stack, whole=True), images))
        B, N = len(pixels), self.encoder.grid.num_cells
        hidden = torch.rand(B, N, device=pixels.device).argsort(dim=1) < round(self.mask_ratio * N)  # [B, N]
        output = self.encoder.vision(pixels, masked=hidden)
        targets = F.pixel_unshuffle(pixels, self.patch).flatten(2).transpose(1, 2)  # [B, N, 3*p*p]
        found = self.decoder["patches"](output.last_hidden_state[:, -N:])  # [B, N, 3*p*p]
        summary = self.decoder["summary"](output.pooler_output).view_as(targets)
        masked = F.l1_loss(found[hidden], targets[hidden])
        whole = F.l1_loss(summary, targets)
        terms = {"loss": masked + self.summary_weight * whole, "masked": masked, "summary": whole}
        return self.over_step(terms, "rows", len(batch))
