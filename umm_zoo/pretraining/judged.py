"""What methods share whose reconstructions are judged by more than their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.loading import on_meta_device
from umm_zoo.blocks.discriminators import Discriminator
from umm_zoo.checkpoints.files import load_checkpoint, weights_of
from umm_zoo.errors import Share, UserError, Weight, did_you_mean
from umm_zoo.experiment.build import build_embedded
from umm_zoo.experiment.types import is_node
from umm_zoo.method import MakeOptimizer, Method
from umm_zoo.objectives.adversarial import AdversarialLoss
from umm_zoo.objectives.perceptual import FeatureDistance, PerceptualDistance
from umm_zoo.objectives.step import sum_over_ranks


class Judges(nn.Module):
    """A perceptual distance, and a discriminator that learns beside what it judges; either may be missing.

    Args:
        perceptual: what reconstructions should look alike to; an encoder stands for a ``FeatureDistance`` of it; None for none.
        perceptual_weight: of that distance.
        discriminator: tells images from reconstructions, and is a part to be trained; None for none.
        adversarial: what it and the rest are trained by; None is an ``AdversarialLoss`` of its defaults.

    Raises:
        UserError: ``adversarial`` without a discriminator.
    """

    def __init__(
        self,
        perceptual: PerceptualDistance | FeatureEncoder | None = None,
        perceptual_weight: Weight = 0.1,
        discriminator: Discriminator | None = None,
        adversarial: AdversarialLoss | None = None,
    ) -> None:
        super().__init__()
        if adversarial is not None and discriminator is None:
            raise UserError("method.discriminator", "none beside method.adversarial", "a block of umm_zoo.blocks.discriminators")
        self.perceptual = FeatureDistance(perceptual) if isinstance(perceptual, FeatureEncoder) else perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator, self.adversarial = discriminator, adversarial or AdversarialLoss()

    def parts(self) -> dict[str, nn.Module]:
        """Those of ``perceptual`` and ``discriminator`` that there are."""
        judges = {"perceptual": self.perceptual, "discriminator": self.discriminator}
        return {name: part for name, part in judges.items() if part is not None}

    def seen(self, losses: dict[str, Tensor], images: Tensor, found: Tensor) -> dict[str, Tensor]:
        """Losses with ``perceptual``, in their ``loss`` too, where there is one."""
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(found, images).mean()
            losses["loss"] = losses["loss"] + self.perceptual_weight * losses["perceptual"]
        return losses

    def competing(
        self,
        losses: dict[str, Tensor],
        images: Tensor,
        found: Tensor,
        step: int,
        context: Tensor | None = None,
        time: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses with the terms of the competition, of which ``settled`` makes the whole; ``step`` as in ``AdversarialLoss``."""
        if self.discriminator is None:
            return losses
        return losses | self.adversarial.terms(self.discriminator, images, found, step, context, time)

    def settled(self, means: Mapping[str, Tensor], decoder: nn.Module, step: int) -> dict[str, Tensor]:
        """Means over a micro-batch with the competition in ``loss``; ``decoder`` is what the discriminator judges."""
        if self.discriminator is None:
            return dict(means)
        return {**means, **self.adversarial.total(means, means["loss"], decoder, step)}


class Judged(Method):
    """Base of methods that train a codec to reconstruct images before judges.

    The codec's shift and scaling follow the running statistics of its latents, so that any checkpoint can be used as it is.

    Args:
        codec: what is trained.
        judges: None is none.
        statistics_momentum: of the running latent statistics (our choice).

    Attributes:
        codec_argument: name of the argument that the codec is.
        codec_kind: class of the codec.
    """

    stage_only = clipped_apart = ("discriminator",)
    codec_argument: ClassVar[str] = "codec"
    codec_kind: ClassVar[type[Any]] = LatentCodec

    def __init__(self, codec: LatentCodec, judges: Judges | None = None, statistics_momentum: Share = 0.99) -> None:
        super().__init__()
        self.codec, self.judges, self.statistics_momentum = codec, judges or Judges(), statistics_momentum
        self._moments: Tensor | None = None  # of the step's latents; a decoder's training has none

    def remember(self, moments: Tensor) -> None:
        """Keep ``LatentCodec.moments`` of a micro-batch, which count for nothing where its rows stand in for others."""
        moments = moments * (not self.step.weightless)
        self._moments = moments if self.step.place == 0 or self._moments is None else self._moments + moments
        if not self.step.running:
            self.codec.track_moments(moments, self.statistics_momentum)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Move the codec's statistics once for all latents of the step."""
        if not self.step.skipping and self._moments is not None:
            self.codec.track_moments(sum_over_ranks(self._moments), self.statistics_momentum)

    def checkpoint_keys(self) -> set[str]:
        """As ``Method.checkpoint_keys``, and the codec's statistics, which may stand in none of the parts."""
        return super().checkpoint_keys() | {"codec.scaling", "codec.shift"}

    @classmethod
    def load_codec(cls, source: str | Path, trust: Sequence[str] = (), raw_weights: bool = False) -> LatentCodec:
        """The codec that a run of such a method has trained, in evaluation mode: what another experiment takes as its codec.

        codec: {_target_: umm_zoo.pretraining.tokenizer.Tokenizer.load_codec, source: runs/tokenizers/toy/qlip}

        Args:
            source: the run, one of its checkpoints, or what ``umm_zoo.export`` has written of it.
            trust, raw_weights: see ``Method.load``.

        Raises:
            UserError: there is no checkpoint, or it holds no such codec.
        """
        checkpoint = load_checkpoint(source, mapped=True)
        node: Any = checkpoint.get("experiment", {}).get("method", {})
        state = weights_of(checkpoint, raw_weights)[0]
        inside: Any = node.get(cls.codec_argument) if isinstance(node, Mapping) else None
        if is_node(inside):  # else an export: the codec itself stands in the method's place
            node, state = inside, {key[len("codec.") :]: value for key, value in state.items() if key.startswith("codec.")}
        codec: LatentCodec = build_embedded(node, cls.codec_kind, "method", source, trust)
        own = codec.state_dict()
        for key, value in state.items():
            if key not in own or own[key].shape != value.shape:
                found = f"'{key}' of {list(value.shape)}"
                raise UserError(source, found, f"tensors of the codec beside it, a {type(codec).__name__}", did_you_mean(key, own))
        if not on_meta_device():
            codec.load_state_dict(state, strict=False)
        return codec.eval()

    def train_only(self, trained: Sequence[str], make_optimizer: MakeOptimizer | None = None) -> None:
        """As ``Method.train_only``; a discriminator that does not learn would teach nothing.

        Raises:
            UserError: it is not among the trained parts, or the perceptual distance is.
        """
        super().train_only(trained, make_optimizer)
        if self.judges.discriminator is not None and "discriminator" not in trained:
            raise UserError("training.trained", f"{list(trained)}", "'discriminator' too, which is part of the loss")
        if "perceptual" in trained:
            raise UserError("training.trained", "'perceptual', a fixed measure", "it to stay as it is")
