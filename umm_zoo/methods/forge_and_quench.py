"""Forge-and-Quench: an image feature forged from a language model's states and injected into a frozen decoder beside the text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.feature_injection import FeatureInjection
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.batch import Batch, Tokens, Turn, by_size, map_by_size, stacked
from umm_zoo.blocks.feature_forge import FeatureForge, normalised
from umm_zoo.errors import Share, UserError, Weight
from umm_zoo.methods.feature_sources import FeatureSource, Forged
from umm_zoo.methods.requests import row_seeds
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.reduction import mean_over_groups
from umm_zoo.outputs import Outputs, Sampling, TokenCount, add_counts, sequence_counts
from umm_zoo.pretraining.text_to_image import TextToImageModel, prompts


class ForgeAndQuench(TextToImageModel):
    """Text-to-image model that stays as it is, shown a feature that a frozen vision-language model forges from the prompt.

    ``forge`` (the Bridge Adapter) generates the features of an image that is not there yet from the language model's states at
    learned queries; ``injection`` lets the image tokens of the frozen decoder attend to them, beside the text, which the decoder is
    conditioned on as before. With ``injection.scale`` 0 it is the text-to-image model bit for bit. Both branches of the decoder's
    guidance see the feature (our choice: FLUX.1-dev, the release's, has one branch).

    The training is not published. Ours, in stages or at once, by ``training.trained``:

    - ``forge`` learns by flow matching of the encoder's features under the prompt.
    - ``injection`` learns under the decoder's own objective, with the *true* features of the image to be generated. Forged ones
      would teach it little: drawn without a look at that image, they tell no more of it than the prompt does. The price is that
      forged features, which it has not met, are not quite like true ones.

    The release's inference passes a generator to a function that takes none, and fixes the seed of its noise; here each row has its
    own. That the language model rewrites the prompt first is no part of it here.

    Reference: "Forge-and-Quench" (arXiv 2601.04706) and its released code, which is for inference only.

    Args:
        vlm: frozen for good; Qwen2.5-VL in the paper.
        encoder: frozen, whose features are forged; SigLIP in the paper.
        forge, injection: see there.
        text_encoder, decoder, codec, objective: the text-to-image model; FLUX.1-dev in the paper. All frozen.
        source: what is injected; None is ``Forged``.
        drop_text: share of prompts that the decoder is not shown while the injection learns (our choice, as in its own training).
        guidance: of the decoder by its text; 1 in the paper (FLUX.1-dev is told its own).

    Raises:
        ValueError: sizes of the blocks disagree.
    """

    def __init__(
        self,
        vlm: PrefixBackbone,
        encoder: FeatureEncoder,
        forge: FeatureForge,
        injection: FeatureInjection,
        text_encoder: TextEncoder,
        decoder: ImageDecoder,
        codec: LatentCodec,
        objective: DecoderObjective,
        source: FeatureSource | None = None,
        drop_text: Share = 0.1,
        guidance: Weight = 1.0,
    ) -> None:
        super().__init__(text_encoder, decoder, codec, objective, drop_text, guidance)
        if (found := injection.resampler.in_dim) != encoder.token_width:
            raise ValueError(f"injection.resampler.in_dim is {found}, encoder.token_width is {encoder.token_width}")
        self.vlm, self.encoder, self.forge, self.injection = vlm, encoder, forge, injection
        self.source = source or Forged()
        forge.join(vlm, encoder)
        injection.attach(decoder)
        for part in (*vlm.parts().values(), encoder):
            freeze(part)

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone and of the text-to-image model, and ``encoder``, ``forge``, ``injection``."""
        own = {"encoder": self.encoder, "forge": self.forge, "injection": self.injection}
        return {**self.vlm.parts(), **super().parts(), **own}

    def check_trained(self, trained: Sequence[str]) -> None:
        """All but forge and injection is frozen for good."""
        if others := sorted(set(trained) - {"forge", "injection"}):
            raise UserError("training.trained", f"'{others[0]}'", "forge, injection or both: the models they join stay as they are")
        if "injection" in trained and not self.injection.scale:
            raise UserError("method.injection.scale", "0", "another number where the injection is trained: at 0 nothing reaches it")

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows without a prompt, with an image to look at, or too long for the language model."""
        super().check_rows(batch, scoring)
        batch.assert_no_images("Forge-and-Quench")
        self.vlm.check_rows(batch, for_generation=True, opening=self.forge.queries.opening)

    # -- features ------------------------------------------------------------------------------------------------------------

    def feature_condition(self, texts: Sequence[str]) -> Tokens:
        """The forge's condition ``[B, N, E]`` of texts; the language model encodes each once, without gradient."""
        conversations = [[Turn(role="user", text=text)] for text in texts]
        opening = self.forge.queries.opening
        with torch.no_grad():
            inputs = self.vlm.embed(conversations, None, [0] * len(texts), for_generation=True, opening=opening)
            prefix = self.vlm.keys(inputs)
        condition = self.forge.condition(Tokens(inputs.embeddings, inputs.mask), prefix)
        text = sequence_counts(prefix.attention_mask, inputs.image_mask)["text"]
        self.token_counts = add_counts(self.token_counts or {}, {"text": text, "query": TokenCount.of(condition)})
        return condition

    @torch.no_grad()
    def true_features(self, batch: Batch) -> Tensor:
        """See ``HasFeatures``: patch tokens of the encoder's last layer, ``normalised``."""
        return normalised(torch.stack(map_by_size(self.encoder.tokens, batch.requested)))

    @torch.no_grad()
    def forged(self, batch: Batch, seeds: Sequence[int]) -> Tensor:
        """See ``HasFeatures``."""
        condition, one = self.feature_condition(prompts(batch)), self.feature_condition([""])
        empty = Tokens(one.values.expand(len(batch), -1, -1))
        return self.forge.sample(condition, empty, self.noise(seeds))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """See ``HasFeatures``; other numbers than those that the image of the same seed starts from."""
        return self.forge.noise([seed + 1_000_003 for seed in seeds], self.device)

    # -- training ------------------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``forge_loss`` and ``image_loss``, as far as their parts are trained, and ``loss``, their sum."""
        features, texts = self.true_features(batch), prompts(batch)
        losses: dict[str, Tensor] = {}
        self.token_counts = None
        if "injection" in self.trained:
            condition = self.condition(_without(texts, self.drop_text))
            self.token_counts = {"text": TokenCount.of(condition)}
            losses["image_loss"] = self.image_terms(batch, features, condition)["loss"]
        if "forge" in self.trained:
            condition = self.feature_condition(_without(texts, self.forge.drop_prompt))
            losses["forge_loss"] = self.forge.losses(features, condition)["loss"]
        return self.over_step({**losses, "loss": torch.stack(list(losses.values())).sum()}, "rows", len(batch))

    def image_terms(
        self, batch: Batch, features: Tensor, condition: Tokens, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The decoder's terms under the condition of texts ``[B, N, E]`` and features ``[B, N, D]``; images of any sizes."""
        groups = by_size(self.codec.target_latents(batch))
        condition = replace(condition, crops=batch.crops)
        conditioned = self.decoder.conditioned(groups, lambda rows, _: condition.select(rows or [0]))
        terms = []
        for (rows, _), (latents, own) in zip(groups, conditioned, strict=False):  # what stands in comes last, and has no terms
            with self.injection.features(features[rows]):
                terms.append((len(latents), self.objective(self.decoder, latents, own, generator)))
        return mean_over_groups(terms)

    # -- use -----------------------------------------------------------------------------------------------------------------

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return (*super().makes, "round_trips", "forge_flow", "feature_cosine")

    def _validate(self, batch: Batch, batch_idx: int) -> Outputs:
        """The decoder's terms with true features; ``forge_flow``, the forge's plain error, at fixed times and noise; images.

        Images are ``generated`` from noise that depends on the row alone, and ``feature_cosine`` is that of what was injected and
        the features of the true image, token by token.
        """
        features, texts = self.true_features(batch), prompts(batch)
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        outputs = Outputs(self.image_terms(batch, features, self.condition(texts), generator))
        forge = self.forge.losses(features, self.feature_condition(texts), generator)
        outputs.scalars["forge_flow"] = forge["flow"]
        if self.wanted.generates(batch_idx):
            height, width = batch.requested[0].shape[-2:]
            seeds, sampling = row_seeds(batch), Sampling(size=(height, width))
            injected = self.source(self, batch, seeds)
            outputs.scalars["feature_cosine"] = F.cosine_similarity(injected, features, dim=-1).mean()
            outputs.generated = self.generate_with(injected, batch, seeds, sampling)
            outputs.round_trips = list(self.codec.decode(stacked(self.codec.target_latents(batch))).clamp(-1, 1))
        return outputs

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """Images of prompts and of what ``source`` injects, in the decoder's own size where none is said; see ``outputs.Draws``.

        Raises:
            UserError: see ``TextToImage.generate``.
        """
        batch.assert_no_images("Forge-and-Quench")
        injected = self.source(self, batch, seeds) if self.injection.scale else None
        return self.generate_with(injected, batch, seeds, sampling)

    @torch.no_grad()
    def generate_with(
        self, features: Tensor | None, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None
    ) -> list[Tensor]:
        """Images of prompts and given features ``[B, N, D]``; None: of the text-to-image model alone."""
        with self.injection.features(features):
            images: list[Tensor] = super().generate(batch, seeds, sampling)
        return images


def _without(texts: list[str], share: float) -> list[str]:
    """Texts, a random share of which are left empty."""
    dropped = (torch.rand(len(texts)) < share).tolist()
    return ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]
