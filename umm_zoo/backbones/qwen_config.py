"""Qwen2.5-VL's configuration: from the plain mapping of an experiment file, and against the tokenizer and a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from umm_zoo.backbones.encoding import special_id
from umm_zoo.backbones.loading import assert_known
from umm_zoo.backbones.qwen_images import PatchLayout
from umm_zoo.backbones.templates import QwenChat
from umm_zoo.backbones.tokenizer import assert_vocabulary

#: Keys of published files that the library reads, or leaves unread, though its classes do not declare them.
UNDECLARED = {"rope_scaling", "rope_theta", "in_chans", "spatial_patch_size", "tie_word_embeddings"}
_SECTIONS = {"text_config": Qwen2_5_VLTextConfig, "vision_config": Qwen2_5_VLVisionConfig}
#: Token ids of the configuration, and the tokens.
_TOKENS = {
    "image_token_id": QwenChat.image,
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def read_config(config: Mapping[str, Any]) -> Qwen2_5_VLConfig:
    """The library's configuration object.

    Args:
        config: ``text_config`` and ``vision_config``, mappings with the library's names; ``tie_word_embeddings`` and token ids.

    Raises:
        ValueError: a section is missing, a key is unknown (the library would ignore it), or sizes do not fit each other.
    """
    assert_known("config", config, {field.name for field in fields(Qwen2_5_VLConfig)})
    for name, section in _SECTIONS.items():
        if name not in config:  # the library would silently take the sizes of the 72B model
            raise ValueError(f"config: found {sorted(config)}, expected '{name}' too")
        assert_known(f"config.{name}", config[name], {field.name for field in fields(section)} | UNDECLARED)
    plain: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for name in ("bos_token_id", "eos_token_id"):  # the defaults are ids of the published vocabulary
        default = getattr(Qwen2_5_VLTextConfig(), name)
        if default is not None and default >= plain["text_config"].get("vocab_size", default + 1):
            plain["text_config"].setdefault(name, None)
    built = Qwen2_5_VLConfig(**plain)
    _assert_sizes(built.text_config, built.vision_config)
    return built


def _assert_sizes(text: Any, vision: Any) -> None:
    head, token = text.hidden_size / text.num_attention_heads, vision.patch_size * vision.spatial_merge_size
    sections = list(text.rope_parameters.get("mrope_section", [16, 24, 24]))
    half = f"a sum of {head / 2:g}, half of the head dimension {text.hidden_size} / {text.num_attention_heads}"
    multiple = f"a multiple of 4 x num_heads ({vision.num_heads}), as rotary positions of two axes need"
    width = f"text_config.hidden_size, {text.hidden_size}"
    for name, found, fits, expected in (
        ("text_config.rope_parameters.mrope_section", sections, sum(sections) == head / 2, half),
        ("vision_config.out_hidden_size", vision.out_hidden_size, vision.out_hidden_size == text.hidden_size, width),
        ("vision_config.hidden_size", vision.hidden_size, vision.hidden_size % (4 * vision.num_heads) == 0, multiple),
        ("vision_config.window_size", vision.window_size, vision.window_size >= token, f"{token} pixels (one token) or more"),
    ):
        if not fits:
            raise ValueError(f"config.{name}: found {found}, expected {expected}")


def match_tokenizer(config: Any, tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, Any]) -> None:
    """Make the configuration's token ids those of the tokenizer.

    Args:
        config: changed in place where ``stated`` leaves an id open.
        tokenizer: knows the tokens of the chat template.
        stated: what the user or the checkpoint says.

    Raises:
        ValueError: a stated id is another one, a token is missing, or the model's vocabulary is too small.
    """
    for name, token in _TOKENS.items():
        own = special_id(tokenizer, token)
        if stated.get(name, own) != own:
            raise ValueError(f"config.{name}: found {stated[name]}, expected {own}, the tokenizer's '{token}'")
        setattr(config, name, own)
    assert_vocabulary(tokenizer, config.text_config.vocab_size)


def patch_layout(config: Any, min_pixels: int | None, max_pixels: int | None, source: str | None = None) -> PatchLayout:
    """Cutting of the model's images: bounds as given, else those of the checkpoint's preprocessor, else the published ones."""
    vision = config.vision_config
    layout = PatchLayout(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    smallest, largest = layout.limits if source is None else layout.limits_from(source)
    return replace(layout, min_pixels=min_pixels or smallest, max_pixels=max_pixels or largest)
