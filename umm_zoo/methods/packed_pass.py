"""One pass over rows of texts and images: losses of words, and terms of an objective of images to generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.devices import send
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.mixture_vlm import Context, MixtureModel, plan_of
from umm_zoo.backbones.precision import antialiased
from umm_zoo.batch import Grid, Tokens, map_by_size
from umm_zoo.blocks.latent_tokens import LatentTokens
from umm_zoo.blocks.sequence_plan import SequencePlan
from umm_zoo.methods.packed_rows import PackedRows
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.step import blocks_are_sharded


@dataclass
class Passed:
    """Losses of a pass.

    Shape:
        - terms: the objective's, ``[T]`` each, in the order of the rows; num_tokens: ``[T]``, of these images
        - nll: ``[K]``, of the words to be learnt, at ``plan.label_places``
        - unused: ``[]``, 0, which has in it what these rows did not need: other ranks wait for its gradients
    """

    plan: SequencePlan
    terms: dict[str, Tensor]
    num_tokens: Tensor
    nll: Tensor
    unused: Tensor

    @property
    def owners(self) -> Tensor:
        """Rows ``[K]`` whose words these are, on the CPU."""
        return self.plan.label_places // max(1, self.plan.route.shape[1])

    def weighed(self, weights: Sequence[float], generates: Sequence[bool]) -> Passed:
        """The losses of each row times a weight of its own; ``generates`` says which rows the images are of, one each."""
        if all(weight == 1 for weight in weights):
            return self
        rows = torch.tensor(weights)
        words, images = send(rows[self.owners], self.nll.device), send(rows[torch.tensor(generates)], self.nll.device)
        return replace(self, nll=self.nll * words, terms={**self.terms, "loss": self.terms["loss"] * images})

    def means(self) -> dict[str, Tensor]:
        """Means of the terms over tokens, each image weighing by its own; a gradient is in ``loss`` alone."""
        total = self.num_tokens.sum().clamp(min=1)
        means = {name: (value * self.num_tokens).sum() / total for name, value in self.terms.items()}
        return {name: value if name == "loss" else value.detach() for name, value in means.items()}


class PackedPass:
    """Passes of a model over rows of items.

    Args:
        vlm, latents, codec: of the method, which owns them.
    """

    def __init__(self, vlm: MixtureModel, latents: LatentTokens, codec: LatentCodec) -> None:
        self.vlm, self.latents, self.codec = vlm, latents, codec

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.vlm.embed_tokens.weight.device

    def clean_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the latent of an input image is taken: whole tokens, and at most as many as have places."""
        unit = self.codec.downsampling * self.latents.patch
        scale = min(1.0, unit * self.latents.max_side / max(height, width))
        high, wide = (max(1, round(side * scale / unit)) * unit for side in (height, width))
        return high, wide

    def clean_tokens(self, height: int, width: int) -> int:
        """Tokens of the clean latent of an input image."""
        high, wide = self.clean_size(height, width)
        return self.latents.grid(self.codec.latent_grid(high, wide)).num_cells

    def stand_in(self) -> None:
        """Call the codec for nothing, where ranks share out its blocks and others have images."""
        if blocks_are_sharded():
            map_by_size(self._clean, [torch.zeros(3, 64, 64, device=self.device)])

    def _clean(self, stack: Tensor) -> Tensor:
        """Latents of input images of one size."""
        if (size := self.clean_size(*stack.shape[-2:])) != tuple(stack.shape[-2:]):
            stack = antialiased(stack, size, "bicubic").clamp(-1, 1).to(stack.dtype)
        return self.codec.encode(stack)

    def context(self, rows: PackedRows) -> Context:
        """Keys and values of rows, for an answer or a sampler to go on from."""
        plan = plan_of(self.vlm, rows.items)
        return self.vlm.context(plan, self._embedded(plan, rows)[0])

    def __call__(
        self, rows: PackedRows, targets: Sequence[Tensor], objective: FlowMatching, generator: torch.Generator | None = None
    ) -> Passed:
        """A pass over whole rows.

        Args:
            rows: with as many items of noise as there are targets, several in a row if need be.
            targets: their clean latents ``[C, h, w]``, in the order of the rows.
            objective: draws times and noise, one of each for an image, and gives its terms.
            generator: of these.
        """
        plan = plan_of(self.vlm, rows.items)
        sizes = [self.latents.grid(Grid(*own.shape[-2:])).num_cells for own in targets]
        groups = _by_shape(targets)
        points = [objective.draw(torch.stack([targets[place] for place in own]), generator) for own in groups]
        noisy = _in_order(groups, [own.noisy for own in points])
        tokens, unused = self._embedded(plan, rows, noisy, _in_order(groups, [own.time for own in points]))
        flat = self.vlm(plan, tokens).flatten(0, 1)
        states = flat.index_select(0, send(plan.places["noise"], flat.device)).split(sizes or [0])
        if not groups:
            unused = unused + self.latents.latent_out(states[0]).sum()
        velocities = iter(
            [self.latents.leave(torch.stack([states[place] for place in own]), Grid(*targets[own[0]].shape[-2:])) for own in groups]
        )
        nothing = Tokens(flat.new_zeros(1, 0, 1))
        terms = objective.terms(lambda *_: next(velocities), [(own, nothing) for own in points], generator) if groups else {}
        logits = self.vlm.lm_head(flat.index_select(0, send(plan.label_places, flat.device)))
        nll = F.cross_entropy(logits.float(), send(plan.labels, flat.device), reduction="none")
        counts = send(torch.tensor(sizes, dtype=torch.long), flat.device)
        terms = terms or {name: flat.new_zeros(0, dtype=torch.float32) for name in objective.makes}
        if len(groups) > 1:
            order = send(torch.tensor([place for own in groups for place in own]).argsort(), flat.device)
            terms = {name: value.index_select(0, order) for name, value in terms.items()}
        return Passed(plan, terms, counts, nll, unused)

    def _embedded(
        self, plan: SequencePlan, rows: PackedRows, noisy: Sequence[Tensor] = (), times: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """What enters the layers, ``[B, L, D]``, and a 0 of what these rows did not need."""
        clean = map_by_size(self._clean, rows.images["clean"]) if rows.images["clean"] else []
        if not clean:
            self.stand_in()
        latents = [*clean, *noisy]
        zero = torch.zeros((), device=self.device)
        entered = list(self._entered(latents, torch.stack([zero] * len(clean) + [own.to(zero) for own in times] or [zero])))
        unused = 0 * entered.pop().sum().float() if not latents else zero
        seen = self.vlm.encode_images(rows.images["seen"]) if rows.images["seen"] else []
        if not seen and torch.is_grad_enabled():
            unused = unused + 0 * self.vlm.encode_images([self.vlm.blank])[0].sum().float()
        return self.vlm.embed(plan, {"seen": seen, "clean": entered[: len(clean)], "noise": entered[len(clean) :]}), unused

    def _entered(self, latents: Sequence[Tensor], times: Tensor) -> list[Tensor]:
        """Tokens ``[N, D]`` of latents; without any those of a blank one."""
        if not latents:
            blank = torch.zeros(1, self.latents.latent_channels, *[self.latents.patch] * 2, device=self.device)
            return list(self.latents.enter(blank, times))
        groups = _by_shape(latents)
        return _in_order(groups, [self.latents.enter(torch.stack([latents[place] for place in own]), times[own]) for own in groups])


def _by_shape(latents: Sequence[Tensor]) -> list[list[int]]:
    """Places of latents of equal size."""
    places: dict[torch.Size, list[int]] = {}
    for place, own in enumerate(latents):
        places.setdefault(own.shape, []).append(place)
    return list(places.values())


def _in_order(groups: Sequence[Sequence[int]], values: Sequence[Tensor]) -> list[Tensor]:
    """Entries of stacks of groups, by their places."""
    found = {place: one for own, stack in zip(groups, values, strict=True) for place, one in zip(own, stack, strict=True)}
    return [found[place] for place in range(len(found))]
