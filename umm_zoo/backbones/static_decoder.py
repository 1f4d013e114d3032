"""Decoder of a Llama's layers for many tokens in turn: keys and values in buffers of their final size, few calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import diagonal, numbers, triangle
from umm_zoo.backbones.image_sampling import Step, put, take

#: Weights up to this size are joined into one: where the call of a product costs as much as the product (our choice).
_SMALL = 2**20
#: Tokens of prompts that are encoded at a time on a CPU, so that what a layer makes need not be fetched from afar (our choice).
_TOKENS = 512


class StaticDecoder:
    """The layers of a Llama: a prompt at once, then one new token of every row at a time; nothing grows, nothing is concatenated.

    Linear layers that an adapter stands beside are called as modules, so that its additions count.

    Args:
        model: the library's decoder.
        mask: ``[U, L]`` bool, False on the padding of left-padded prompts.
        rows: ``[R]``, the number of each row's prompt.
        length: tokens that will come.
    """

    def __init__(self, model: Any, mask: Tensor, rows: Tensor, length: int) -> None:
        self.layers, self.norm, self.rows = [_Layer(layer) for layer in model.layers], _norm(model.norm), rows
        self.prompt_mask, self.start, weight = mask, mask.shape[1], model.norm.weight
        whole = F.pad(mask, (0, length), value=True)  # [U, L + length]
        cos, sin = model.rotary_emb(weight, (whole.cumsum(1) - 1).clamp(min=0))
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        self.prompt_rotation = tuple(part[:, : self.start, None] for part in (cos, sin))  # [U, L, 1, head dim]
        self.rotation = tuple(part[rows, self.start :, None] for part in (cos, sin))
        first = self.layers[0]
        repeated = whole[rows].repeat_interleave(first.groups, 0)[:, None]  # [R * groups, 1, L + length]
        self.mask = weight.new_zeros(repeated.shape).masked_fill(~repeated, -torch.inf)
        self.columns = numbers(mask.device, whole.shape[1])
        shape = (len(rows), first.groups, len(self.columns), first.width)
        # zeros: a CUDA graph looks at all places, and nothing times no number is no number
        self.keys, self.values = ([weight.new_zeros(shape) for _ in self.layers] for _ in range(2))

    def encode(self, embeddings: Tensor) -> Tensor:
        """Prompts ``[U, L, D]`` to the state ``[R, D]`` of their last tokens after the final norm."""
        size = max(1, _TOKENS // self.start) if embeddings.device.type == "cpu" else len(embeddings)
        states = [self._encode(some, number * size) for number, some in enumerate(embeddings.split(size))]
        return self.norm(torch.cat(states))[self.rows]

    def _encode(self, states: Tensor, first: int) -> Tensor:
        """The last states of the prompts from number ``first`` on, without the final norm."""
        count, length, groups, heads = len(states), self.start, self.layers[0].groups, self.layers[0].heads
        mine = (self.rows >= first) & (self.rows < first + count)
        prompts = self.rows[mine] - first
        seen = triangle(states.device, length) & self.prompt_mask[first : first + count, None]
        seen = seen | diagonal(seen.device, length)  # padding that saw nothing would be no number
        mask = states.new_zeros(seen.shape).masked_fill(~seen, -torch.inf).repeat_interleave(groups, 0)
        mask = mask[:, None].repeat(1, heads // groups, 1, 1)  # [U * groups, heads of a group, L, L]

        def attend(layer: _Layer, *made: Tensor) -> Tensor:
            query, keys, values = (part.transpose(1, 2) for part in made)  # [U, heads, L, head dim]
            for buffer, new in ((self.keys, keys), (self.values, values)):
                buffer[layer.number][mine, :, :length] = new[prompts].to(buffer[0].dtype)
            last = -1 if layer is self.layers[-1] else 0  # of the last layer one state is needed
            query, keys, values = (part.reshape(count * groups, -1, layer.width) for part in (query[:, :, last:], keys, values))
            mixed = _mixed(query, keys, values, mask[:, :, last:].flatten(1, 2), layer.scale)
            return mixed.view(count, heads, -1, layer.width).transpose(1, 2)

        rotation = tuple(part[first : first + count] for part in self.prompt_rotation)
        for layer in self.layers:
            states = layer(states, rotation, attend)
        return states[:, -1]

    def __call__(self, states: Tensor, step: Step) -> Tensor:
        """States ``[R, D]`` of the tokens of that step, counted from 0, to those after the final norm."""
        place: Step = self.start + step
        end = place + 1 if isinstance(place, int) else len(self.columns)
        mask = self.mask[..., :end]
        if isinstance(place, Tensor):
            mask = mask.masked_fill(self.columns > place, -torch.inf)

        def attend(layer: _Layer, query: Tensor, *made: Tensor) -> Tensor:
            buffers = self.keys[layer.number], self.values[layer.number]
            for buffer, new in zip(buffers, made, strict=True):
                put(buffer, new, place, dim=2)
            keys, values = (buffer.flatten(0, 1).narrow(1, 0, end) for buffer in buffers)
            grouped = query.reshape(len(keys), -1, layer.width)  # the heads that share keys next to each other
            return _mixed(grouped, keys, values, mask, layer.scale).view(query.shape)

        rotation = tuple(take(part, step) for part in self.rotation)
        for layer in self.layers:
            states = layer(states, rotation, attend)
        return self.norm(states)


class _Layer:
    """One layer: what stands around the attention of its heads, with as few calls as its products allow."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.number, self.width, self.scale = attention.layer_idx, attention.head_dim, attention.scaling
        self.heads, self.groups = (part.out_features // self.width for part in (attention.q_proj, attention.k_proj))
        self.before, self.between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.project, self.mix = _product(attention.q_proj, attention.k_proj, attention.v_proj), _product(attention.o_proj)
        self.widen, self.narrow, self.activate = _product(mlp.gate_proj, mlp.up_proj), _product(mlp.down_proj), mlp.act_fn.forward

    def __call__(self, states: Tensor, rotation: tuple[Tensor, ...], attend: Callable[..., Tensor]) -> Tensor:
        """States ``[…, D]`` to states of those places, the last ones, for which ``attend`` gives the heads' outputs.

        It takes this, and queries, keys and values ``[…, heads, head dim]``.
        """
        cos, sin = rotation
        heads = self.project(self.before(states)).unflatten(-1, (-1, self.width))
        turned, values = heads.split([self.heads + self.groups, self.groups], -2)
        turned = torch.addcmul(turned * cos, turned.roll(self.width // 2, -1), sin)
        query, keys = turned.split([self.heads, self.groups], -2)
        mixed = self.mix(attend(self, query, keys, values).flatten(-2))
        states = (states if mixed.shape == states.shape else states[:, -mixed.shape[1] :]) + mixed
        gate, up = self.widen(self.between(states)).chunk(2, -1)
        return states + self.narrow(self.activate(gate).mul_(up))


def _mixed(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Values that queries attend to, ``[G, Q, head dim]`` of ``[G, T, head dim]``; ``mask`` ``[G, Q or 1, T]`` is added.

    Of few tokens these three calls are faster on a CPU than the fused one.
    """
    scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)


def _product(*linears: nn.Module) -> Callable[[Tensor], Tensor]:
    """The outputs of linear layers side by side; without an adapter, and if small, as one product."""
    plain = [one for one in linears if type(one) is nn.Linear and not (one._forward_hooks or one._forward_pre_hooks)]
    if len(plain) < len(linears) or (len(plain) > 1 and sum(linear.weight.numel() for linear in plain) > _SMALL):
        return linears[0] if len(linears) == 1 else lambda states: torch.cat([linear(states) for linear in linears], -1)
    weight = plain[0].weight if len(plain) == 1 else torch.cat([linear.weight for linear in plain])
    bias = None if plain[0].bias is None else torch.cat([linear.bias for linear in plain])
    return partial(F.linear, weight=weight, bias=bias)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The library's norm, in one call."""
    weight, epsilon = norm.weight, norm.variance_epsilon
    return lambda states: F.rms_norm(states, weight.shape, weight.to(states.dtype), epsilon)
