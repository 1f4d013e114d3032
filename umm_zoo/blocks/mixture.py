"""Mixture of transformers: layers with two sets of weights and one attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding, apply_rotary_pos_emb

from umm_zoo.backbones import flexible
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.flexible import BlockedMask, blocked
from umm_zoo.backbones.precision import ExactBuffers
from umm_zoo.blocks.expert_part import ExpertPart
from umm_zoo.blocks.routing import Routing
from umm_zoo.errors import Count, Positive, UserError

#: Decoders of transformers whose layers these are.
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: What the name of a generation expert's layer ends with in Bagel's release.
_ENDING = "_moe_gen"
#: Cosines and sines, ``[B, L, head size]``.
Rotary = tuple[Tensor, Tensor]


class _Experts(nn.Module):
    """Module that holds layers of one name for each expert."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.endings = ("", _ENDING)[:experts]

    def of_each(self, name: str) -> list[Any]:
        """Its layers of that name, expert by expert."""
        return [getattr(self, name + ending) for ending in self.endings]

    def run(self, name: str, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each expert's layer on its own tokens; also on none, so that every weight has a gradient in every step."""
        return [layer(part) for layer, part in zip(self.of_each(name), parts, strict=True)]


class _Attention(_Experts):
    def __init__(self, config: Qwen2Config, experts: int, qk_norm: bool, bias: bool) -> None:
        super().__init__(experts)
        sizes: Any = config
        size: int = sizes.head_dim
        self.heads, self.groups, self.size = sizes.num_attention_heads, sizes.num_key_value_heads, size
        for ending in self.endings:
            for name, count in (("q_proj", self.heads), ("k_proj", self.groups), ("v_proj", self.groups)):
                setattr(self, name + ending, nn.Linear(config.hidden_size, count * size, bias=bias))
            setattr(self, f"o_proj{ending}", nn.Linear(self.heads * size, config.hidden_size, bias=False))
            for name in ("q_norm", "k_norm"):
                setattr(self, name + ending, Qwen2RMSNorm(size, config.rms_norm_eps) if qk_norm else nn.Identity())

    def forward(
        self, parts: list[Tensor], routing: Routing, rotary: Rotary, mask: Any, cache: DynamicCache | None, layer: int, keep: bool
    ) -> list[Tensor]:
        queries, keys = (
            [norm(own.unflatten(-1, (-1, self.size))) for norm, own in zip(self.of_each(norms), self.run(name, parts), strict=True)]
            for name, norms in (("q_proj", "q_norm"), ("k_proj", "k_norm"))
        )
        values = [own.unflatten(-1, (-1, self.size)) for own in self.run("v_proj", parts)]
        joined = routing.join([torch.cat(own, dim=1) for own in zip(queries, keys, values, strict=True)])  # [B, L, H + 2 G, d]
        query, key, value = joined.transpose(1, 2).split([self.heads, self.groups, self.groups], dim=1)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        if cache is not None and keep:
            key, value = cache.update(key, value, layer)
        elif cache is not None and cache.get_seq_length(layer):
            key, value = (torch.cat([past, own], dim=2) for past, own in zip(_held(cache, layer), (key, value), strict=True))
        return self.run("o_proj", routing.split(_attend(query, key, value, mask).transpose(1, 2).flatten(2)))


class MixtureLayer(_Experts):
    """A pre-norm transformer layer of which every weight exists once for each expert, while all tokens attend to each other."""

    def __init__(self, config: Qwen2Config, experts: int, qk_norm: bool, bias: bool) -> None:
        super().__init__(experts)
        self.self_attn = _Attention(config, experts, qk_norm, bias)
        for ending in self.endings:
            setattr(self, f"mlp{ending}", Qwen2MLP(config))
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(self, name + ending, Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self, parts: list[Tensor], routing: Routing, rotary: Rotary, mask: Any, cache: DynamicCache | None, layer: int, keep: bool
    ) -> list[Tensor]:
        """States ``[T_e, D]`` of each expert's tokens."""
        attended = self.self_attn(self.run("input_layernorm", parts), routing, rotary, mask, cache, layer, keep)
        parts = [part + own for part, own in zip(parts, attended, strict=True)]
        deeper = self.run("mlp", self.run("post_attention_layernorm", parts))
        return [part + own for part, own in zip(parts, deeper, strict=True)]


class MixtureStack(_Experts, ExactBuffers):
    """Layers and final norm of a language model, twice: understanding and generation expert under one attention.

    Bagel: text and vision tokens go through one set of weights, latents of images through the other; queries, keys and values of
    all meet in one softmax. Names of weights are those of its release behind ``language_model.model``, such as
    ``layers.0.self_attn.q_proj_moe_gen.weight``. Each linear layer runs on its expert's tokens alone, none on padding; masks are
    dense, and in blocks for flex attention where there is a GPU. With one expert it is the plain language model under a mask.

    Reference: Deng et al., "Bagel" (arXiv 2505.14683), section 2.1; Liang et al., "Mixture-of-Transformers" (arXiv 2411.04996).

    Shape:
        - tokens: ``[B, L, D]``
        - route: ``[B, L]`` long, number of the expert, below 0 on padding; positions: ``[B, L]`` long
        - mask: ``[B, L, L]`` bool, with a cache of M tokens ``[B, L, M + L]``; True where the row may attend to the column
        - output: ``[B, L, D]`` after the final norm, 0 on padding

    Args:
        layers, width, heads, kv_heads, hidden_dim: sizes of a Qwen2-like decoder; the last is its MLP's.
        experts: 2, or 1.
        qk_norm: RMS-norm of queries and keys, which Bagel adds to Qwen2.5.
        bias: of queries, keys and values; Qwen2's.
        rope_theta: base of the rotary positions; Qwen2.5's.
        eps: of the norms.
        head_dim: None is width / heads.

    Raises:
        UserError: other numbers of experts, or heads that do not fit.
    """

    exact = ("inv_freq", "original_inv_freq")

    def __init__(
        self,
        layers: Count,
        width: Count,
        heads: Count,
        kv_heads: Count,
        hidden_dim: Count,
        experts: Count = 2,
        qk_norm: bool = True,
        bias: bool = True,
        rope_theta: Positive = 1e6,
        eps: Positive = 1e-6,
        head_dim: Count | None = None,
    ) -> None:
        if experts not in (1, 2):
            raise UserError("experts", str(experts), "1 or 2")
        if heads % kv_heads or (head_dim is None and width % heads):
            raise UserError("heads", f"{heads} heads, {kv_heads} of keys, width {width}", "numbers that divide each other")
        super().__init__(experts)
        self.width, self.experts = width, experts
        config: Any = Qwen2Config(
            hidden_size=width,
            intermediate_size=hidden_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=eps,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        )
        config.head_dim = head_dim or width // heads
        self.layers = nn.ModuleList(MixtureLayer(config, experts, qk_norm, bias) for _ in range(layers))
        for ending in self.endings:
            setattr(self, f"norm{ending}", Qwen2RMSNorm(width, eps))
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    @classmethod
    def from_language_model(cls, decoder: Any, experts: int = 2, qk_norm: bool | None = None, wider: int = 1) -> MixtureStack:
        """The layers of a decoder of transformers, a copy of them for each expert.

        Args:
            decoder: of Llama, Mistral, Qwen2 or Qwen3.
            experts: see the class.
            qk_norm: None is what the decoder has. True adds norms to one that has none, as Bagel does to Qwen2.5, which changes
                what it says until it is trained.
            wider: factor on the width of the MLPs, whose new units are random and say nothing at first.

        Raises:
            UserError: another kind of decoder, or one whose positions or windows are not known here.
        """
        config = decoder.config
        stated = getattr(config, "rope_parameters", None) or {}
        kinds = getattr(config, "layer_types", None)
        windows = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
        if config.model_type not in _FAMILIES or stated.get("rope_type", "default") != "default" or windows:
            found = f"a {config.model_type} with rope type '{stated.get('rope_type', 'default')}'" + ", sliding windows" * windows
            raise UserError(
                "language_model", found, f"one of {', '.join(_FAMILIES)} with plain rotary positions and full attention"
            )
        state = decoder.state_dict()
        has_norm = "layers.0.self_attn.q_norm.weight" in state
        made = cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            hidden_dim=wider * config.intermediate_size,
            experts=experts,
            qk_norm=has_norm if qk_norm is None else qk_norm,
            bias="layers.0.self_attn.q_proj.bias" in state,
            rope_theta=stated["rope_theta"],
            eps=config.rms_norm_eps,
            head_dim=getattr(config, "head_dim", None),
        ).to(decoder.dtype)
        own = {key: state[key.replace(_ENDING, "")] for key in made.state_dict() if key.replace(_ENDING, "") in state}
        own = {key: _widened(value, made.get_parameter(key)) for key, value in own.items()}
        without = made.load_state_dict(own, strict=False).missing_keys
        missing = [key for key in without if "q_norm" not in key and "k_norm" not in key]
        if missing:
            raise UserError("language_model", f"a {config.model_type} without '{missing[0]}'", f"one of {', '.join(_FAMILIES)}")
        return made

    def layers_of(self, expert: int) -> dict[str, nn.Module]:
        """The modules of an expert, by their paths."""
        own = {
            f"{path}.{name}" if path else name: child
            for path, owner in self.named_modules()
            if isinstance(owner, _Experts)
            for name, child in owner.named_children()
            if not isinstance(child, _Experts | nn.ModuleList | Qwen2RotaryEmbedding)
        }
        return {path: child for path, child in own.items() if path.split(".")[-1].endswith(_ENDING) == bool(expert)}

    def experts_parts(self) -> list[ExpertPart]:
        """The modules of each expert, to be trained or frozen together; registered nowhere."""
        return [ExpertPart(self.layers_of(expert), self) for expert in range(self.experts)]

    def forward(self, tokens: Tensor, route: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Run the layers on whole sequences."""
        return self.read(tokens, route, positions, mask, None)

    def read(
        self, tokens: Tensor, route: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache | None, keep: bool = True
    ) -> Tensor:
        """Run them behind what a cache holds, and append keys and values to it where they are to be kept.

        Args:
            tokens, route, positions: of the new tokens.
            mask: None lets all attend to all.
            cache: None for none.
            keep: False for the steps of a sampler, whose tokens nobody attends to later.
        """
        routing = Routing.of(route, self.experts, tokens.device)
        rotary = self.rotary_emb(tokens, send(positions, tokens.device))
        allowed: Any = None if mask is None else blocked(send(mask, tokens.device)[:, None])
        parts = routing.split(tokens)
        for number, layer in enumerate(self.layers):
            parts = layer(parts, routing, rotary, allowed, cache, number, keep)
        return routing.join(self.run("norm", parts))


@torch.no_grad()
def _widened(weight: Tensor, beside: Tensor) -> Tensor:
    """A weight in the upper left corner of another: new rows as they are there, new columns zero."""
    if weight.shape == beside.shape:
        return weight
    wider = beside.clone()
    wider[:, weight.shape[1] :] = 0
    wider[: weight.shape[0], : weight.shape[1]] = weight
    return wider


def _held(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    held: Any = cache.layers[layer]
    return held.keys, held.values


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockedMask | None) -> Tensor:
    """Attention ``[B, H, L, d]``."""
    if isinstance(mask, BlockedMask):
        made = flexible.attend(query, key, value, mask.blocks, None)
        if made is not None:
            return made
        mask = mask.whole
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=query.shape[1] > key.shape[1])
