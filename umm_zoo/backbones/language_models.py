"""Decoder-only models of transformers as the language model of a LLaVA: which may be, and what each does in its own way."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlavaForConditionalGeneration

from umm_zoo.backbones.decoder_attention import SDPA_OR_FLEX
from umm_zoo.backbones.families import use
from umm_zoo.backbones.flexible import FLEX
from umm_zoo.errors import UserError

#: What a decoder must take, beside rows of tokens.
_TAKES = {"inputs_embeds", "position_ids", "attention_mask", "past_key_values"}
#: Those that have learned every position, and have no more of them.
_LEARNED_POSITIONS = ("gpt2", "opt", "biogpt", "xglm")


def assert_decoder(where: str, config: Any) -> None:
    """Refuse a language model that cannot stand in a LLaVA, before its weights are read.

    Raises:
        ValueError: it is no causal language model, or has no decoder that takes embeddings in place of tokens, and positions.
    """
    expected = "a decoder that takes inputs_embeds and position_ids, such as llama, qwen3, gemma2, phi3, gpt2 or opt"
    error = ValueError(f"{where}: found a model of type '{config.model_type}', expected {expected}{use(config.model_type)}")
    if "vision_config" in config.sub_configs:  # a whole one, some of which the library also calls causal language models
        raise error
    if type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        raise error  # BERT and the like, which look both ways
    try:
        with torch.device("meta"):
            decoder = AutoModelForCausalLM.from_config(config).base_model
    except Exception as refused:  # the library has many ways to say that it has no such class, or that sizes do not fit
        if type(config) in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"{where}: {str(refused).splitlines()[0]}") from refused
        raise error from refused
    if not set(inspect.signature(decoder.forward).parameters) >= _TAKES:
        raise error
    if (width := decoder.get_input_embeddings().embedding_dim) != config.hidden_size:
        raise ValueError(f"{where}: found embeddings of {width} and states of {config.hidden_size}, expected one width")


def assert_positions(config: Any, max_length: int) -> None:
    """Refuse rows that are longer than a language model has positions, where it learned each of them.

    Raises:
        UserError: they may be.
    """
    if config.model_type in _LEARNED_POSITIONS and max_length > (most := config.max_position_embeddings):
        raise UserError("max_length", f"{max_length}", f"at most the {most} positions that this {config.model_type} has learned")


def attention_of(attention: str, config: Any) -> str:
    """``eager`` in the place of ``sdpa`` where the library's decoder has none (Gemma 2 bounds its scores).

    Raises:
        UserError: flex attention for such a one: it stands beside ``sdpa``.
    """
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not getattr(kind, "_supports_sdpa", True):
        if attention == FLEX:
            raise UserError("attention", f"'{FLEX}' for a {config.model_type}", "'eager', the library has no other for it here")
        return "eager" if attention == "sdpa" else attention
    return SDPA_OR_FLEX if attention == FLEX else attention  # not the library's own: many of its models have none


def towers(attention: str) -> str:
    """Attention of a vision tower beside a language model's; flex attention would have nothing to leave out there."""
    return "sdpa" if attention == FLEX else attention


def attention_by_part(attention: str, text: Any = None, tower: str | None = None) -> str | dict[str, str]:
    """Attention of a whole vision-language model: where its parts differ, by part, as the library takes it.

    Args:
        attention: of the whole.
        text: configuration of the language model, which may have less; None has all.
        tower: the vision tower's; None is the whole's.
    """
    own, tower = attention_of(attention, text), tower or towers(attention)
    return attention if own == tower == attention else {"": towers(attention), "vision_config": tower, "text_config": own}


def llava_class(config: Any) -> type[LlavaForConditionalGeneration]:
    """The library's class of a LLaVA, told where such a language model has its embeddings; it knows ``embed_tokens`` alone."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return LlavaForConditionalGeneration
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config).base_model
    name = next(name for name, module in decoder.named_modules() if module is decoder.get_input_embeddings())
    if name == "embed_tokens":
        return LlavaForConditionalGeneration
    tied = {"lm_head.weight": f"model.language_model.{name}.weight"}
    own = {"_tied_weights_keys": tied, "__module__": LlavaForConditionalGeneration.__module__}
    return type(LlavaForConditionalGeneration.__name__, (LlavaForConditionalGeneration,), own)


@torch.no_grad()
def grow_vocabulary(decoder: Any, lm_head: Any, size: int) -> None:
    """Give a decoder and its output layer, tied or not, ``size`` rows if they have fewer: new ones are the mean of the others."""
    embeddings = decoder.get_input_embeddings()
    tied = lm_head.weight is embeddings.weight
    for layer in (embeddings, lm_head) if len(embeddings.weight) < size else ():
        for name, rows in list(layer.named_parameters(recurse=False)):
            more = rows.float().mean(dim=0).to(rows.dtype).expand(size - len(rows), *rows.shape[1:])
            setattr(layer, name, nn.Parameter(torch.cat([rows, more]), rows.requires_grad))
        setattr(layer, "num_embeddings" if layer is embeddings else "out_features", size)
    if tied:
        lm_head.weight = embeddings.weight


def shape_logits(lm_head: Any, config: Any) -> None:
    """Let an output layer give the logits of the whole language model: scaled (Granite, Cohere), bounded (Gemma 2).

    The library's own LLaVA leaves that out, whatever its language model is.
    """
    bound, divisor = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None) or 1.0
    scale = (getattr(config, "logit_scale", None) or 1.0) / divisor
    if bound is None and scale == 1.0:
        return

    def shaped(layer: Any, inputs: Any, logits: Tensor) -> Tensor:
        logits = logits * scale
        return logits if bound is None else torch.tanh(logits / bound) * bound

    lm_head.register_forward_hook(shaped)
