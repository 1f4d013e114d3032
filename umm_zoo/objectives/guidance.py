"""Classifier-free guidance: a weighted sum over conditions, whatever their number; and the form that policy gradients train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.by_shape import constants
from umm_zoo.batch import Tokens
from umm_zoo.errors import Share, Weight
from umm_zoo.objectives.base import Predictor

#: What a request is seen with: as it is, without its last words, or without its images.
ContextName = Literal["whole", "no_text", "no_image"]


class Branch(NamedTuple):
    """A condition and the weight of the prediction under it; the weights of all branches of a sum add up to one."""

    condition: Tokens
    weight: float


def guide(unconditional: Tokens, conditional: Tokens, scale: float) -> list[Branch]:
    """``v_unc + scale (v_con - v_unc)`` (Ho and Salimans, 2022, arXiv 2207.12598); at scale 1 the first branch drops out."""
    return [Branch(unconditional, 1 - scale), Branch(conditional, scale)]


def guide_edit(
    unconditional: Tokens, reconstruction: Tokens, edit: Tokens, reconstruction_scale: float, edit_scale: float
) -> list[Branch]:
    """``v_unc + a (v_rec - v_unc) + b (v_edit - v_rec)``: the image's share and the instruction's are set apart.

    WeMMU's form for editing, with a = 2 and b = 3 there (our understanding: v_rec is the prediction under the task "reconstruct");
    introduced by Brooks et al., 2023, arXiv 2211.09800, equation 3.
    """
    a, b = reconstruction_scale, edit_scale
    return [Branch(unconditional, 1 - a), Branch(reconstruction, a - b), Branch(edit, b)]


class GuidedDenoiser:
    """A denoiser whose prediction is the weighted sum over branches; the condition it is called with is not used.

    All branches run in one call of the network, stacked along the batch. Branches of weight zero are not run. Conditions of
    different lengths are padded and masked.

    Args:
        denoiser: ``(noisy, time, condition)``.
        branches: conditions ``[B, N_k, E]`` and weights.

    Raises:
        ValueError: no branch, or weights that do not add up to one.
    """

    def __init__(self, denoiser: Predictor, branches: Sequence[Branch]) -> None:
        total = sum(branch.weight for branch in branches)
        if not branches or abs(total - 1) > 1e-4:
            raise ValueError(f"guidance: found weights with the sum {total:.4g}, expected 1")
        self.denoiser = denoiser
        kept = [branch for branch in branches if branch.weight != 0]
        self.weights = [branch.weight for branch in kept]
        self.condition = stacked([branch.condition for branch in kept])

    def __call__(self, noisy: Tensor, time: Tensor, condition: Tokens | None = None) -> Tensor:
        """The combined prediction, ``[B, C, h, w]``."""
        copies = len(self.weights)
        predicted = self.denoiser(noisy.repeat(copies, 1, 1, 1), time.repeat(copies), self.condition)  # [K*B, C, h, w]
        weights = constants(predicted.device, tuple(self.weights), predicted.dtype)
        return torch.einsum("k,kbchw->bchw", weights, predicted.unflatten(0, (copies, -1)))


class GuidedRows:
    """A network of rows whose prediction is ``u + scale (c - u)``, of the condition it is called with and another of each row.

    Beside a ``GuidedDenoiser`` it takes regression heads too, and leaves channels beyond those given, such as a learned variance,
    as they are under the condition (MAR's release).

    Args:
        network: ``(noisy, time, condition)``, or ``(condition)``.
        unconditional: ``[B, 1, E]``.
        scale: of guidance.
        channels: that are guided.
    """

    def __init__(self, network: Predictor, unconditional: Tensor, scale: float, channels: int) -> None:
        self.network, self.unconditional, self.scale, self.channels = network, unconditional, scale, channels

    def __call__(self, *arguments: Any) -> Tensor:
        """The guided prediction; both run in one call."""
        *inputs, condition = arguments
        both = Tokens(torch.cat([condition.values, self.unconditional.to(condition.values)]))
        found, other = self.network(*(torch.cat([own, own]) for own in inputs), both).chunk(2)
        count = self.channels
        mixed = other[:, :count] + self.scale * (found[:, :count] - other[:, :count])
        return torch.cat([mixed, found[:, count:]], dim=1)


class DetachedGuidance:
    """Classifier-free guidance whose unconditional branch gets no gradient: ``v_u + scale (v_c - v_u)``, ``v_u`` detached.

    Used with the same scale for sampling and training. At scale 1 the unconditional branch is not run.

    Args:
        denoiser: ``(noisy, time, condition)``.
        negative: the condition of the unconditional branch, one row for each of the batch; None only at scale 1.
        scale: 4.5 in Flow-GRPO's release.

    Raises:
        ValueError: no negative condition at a scale other than 1.
    """

    def __init__(self, denoiser: Predictor, negative: Tokens | None, scale: float) -> None:
        if negative is None and scale != 1:
            raise ValueError(f"guidance: found scale {scale} without a negative condition, expected one (1 alone does without)")
        self.denoiser, self.negative, self.scale = denoiser, negative, scale

    def __call__(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """The guided velocity."""
        conditional = self.denoiser(noisy, time, condition)
        if self.scale == 1 or self.negative is None:
            return conditional
        with torch.no_grad():  # no graph is kept for it, so that training takes the memory of one branch
            unconditional = self.denoiser(noisy, time, self.negative)
        return unconditional + self.scale * (conditional - unconditional)


class ContextGuidance:
    """Guidance by two weights over three contexts, renormalised, in an interval of times.

    ``v_t = v_nt + text (v - v_nt)`` and ``v' = v_ni + image (v_t - v_ni)``, with v under the whole request, v_nt without its words
    and v_ni without its images; then ``v' clamp(|v| / |v'|, least, 1)`` with norms over each image (``global``; the release's runs
    over the whole batch, of which it takes one row), over the channels of each token (``channel``), or over those of v_t before
    the second step (``text_channel``). Outside of the interval v alone.

    A request without images has no v_ni of its own: taken for v, it would make the scale of the words 1 + image (text - 1), 5.5 for
    4 and 1.5, and cost a third pass (the release's demo). It is left out here, as is v_nt of a request without words. At ``text``
    1 the release guides by no image either.

    Reference: Deng et al., "Bagel" (arXiv 2505.14683); its released ``bagel.py``.

    Args:
        text, image: the scales; 1 leaves a context out.
        low, high: times in (low, high] are guided; (0.4, 1] in the release for text-to-image, (0, 1] for edits.
        renorm: over what; None for none.
        least: of the factor.

    Raises:
        ValueError: a number is not finite, or the interval is empty.
    """

    def __init__(
        self,
        text: Weight = 4.0,
        image: Weight = 1.5,
        low: Share = 0.4,
        high: Share = 1.0,
        renorm: Literal["global", "channel", "text_channel"] | None = "global",
        least: Share = 0.0,
    ) -> None:
        if not (math.isfinite(text) and math.isfinite(image) and low < high):
            found = f"scales {text} and {image}, times from {low} to {high}"
            raise ValueError(f"ContextGuidance: found {found}, expected finite numbers, and times that rise")
        self.text, self.image, self.low, self.high, self.renorm, self.least = text, image, low, high, renorm, least

    @classmethod
    def none(cls) -> ContextGuidance:
        """The prediction under the whole request alone."""
        return cls(text=1.0, image=1.0)

    def changed(self, text: float | None, image: float | None) -> ContextGuidance:
        """The same with other scales, where they are given."""
        scales = self.text if text is None else text, self.image if image is None else image
        return ContextGuidance(*scales, self.low, self.high, self.renorm, self.least)

    def contexts(self, has_text: bool, has_images: bool) -> list[ContextName]:
        """Those that count for a request with words or without, with images or without."""
        names: list[ContextName] = ["no_text"] if has_text and self.text != 1 else []
        return ["whole", *names, *(["no_image"] if has_images and self.image != 1 else [])]  # type: ignore[list-item]

    def guides(self, time: float) -> bool:
        """Whether a time is in the interval."""
        return self.low < time <= self.high

    def __call__(self, whole: Tensor, no_text: Tensor | None, no_image: Tensor | None) -> Tensor:
        """The guided velocity ``[B, C, h, w]``, a channel of a token being one of C; None is a context that is left out."""
        guided = whole if no_text is None else no_text + self.text * (whole - no_text)
        if self.renorm == "text_channel":
            guided = self._renormed(guided, whole, (1,))
        if no_image is not None:
            guided = no_image + self.image * (guided - no_image)
        if self.renorm in ("global", "channel"):
            guided = self._renormed(guided, whole, (1,) if self.renorm == "channel" else (1, 2, 3))
        return guided

    def _renormed(self, guided: Tensor, whole: Tensor, axes: tuple[int, ...]) -> Tensor:
        before, after = (torch.linalg.vector_norm(own, dim=axes, keepdim=True) for own in (whole, guided))
        return guided * (before / (after + 1e-8)).clamp(self.least, 1)


def stacked(conditions: Sequence[Tokens]) -> Tokens:
    """Conditions of one batch each as one batch, row blocks in order; shorter ones are padded, and masked then."""
    longest = max(condition.values.shape[1] for condition in conditions)
    values = torch.cat([F.pad(c.values, (0, 0, 0, longest - c.values.shape[1])) for c in conditions])
    crops = [crop for c in conditions for crop in c.crops or [None] * len(c.values)] if any(c.crops for c in conditions) else ()
    if all(c.mask is None and c.values.shape[1] == longest for c in conditions):
        return Tokens(values, crops=crops)
    masks = [
        torch.ones(c.values.shape[:2], dtype=torch.bool, device=values.device) if c.mask is None else c.mask for c in conditions
    ]
    return Tokens(values, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]), crops)
