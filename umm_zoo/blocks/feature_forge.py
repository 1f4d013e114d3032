"""Forge of image features: a flow over the feature grid of a vision encoder, under a language model's states at queries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.prefix import Prefix, PrefixBackbone
from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.denoisers import Denoiser
from umm_zoo.blocks.pathways import FrozenPathway, QueryPathway
from umm_zoo.blocks.queries import LearnedQueries
from umm_zoo.errors import Share, Weight
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import guide
from umm_zoo.objectives.schedules import EvenlySpaced
from umm_zoo.objectives.solvers import Euler


class FeatureForge(nn.Module):
    """Flow head that generates the features of a frozen vision encoder from what a frozen language model makes of a prompt.

    Learned queries stand behind the prompt; their states behind the last layer go through the connector and are the condition of a
    flow transformer over the encoder's grid, which is sampled under guidance against the empty prompt. The release generates
    SigLIP's 27 x 27 tokens of width 1152 in 30 steps at guidance 4.5.

    How it was trained is not published. Our choice: flow matching with uniform times, a tenth of the prompts empty, and tokens that
    are each brought to mean 0 and variance 1 (``normalised``), so that they are of the size of the noise that the flow starts from.

    Reference: "Forge-and-Quench" (arXiv 2601.04706) and its released code, which is for inference only.

    Args:
        queries: behind the prompt.
        connector: a two-layer GELU MLP (``MLPConnector``) in the release.
        denoiser: "Flux-style" in the release, ``FluxOnFeatures`` for one.
        pathway: the layers that run over the queries; None is the frozen language model itself (``FrozenPathway``).
        objective: None is flow matching and 30 even Euler steps (even: our choice).
        guidance: scale against the empty prompt.
        drop_prompt: share of prompts that are left empty in training.

    Shape:
        - condition: of B prompts, ``[B, N, E]``
        - features: ``[B, h*w, D]``, in raster order on the encoder's grid
    """

    def __init__(
        self,
        queries: LearnedQueries,
        connector: Connector,
        denoiser: Denoiser,
        pathway: QueryPathway | None = None,
        objective: FlowMatching | None = None,
        guidance: Weight = 4.5,
        drop_prompt: Share = 0.1,
    ) -> None:
        super().__init__()
        self.queries, self.connector, self.denoiser = queries, connector, denoiser
        self.pathway = pathway or FrozenPathway()
        self.objective = objective or FlowMatching(num_steps=30, schedule=EvenlySpaced(), solver=Euler())
        self.guidance, self.drop_prompt = guidance, drop_prompt
        self.grid, self.width = Grid(0, 0), 0  # of the features, once it is joined

    def join(self, vlm: PrefixBackbone, encoder: FeatureEncoder) -> None:
        """Stand behind a language model and before the features of an encoder, from now on.

        Raises:
            ValueError: sizes of the blocks disagree.
        """
        denoiser: Any = self.denoiser
        for mine, found, theirs, expected in (
            ("forge.queries.width", self.queries.width, "vlm.width", vlm.width),
            ("forge.connector.in_dim", self.connector.in_dim, "vlm.width", vlm.width),
            ("forge.connector.out_dim", self.connector.out_dim, "forge.denoiser.condition_dim", denoiser.condition_dim),
            ("forge.denoiser.latent_channels", denoiser.latent_channels, "encoder.token_width", encoder.token_width),
        ):
            if found != expected:
                raise ValueError(f"{mine} is {found}, {theirs} is {expected}")
        self.pathway.attach(vlm)
        self.queries.start_from(vlm.token_embeddings)
        self.grid, self.width = encoder.grid, encoder.token_width

    def condition(self, context: Tokens, prefix: Prefix) -> Tokens:
        """The denoiser's condition from prompts that the language model has encoded; gradients reach queries and connector."""
        grid = self.queries.grid_for(self.grid)
        queries = self.queries.behind_marker(self.queries(context, grid))
        states = self.pathway(prefix, None, queries, grid)  # [B, N, D]
        return self.connector(Tokens(states.to(next(self.connector.parameters(), states).dtype)), grid)

    def losses(self, features: Tensor, condition: Tokens, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The objective's terms for features that are ``normalised``."""
        return self.objective(self.denoiser, self._cells(features), condition, generator)

    def noise(self, seeds: list[int], device: torch.device) -> Tensor:
        """Noise ``[B, h*w, D]`` to start from, drawn on the CPU so that a seed means the same on every machine."""
        drawn = [torch.randn(self.grid.num_cells, self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(device)

    @torch.no_grad()
    def sample(self, condition: Tokens, empty: Tokens, noise: Tensor) -> Tensor:
        """Features from noise, and from the conditions of the prompts and of as many empty ones."""
        start = self._cells(noise)
        branches = guide(empty, condition, self.guidance)
        made = self.objective.sample(self.denoiser, (len(start), *start.shape[1:]), branches, noise=start)
        return made.flatten(2).transpose(1, 2)

    def _cells(self, features: Tensor) -> Tensor:
        """``[B, h*w, D]`` -> ``[B, D, h, w]``."""
        return features.transpose(1, 2).unflatten(2, tuple(self.grid))


def normalised(tokens: Tensor) -> Tensor:
    """Each token ``[..., D]`` at mean 0 and variance 1, in float32 at least."""
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    return F.layer_norm(wide, wide.shape[-1:])
