"""Steps of a sampler behind contexts that are kept as keys and values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from umm_zoo.backbones.devices import send
from umm_zoo.backbones.mixture_vlm import Context, MixtureModel, plan_of
from umm_zoo.batch import Grid
from umm_zoo.blocks.latent_tokens import LatentTokens
from umm_zoo.blocks.sequence_plan import Item
from umm_zoo.objectives.guidance import ContextGuidance, ContextName


class ContextSteps:
    """The velocity of noisy latents behind each context, guided; nothing is appended to any.

    Args:
        vlm, latents: of the method.
        guidance: how the contexts are put together.
        contexts: of the same rows; "whole" is there, and of the others those that count.
        grid: of the latents.
    """

    def __init__(
        self,
        vlm: MixtureModel,
        latents: LatentTokens,
        guidance: ContextGuidance,
        contexts: Mapping[ContextName, Context],
        grid: Grid,
    ) -> None:
        self.vlm, self.latents, self.guidance, self.grid = vlm, latents, guidance, grid
        self.contexts = dict(contexts)
        noise = [Item("noise", num_tokens=latents.grid(grid).num_cells)]
        self.plans = {
            name: plan_of(vlm, [noise] * len(own.real), own.next_positions.tolist()) for name, own in self.contexts.items()
        }
        self.masks = {name: own.mask(self.plans[name].mask(own.real.device)) for name, own in self.contexts.items()}

    def __call__(self, noisy: Tensor, time: Tensor, condition: object = None) -> Tensor:
        """Velocities ``[B, C, h, w]`` at one time of all rows ``[B]``."""
        tokens = self.latents.enter(noisy, time)
        whole = self._velocity("whole", tokens)
        if len(self.contexts) == 1 or not self.guidance.guides(float(time[0])):
            return whole
        others = {name: self._velocity(name, tokens) for name in self.contexts if name != "whole"}
        wide = {name: self._by_token(own) for name, own in others.items()}
        guided = self.guidance(self._by_token(whole), wide.get("no_text"), wide.get("no_image"))
        return torch.nn.functional.pixel_shuffle(guided, self.latents.patch)

    def _by_token(self, velocity: Tensor) -> Tensor:
        """All that a token says among its channels: ``[B, C p p, h/p, w/p]``."""
        return torch.nn.functional.pixel_unshuffle(velocity, self.latents.patch)

    def _velocity(self, name: ContextName, tokens: Tensor) -> Tensor:
        context, plan = self.contexts[name], self.plans[name]
        embedded = self.vlm.embed(plan, {"noise": list(tokens)})
        states = self.vlm.stack.read(embedded, plan.route, plan.positions, self.masks[name], context.cache, keep=False)
        own = states.flatten(0, 1).index_select(0, send(plan.places["noise"], states.device))
        return self.latents.leave(own.unflatten(0, (len(tokens), -1)), self.grid).float()
