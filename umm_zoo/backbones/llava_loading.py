"""Configurations and weights of LLaVA's parts, checked while they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils.constants import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from umm_zoo.backbones.families import use
from umm_zoo.backbones.language_models import assert_decoder, attention_by_part, attention_of, grow_vocabulary, llava_class, towers
from umm_zoo.backbones.loading import (
    assert_known,
    assert_stated,
    checked_config,
    image_processor_of,
    load_checkpoint,
    mark_quantized,
    on_meta_device,
    one_line,
    torch_dtype,
)
from umm_zoo.backbones.stored_config import assert_model_type
from umm_zoo.backbones.tokenizer import image_token, is_here, load_tokenizer
from umm_zoo.backbones.weight_files import assert_readable, stored_file
from umm_zoo.errors import UserError

PartName = Literal["vision_config", "text_config"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]

#: Vision towers by the library's model type: has a class token in front, mean and std of its pixels.
TOWERS: dict[str, tuple[bool, list[float], list[float]]] = {
    "clip_vision_model": (True, list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)),
    "siglip_vision_model": (False, list(IMAGENET_STANDARD_MEAN), list(IMAGENET_STANDARD_STD)),
}

#: Tensors of contrastive models that belong to their text half.
TEXT_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


def llava_config(fields: Mapping[str, Any], tokenizer: str | None) -> LlavaConfig:
    """The library's configuration from plain fields, refused where the library would ignore or misread one.

    Where nothing says which token stands for an image, it is ``<image>``, which a tokenizer without one is given; the vocabulary
    grows by a row if it has none to spare. The library's own number, 32000, is a word of most tokenizers.

    Raises:
        ValueError: a part is missing or of an unknown type, a field is unknown, or the features would not be a grid.
    """
    known = LlavaConfig().to_dict()
    assert_known("config", fields, [*known, "image_token_id"])
    values = dict(fields)
    for name in ("vision_config", "text_config"):
        values[name] = part_config(f"config.{name}", values.get(name), tokenizer is None and name == "text_config")
    if "image_token_id" not in values and "image_token_index" not in values:
        text = values["text_config"]
        values["image_token_index"] = text.vocab_size
        if is_here(tokenizer) or not on_meta_device():
            values["image_token_index"] = image_token(load_tokenizer(tokenizer))
            text.vocab_size = max(text.vocab_size, values["image_token_index"] + 1)
    kind = values["vision_config"].model_type
    assert_tower("config.vision_config.model_type", kind)
    assert_decoder("config.text_config.model_type", values["text_config"])
    strategy = "default" if TOWERS[kind][0] else "full"
    found = values.setdefault("vision_feature_select_strategy", strategy)
    if found != strategy:
        expected = f"'{strategy}' for a {kind} (one feature per patch)"
        raise ValueError(f"config.vision_feature_select_strategy: found '{found}', expected {expected}")
    config = LlavaConfig(**values)
    vision: Any = config.vision_config
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    return config


def part_config(where: str, part: Any, shipped_tokenizer: bool) -> PreTrainedConfig:
    """The library's configuration of a part from plain fields with ``model_type``; the shipped tokenizer's sizes unless stated.

    Raises:
        ValueError: no map, an unknown type or an unknown field.
    """
    if isinstance(part, PreTrainedConfig):
        return part
    if not isinstance(part, Mapping) or "model_type" not in part:
        raise ValueError(f"{where}: found {part!s:.60}, expected a map with 'model_type'")
    fields = dict(part)
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{where}.model_type: found '{kind}', expected a transformers model type such as llama")
    if shipped_tokenizer:
        tokens = load_tokenizer()
        fields = {
            "vocab_size": len(tokens),
            "pad_token_id": tokens.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokens.eos_token_id,
            **fields,
        }
    # rope_theta is what the library's older files say, and it still reads it
    assert_known(where, fields, [*AutoConfig.for_model(kind).to_dict(), "rope_theta", "rope_scaling", "attention_dropout"])
    return AutoConfig.for_model(kind, **fields)


def pixel_statistics(kind: str, source: str | None = None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels in [0, 1]: what a checkpoint's processor says, else what that kind was trained with."""
    said = {} if source is None else image_processor_of(source)
    return said.get("image_mean") or TOWERS[kind][1], said.get("image_std") or TOWERS[kind][2]


def read_config(source: str) -> PreTrainedConfig:
    """The configuration of a name or folder.

    Raises:
        FileNotFoundError: nothing there.
    """
    assert_readable(source)
    with one_line(source, "a name or folder with a model configuration"):
        stored = PreTrainedConfig.get_config_dict(source)[0]
    assert_model_type(source, stored, AutoModel)
    with one_line(source, "a name or folder with a model configuration"):
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(source, trust_remote_code=False))


def new_llava(config: LlavaConfig, dtype: Dtype, attention: str) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights; ``auto`` is float32."""
    precision = torch_dtype("float32" if dtype == "auto" else dtype)
    chosen = attention_by_part(attention, config.text_config)
    return llava_class(config.text_config)._from_config(config, dtype=precision, attn_implementation=chosen)


def load_llava(
    source: str,
    dtype: Dtype,
    attention: str,
    stated: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> LlavaForConditionalGeneration:
    """A whole LLaVA; ``stated`` fills in what the stored configuration leaves open.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: tensors are missing, unexpected or of another shape.
    """
    found: Any = checked_config(LlavaForConditionalGeneration, source, stated) or read_config(source)
    kind, chosen = llava_class(found.text_config), attention_by_part(attention, found.text_config)
    loaded = load_checkpoint(kind, source, dtype, (), stated, quantization, attn_implementation=chosen)
    return cast(LlavaForConditionalGeneration, loaded.train())


def load_tower(source: str, dtype: Dtype, attention: str, stated: Mapping[str, Any] | None = None) -> Any:
    """A vision tower from its own checkpoint, from that of a contrastive model, or from that of a LLaVA.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another kind of model; tensors are missing, unexpected or of another shape.
    """
    found, vision = read_config(source), read_part(source, "vision_config")
    if isinstance(found, LlavaConfig):
        return load_llava(source, dtype, attention, {"vision_config": stated or {}}).model.vision_tower
    with torch.device("meta"):
        kind = type(AutoModel.from_config(vision))
    inside = stated if vision is found else {"vision_config": stated or {}}
    return load_checkpoint(kind, source, dtype, TEXT_HALF, inside, attn_implementation=towers(attention)).train()


def read_part(source: str, name: PartName) -> Any:
    """The configuration of a vision tower or language model: of its own checkpoint, a contrastive model's or a LLaVA's.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another kind of model.
    """
    found: Any = read_config(source)
    if isinstance(found, LlavaConfig):
        return getattr(found, name)
    if name == "text_config":
        assert_decoder(f"language_model: {source}", found)
        return found
    vision = found.vision_config if found.model_type in ("clip", "siglip") else found
    assert_tower(f"vision_tower: {source}", vision.model_type)
    return vision


def assert_tower(where: str, kind: str) -> None:
    """Refuse a model type that is none of ``TOWERS``.

    Raises:
        ValueError: it is another one.
    """
    if kind not in TOWERS:
        raise ValueError(f"{where}: found '{kind}', expected {sorted(TOWERS)}{use(kind)}")


def load_decoder(
    source: str,
    dtype: Dtype,
    attention: str,
    stated: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, int | None]:
    """A decoder, its output layer and, from the checkpoint of a LLaVA, the id of its image token.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: tensors are missing, unexpected or of another shape.
    """
    found = read_config(source)
    if isinstance(found, LlavaConfig):
        whole = load_llava(source, dtype, attention, {"text_config": stated or {}}, quantization)
        return whole.model.language_model, whole.lm_head, int(whole.config.image_token_id)
    read_part(source, "text_config")
    chosen = attention_of(attention, found)
    kind = AutoModelForCausalLM
    language = load_checkpoint(kind, source, dtype, (), stated, quantization, attn_implementation=chosen).train()
    return language.base_model, language.get_output_embeddings(), None


def assemble(
    vision_tower: str | Mapping[str, Any],
    language_model: str | Mapping[str, Any],
    fields: Mapping[str, Any],
    dtype: Dtype,
    attention: str,
    tokenizer: str | None,
    quantization: Mapping[str, Any] | None = None,
) -> LlavaForConditionalGeneration:
    """A LLaVA of two given parts and a new projector, whose layers start as torch makes them, as in the official code.

    The projector is in float32 whatever the parts are: it is to be trained, and small updates vanish in bfloat16.

    Args:
        vision_tower, language_model: a source or a configuration.
        fields: of the library's ``LlavaConfig``; what it says of a part is compared with what is loaded, and used in its place on
            the meta device.
        dtype, attention, tokenizer, quantization: see ``LlavaBackbone.from_parts`` and ``llava_config``.
    """
    tower, decoder, head, values = None, None, None, dict(fields)
    parts: dict[PartName, Any] = {"vision_config": vision_tower, "text_config": language_model}
    for name, part in parts.items():
        if not isinstance(part, str):
            if name in values:
                whose = "vision_tower" if name == "vision_config" else "language_model"
                raise ValueError(f"config.{name}: found beside a {whose} that is a configuration itself, expected one of the two")
            values[name] = part
        elif on_meta_device() and (name not in values or Path(part, "config.json").is_file()):
            found, raw = read_part(part, name), stored_file(part) or {}
            own = raw.get(name, raw)  # what the file leaves open, the experiment may say
            assert_stated(
                part, {key: value for key, value in values.get(name, {}).items() if key in own}, found, where=f"config.{name}"
            )
            values.setdefault(name, found)
    if quantization is not None and not isinstance(language_model, str):
        raise UserError("quantization", "an argument beside a language_model with random weights", "one that is loaded")
    if on_meta_device():
        whole = new_llava(llava_config(values, tokenizer), dtype, attention)
        whole.model.multi_modal_projector.float()
        if isinstance(language_model, str):
            language: Any = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=whole.lm_head.weight.dtype)
            mark_quantized(language, language_model, quantization)
            whole.model.language_model, whole.lm_head = language.base_model, language.get_output_embeddings()
        return whole
    if isinstance(vision_tower, str):
        tower = load_tower(vision_tower, dtype, attention, values.get("vision_config"))
        assert_stated(vision_tower, values.get("vision_config"), tower.config, where="config.vision_config")
        values["vision_config"] = tower.config
    if isinstance(language_model, str):
        decoder, head, image_token = load_decoder(language_model, dtype, attention, values.get("text_config"), quantization)
        assert_stated(language_model, values.get("text_config"), decoder.config, where="config.text_config")
        values["text_config"] = decoder.config
        if image_token is not None:
            values.setdefault("image_token_index", image_token)
    config = llava_config(values, tokenizer)
    if decoder is not None:
        grow_vocabulary(decoder, head, cast(Any, config.text_config).vocab_size)
    precision = torch_dtype("float32" if dtype == "auto" else dtype)
    tower = tower or AutoModel.from_config(config.vision_config, dtype=precision, attn_implementation=towers(attention))
    if decoder is None:
        chosen = attention_of(attention, config.text_config)
        language = AutoModelForCausalLM.from_config(config.text_config, dtype=precision, attn_implementation=chosen)
        decoder, head = language.base_model, language.get_output_embeddings()
    with torch.device("meta"):  # the frame only: its parts are replaced
        by_part = attention_by_part(attention, config.text_config)
        model = llava_class(config.text_config)._from_config(config, attn_implementation=by_part)
    model.model.vision_tower = tower
    model.model.language_model, model.lm_head = decoder, head
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    return model
