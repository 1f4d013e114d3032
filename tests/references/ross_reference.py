"""ROSS's formulas derived a second time, in loops and plain tensor algebra, sharing nothing with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alpha_bar(i: int) -> float:
    """The cosine schedule's product in closed form; only its last factor is clipped."""

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    if i < 0:
        return 1.0
    return f((i + 1) / 1000) / f(0) if i < 999 else 1e-3 * f(999 / 1000) / f(0)


def time_vector(t: float, size: int = 256) -> Tensor:
    half = size // 2
    values = [math.cos(t * 10000 ** (-k / half)) for k in range(half)] + [math.sin(t * 10000 ** (-k / half)) for k in range(half)]
    return torch.tensor(values + [0.0] * (size % 2), dtype=torch.float64)


def position_vector(row: int, column: int, width: int) -> Tensor:
    quarter = width // 4
    omega = [10000 ** (-j / quarter) for j in range(quarter)]
    parts = [
        [math.sin(column * w) for w in omega],
        [math.cos(column * w) for w in omega],
        [math.sin(row * w) for w in omega],
        [math.cos(row * w) for w in omega],
    ]
    return torch.tensor([x for part in parts for x in part], dtype=torch.float64)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return torch.einsum("oi,...i->...o", weight.reshape(weight.shape[0], -1), x) + w[f"{name}.bias"]


def attention(w: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    n, width = x.shape
    size = width // heads
    qkv = linear(w, f"{name}.qkv", x)  # [N, 3W]
    out = torch.zeros_like(x)
    for head in range(heads):
        q, k, v = (qkv[:, part * width + head * size : part * width + (head + 1) * size] for part in range(3))
        for i in range(n):
            scores = (k @ q[i]) * size**-0.5
            out[i, head * size : (head + 1) * size] = torch.softmax(scores, 0) @ v
    return linear(w, f"{name}.proj", out)


def denoise(w: dict[str, Tensor], noisy: Tensor, t: int, condition: Tensor, heads: int = 16) -> Tensor:
    """The released denoiser on one sample, from weights under their released names (below ``net.``).

    noisy ``[C, g, g]``, condition ``[N, D]`` already normalised; returns ``[C, g, g]``.
    """
    channels, grid, _ = noisy.shape
    tokens = torch.stack([noisy[:, r, q] for r in range(grid) for q in range(grid)])  # [N, C]
    x = linear(w, "x_embedder.proj", tokens) + w["pos_embed"][0]
    moment = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", time_vector(t).to(x))))
    c = silu(moment + linear(w, "z_embedder.1", silu(condition)))  # [N, W]
    width = x.shape[1]
    depth = sum(name.endswith("attn.qkv.weight") for name in w)
    for block in range(depth):
        m = linear(w, f"blocks.{block}.adaLN_modulation.1", c)
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, k * width : (k + 1) * width] for k in range(6))
        x = x + gate1 * attention(w, f"blocks.{block}.attn", layer_norm(x, 1e-6) * (1 + scale1) + shift1, heads)
        y = layer_norm(x, 1e-6) * (1 + scale2) + shift2
        x = x + gate2 * linear(w, f"blocks.{block}.mlp.fc2", gelu_tanh(linear(w, f"blocks.{block}.mlp.fc1", y)))
    m = linear(w, "final_layer.adaLN_modulation.1", c)
    y = linear(w, "final_layer.linear", layer_norm(x, 1e-6) * (1 + m[:, width:]) + m[:, :width])  # [N, C]
    return torch.stack([y[r * grid + q] for r in range(grid) for q in range(grid)], dim=1).reshape(channels, grid, grid)


def denoiser_weights(
    condition_dim: int, grid: int, channels: int, width: int, depth: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random weights under the released names (below ``net.``), none of them zero."""
    shapes: dict[str, tuple[int, ...]] = {"x_embedder.proj.weight": (width, channels, 1, 1)}
    sizes = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "z_embedder.1": (width, condition_dim)}
    for i in range(depth):
        sizes[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        sizes[f"blocks.{i}.attn.proj"] = (width, width)
        sizes[f"blocks.{i}.mlp.fc1"] = (4 * width, width)
        sizes[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
        sizes[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    sizes["final_layer.adaLN_modulation.1"] = (2 * width, width)
    sizes["final_layer.linear"] = (channels, width)
    shapes |= {f"{name}.weight": shape for name, shape in sizes.items()}
    biases = {"x_embedder.proj.bias": (width,)} | {f"{name}.bias": (shape[0],) for name, shape in sizes.items()}

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1)

    weights = {name: draw(shape) for name, shape in (shapes | biases).items()}
    return weights | {"pos_embed": torch.randn(1, grid * grid, width, generator=generator)}
