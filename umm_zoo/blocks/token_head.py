"""Denoiser of one image token at a time, without attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.batch import Tokens
from umm_zoo.blocks.denoisers import Denoiser
from umm_zoo.blocks.transformer import time_embedding, xavier_linears
from umm_zoo.errors import Count, Positive


class TokenMLPHead(Denoiser):
    """MLP that denoises a token under a state of it and the time; tokens are rows, and no row sees another.

    MAR's ``SimpleMLPAdaLN``, under the names of its release: ``depth`` residual blocks whose norms are shifted, scaled and gated by
    ``time + state``. Modulations and output start at zero, so the first output is zero.

    Reference: Li et al., "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838), section 3.3.

    Shape:
        - noisy: ``[M, channels, 1, 1]``
        - time: ``[M]``
        - condition: ``[M, 1, condition_dim]``
        - output: ``[M, channels, 1, 1]``, or ``[M, 2 * channels, 1, 1]``

    Args:
        condition_dim: width of the states.
        channels: of a token.
        width, depth: 1024 and 3 by default in the release, 1024 and 6 in MAR-B, 1280 and 8 in MAR-L, 1536 and 12 in MAR-H.
        learned_variance: give as many numbers again, between which bounds the variance lies (``LearnedRangeVariance``); MAR's.
        time_scale: factor on the time; 1 for steps 0 … 999, 1000 for a flow's [0, 1].
    """

    #: Neither MAR nor Harmon decays its weights.
    decayed = False

    def __init__(
        self,
        condition_dim: Count,
        channels: Count = 16,
        width: Count = 1024,
        depth: Count = 3,
        learned_variance: bool = False,
        time_scale: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.condition_dim, self.channels, self.time_scale = condition_dim, channels, time_scale
        self.learned_variance = learned_variance
        self.time_embed, self.cond_embed = TimeMLP(width), nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(GatedBlock(width) for _ in range(depth))
        self.final_layer = ModulatedOutput(width, 2 * channels if learned_variance else channels)
        xavier_linears(self)
        for name, tensor in self.named_parameters():
            if name.startswith("time_embed") and name.endswith("weight"):
                nn.init.normal_(tensor, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(tensor)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """Predict.

        Raises:
            ValueError: another number of channels, or another condition than one vector per row.
        """
        wanted = ([len(noisy), self.channels, 1, 1], [len(noisy), 1, self.condition_dim])
        if (found := (list(noisy.shape), list(condition.values.shape))) != wanted:
            raise ValueError(f"TokenMLPHead: found noisy and condition of {found}, expected {wanted}")
        dtype = self.input_proj.weight.dtype
        guide = self.time_embed(time_embedding(time * self.time_scale, 256).to(dtype))
        guide = guide + self.cond_embed(condition.values[:, 0].to(dtype))  # [M, width]
        x = self.input_proj(noisy.flatten(1).to(dtype))
        for block in self.res_blocks:
            x = block(x, guide)
        return self.final_layer(x, guide)[..., None, None]


class TimeMLP(nn.Module):
    """Sinusoids of the time through Linear, SiLU, Linear: ``[M, 256]`` -> ``[M, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, waves: Tensor) -> Tensor:
        """Embed."""
        return self.mlp(waves)


class GatedBlock(nn.Module):
    """``x + gate * MLP(norm(x) (1 + scale) + shift)``, the three from a condition. ``[M, width]`` each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """One residual branch."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class ModulatedOutput(nn.Module):
    """Norm without weights, shifted and scaled by a condition, and Linear: ``[M, width]`` -> ``[M, out_dim]``."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Read out."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
