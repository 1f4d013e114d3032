"""Connectors of MetaQuery's and OpenUni's releases, from their formulas, token by token in float64, under their own names."""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def _drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Random weights; gains are spread about one, so that a gain at the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        gain = ("norm" in name or name == "4.weight") and not name.endswith("bias")
        drawn = torch.randn(shape, generator=generator) * (0.4 if len(shape) == 1 or gain else shape[-1] ** -0.5)
        state[name] = drawn + 1 if gain else drawn
    return state


def metaquery_weights(
    in_dim: int, out_dim: int, depth: int, heads: int, kv_heads: int | None = None, hidden_dim: int | None = None, seed: int = 0
) -> State:
    """Tensors of the release's ``connector``, a sequence of encoder, Linear, GELU, Linear, norm."""
    size, kv, hidden = in_dim // heads, kv_heads or heads, hidden_dim or 4 * in_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(depth):
        for name, shape in {
            "self_attn.q_proj.weight": (heads * size, in_dim),
            "self_attn.q_proj.bias": (heads * size,),
            "self_attn.k_proj.weight": (kv * size, in_dim),
            "self_attn.k_proj.bias": (kv * size,),
            "self_attn.v_proj.weight": (kv * size, in_dim),
            "self_attn.v_proj.bias": (kv * size,),
            "self_attn.o_proj.weight": (in_dim, heads * size),
            "self_attn.q_norm.gamma": (heads, 1, size),
            "self_attn.k_norm.gamma": (kv, 1, size),
            "mlp.gate_proj.weight": (hidden, in_dim),
            "mlp.up_proj.weight": (hidden, in_dim),
            "mlp.down_proj.weight": (in_dim, hidden),
            "input_layernorm.weight": (in_dim,),
            "post_attention_layernorm.weight": (in_dim,),
        }.items():
            shapes[f"0.layers.{layer}.{name}"] = shape
    shapes |= {"1.weight": (out_dim, in_dim), "1.bias": (out_dim,), "3.weight": (out_dim, out_dim), "3.bias": (out_dim,)}
    return _drawn(shapes | {"4.weight": (out_dim,)}, seed)


def metaquery(weights: State, states: Tensor) -> Tensor:
    """``[N, D]`` -> ``[N, E]``. Rotations are products of complex numbers; a head at a time, a query at a time."""
    w, x = {name: tensor.double() for name, tensor in weights.items()}, states.double()
    depth = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("0.layers."))
    for layer in range(depth):
        own = {name.removeprefix(f"0.layers.{layer}."): t for name, t in w.items() if name.startswith(f"0.layers.{layer}.")}
        heads, _, size = own["self_attn.q_norm.gamma"].shape
        share = heads // len(own["self_attn.k_norm.gamma"])
        inner = _rms(x, 1e-6) * own["input_layernorm.weight"]
        q, k, v = (_linear(own, f"self_attn.{name}_proj", inner).unflatten(-1, (-1, size)) for name in "qkv")  # [N, heads, size]
        attended = torch.zeros(len(x), heads, size, dtype=torch.float64)
        for head in range(heads):
            queries = _unit(_turned(q[:, head])) * size**0.5 * own["self_attn.q_norm.gamma"][head, 0]
            keys = _unit(_turned(k[:, head // share])) * size**0.5 * own["self_attn.k_norm.gamma"][head // share, 0]
            for place in range(len(x)):
                scores = keys @ queries[place] / math.sqrt(size)
                attended[place, head] = (scores.exp() / scores.exp().sum()) @ v[:, head // share]
        x = x + attended.flatten(1) @ own["self_attn.o_proj.weight"].T
        inner = _rms(x, 1e-6) * own["post_attention_layernorm.weight"]
        gate, up = inner @ own["mlp.gate_proj.weight"].T, inner @ own["mlp.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ own["mlp.down_proj.weight"].T
    return _rms(_linear(w, "3", _tanh_gelu(_linear(w, "1", x))), 1e-5) * w["4.weight"]


def openuni_weights(in_dim: int, out_dim: int, depth: int, hidden_dim: int, proj_type: str, width: int = 0, seed: int = 0) -> State:
    """Tensors of the release's ``connector`` and ``projector``."""
    inner = {"enc_proj": in_dim, "proj_enc": out_dim, "proj_enc_proj": width}[proj_type]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(depth):
        names = {f"self_attn.{name}": (inner, inner) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
        names |= {"mlp.fc1": (hidden_dim, inner), "mlp.fc2": (inner, hidden_dim)}
        for name, shape in names.items():
            shapes |= {f"connector.layers.{layer}.{name}.weight": shape, f"connector.layers.{layer}.{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"connector.layers.{layer}.{name}.weight": (inner,), f"connector.layers.{layer}.{name}.bias": (inner,)}
    linears = {"projector": (out_dim, in_dim)}
    if proj_type == "proj_enc_proj":
        linears = {"projector.0": (width, in_dim), "projector.1": (out_dim, width)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return _drawn(shapes, seed)


def openuni(weights: State, states: Tensor, heads: int, proj_type: str) -> Tensor:
    """``[N, D]`` -> ``[N, E]``, a head at a time, a query at a time."""
    w, x = {name: tensor.double() for name, tensor in weights.items()}, states.double()
    if proj_type != "enc_proj":
        x = _linear(w, "projector" if proj_type == "proj_enc" else "projector.0", x)
    depth = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("connector.layers."))
    for layer in range(depth):
        at = f"connector.layers.{layer}"
        inner = _layer_norm(x) * w[f"{at}.layer_norm1.weight"] + w[f"{at}.layer_norm1.bias"]
        q, k, v = (_linear(w, f"{at}.self_attn.{name}_proj", inner) for name in "qkv")
        size, attended = x.shape[1] // heads, torch.zeros_like(x)
        for channels in (slice(head * size, (head + 1) * size) for head in range(heads)):
            for place in range(len(x)):
                scores = k[:, channels] @ q[place, channels] / math.sqrt(size)
                attended[place, channels] = (scores.exp() / scores.exp().sum()) @ v[:, channels]
        x = x + _linear(w, f"{at}.self_attn.out_proj", attended)
        inner = _layer_norm(x) * w[f"{at}.layer_norm2.weight"] + w[f"{at}.layer_norm2.bias"]
        x = x + _linear(w, f"{at}.mlp.fc2", _tanh_gelu(_linear(w, f"{at}.mlp.fc1", inner)))
    if proj_type == "proj_enc":
        return x
    return _linear(w, "projector" if proj_type == "enc_proj" else "projector.1", x)


def _linear(weights: State, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def _unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def _turned(x: Tensor) -> Tensor:
    """``[N, size]``: channel i and i + size / 2 as one complex number, times exp(i place 10000^(-2 i / size))."""
    half = x.shape[1] // 2
    speeds = torch.tensor([10000.0 ** (-2 * i / x.shape[1]) for i in range(half)], dtype=torch.float64)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * speeds
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
