"""Tiny vision-language checkpoints as the library writes them, and its own processors, which go without torchvision here."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import tiny_configs
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from umm_zoo.backbones.pretrained_vlm import PretrainedVLM
from umm_zoo.backbones.tokenizer import SHIPPED

TEXT = {
    "vocab_size": 1100, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}}
SIGLIP = {**tiny_configs.clip(num_hidden_layers=3), "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_VISION = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
#: Grids of tiles of 8 x 8 pixels.
PINPOINTS = [[8, 8], [8, 16], [16, 8], [16, 16], [8, 24], [24, 24]]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}MARKER{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}{{ '<start_of_turn>' + role + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}"
    "{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}"
    "{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

#: By family: configuration, settings of its image processor, chat template, names of special tokens of its tokenizer.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, str]]] = {
    "qwen2_vl": (
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        },
        {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 1600}},
        CHATML.replace("MARKER", QWEN_IMAGE),
        {"image_token": "<|image_pad|>"},
    ),
    "qwen3_vl": (
        {
            "text_config": {**TEXT, **MROPE, "head_dim": 16},
            "vision_config": {
                **QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
        },
        {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 1600}},
        CHATML.replace("MARKER", QWEN_IMAGE),
        {"image_token": "<|image_pad|>"},
    ),
    "llava_onevision": (
        {
            "text_config": {"model_type": "qwen2", **TEXT, **ROPE},
            "vision_config": SIGLIP,
            "image_grid_pinpoints": PINPOINTS,
            "vision_aspect_ratio": "anyres_max_4",
        },
        {"size": {"height": 8, "width": 8}, "image_grid_pinpoints": PINPOINTS},
        CHATML.replace("MARKER", "<image>"),
        {"image_token": "<image>"},
    ),
}  # fmt: skip
FAMILIES["qwen2_5_vl"] = (
    {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {
            **QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "window_size": 16, "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
    },
    *FAMILIES["qwen2_vl"][1:],
)  # fmt: skip


FAMILIES |= {
    "llava": (
        {"text_config": {"model_type": "llama", **TEXT, **ROPE}, "vision_config": tiny_configs.clip(num_hidden_layers=3)},
        {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}},
        VICUNA,
        {"image_token": "<image>"},
    ),
    "llava_next": (
        {
            "text_config": {"model_type": "mistral", **TEXT, **ROPE, "sliding_window": None},
            "vision_config": tiny_configs.clip(num_hidden_layers=3),
            "image_grid_pinpoints": PINPOINTS,
        },
        {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "image_grid_pinpoints": PINPOINTS},
        VICUNA,
        {"image_token": "<image>"},
    ),
    "internvl": (
        {
            "text_config": {"model_type": "qwen2", **TEXT, **ROPE},
            "vision_config": {
                "model_type": "internvl_vision", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": [16, 16], "patch_size": [4, 4],
            },
            "image_seq_length": 4,
        },
        {"size": {"height": 16, "width": 16}, "max_patches": 6},
        CHATML.replace("MARKER", "<IMG_CONTEXT>"),
        {"image_token": "<IMG_CONTEXT>", "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>",
         "end_image_token": "</img>", "video_token": "<video>"},
    ),
    "smolvlm": (
        {
            "text_config": {"model_type": "llama", **TEXT, **ROPE},
            "vision_config": {**SIGLIP, "model_type": "smolvlm_vision", "image_size": 16},
            "scale_factor": 2,
        },
        {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}},
        SMOL,
        {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
         "end_of_utterance_token": "<end_of_utterance>"},
    ),
    "gemma3": (
        {
            "text_config": {
                **TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "vision_config": {**SIGLIP, "image_size": 16},
            "mm_tokens_per_image": 4,
        },
        {"size": {"height": 16, "width": 16}},
        GEMMA,
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    ),
}  # fmt: skip


def tokenizer(names: dict[str, str]) -> PreTrainedTokenizerFast:
    """The shipped one with all that families add."""
    built = PreTrainedTokenizerFast(
        tokenizer_file=str(SHIPPED / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|pad|>",
        extra_special_tokens=names, **({"bos_token": "<bos>"} if "boi_token" in names else {}),
    )  # fmt: skip
    more = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<image>",
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    built.add_special_tokens({"additional_special_tokens": [*more, *names.values()]}, replace_extra_special_tokens=False)
    return built


def write(folder: Path, kind: str, **change: Any) -> Path:
    """A folder with random weights that are large enough for a wrong mask or position to show; ``change`` of its configuration."""
    torch.manual_seed(0)
    config, settings, template, names = FAMILIES[kind]
    config = {**config, **{key: {**config[key], **own} if isinstance(own, dict) else own for key, own in change.items()}}
    words = tokenizer(names)
    own = {"image_token_id": words.convert_tokens_to_ids(names["image_token"]), "tie_word_embeddings": False}
    if kind in ("llava", "llava_next", "llava_onevision"):
        own["image_token_index"] = own.pop("image_token_id")
    if kind == "gemma3":
        own |= {f"{one}_token_index": words.convert_tokens_to_ids(names[f"{one}_token"]) for one in ("boi", "eoi")}
        own["image_token_index"] = own.pop("image_token_id")
    built = AutoConfig.for_model(kind, **config, **own)
    model = AutoModelForImageTextToText.from_config(built)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    image_processor(kind)(**settings).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def image_processor(kind: str) -> Any:
    """Class of a family's image processor."""
    return getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[kind]["pil"])


def library(folder: Path) -> tuple[Any, Any]:
    """The library's model and processor of a folder; what it needs for videos is left out of the processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    kind = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model.config.model_type])
    processor, words = object.__new__(kind), AutoTokenizer.from_pretrained(folder)
    processor.tokenizer, processor.image_processor = words, AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor.chat_template = (folder / "chat_template.jinja").read_text()
    processor.image_token, processor.image_token_id = words.image_token, model.config.image_token_id
    vision = model.config.vision_config
    if model.config.model_type == "llava_onevision":
        processor.num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
        processor.vision_aspect_ratio = model.config.vision_aspect_ratio
    if model.config.model_type in ("llava", "llava_next"):
        processor.patch_size, processor.num_additional_image_tokens = vision.patch_size, 1
        processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    if model.config.model_type == "internvl":
        processor.image_seq_length = model.config.image_seq_length
        processor.start_image_token, processor.end_image_token = words.start_image_token, words.end_image_token
        processor.video_token, processor.start_image_token_id, processor.end_image_token_id = words.video_token, None, None
        both = f"(?P<image>{re.escape(words.image_token)})|(?P<video>{re.escape(words.video_token)})"
        processor.multimodal_pattern = re.compile(both)
    if model.config.model_type == "smolvlm":
        processor.image_seq_len = (vision.image_size // vision.patch_size) ** 2 // model.config.scale_factor**2
        processor.fake_image_token, processor.global_image_token = words.fake_image_token, words.global_image_token
        processor.video_processor = SimpleNamespace(num_frames=1, fps=1)
    if model.config.model_type == "gemma3":
        processor = kind(processor.image_processor, words, processor.chat_template, model.config.mm_tokens_per_image)
    return model, processor


_FOLDERS: dict[str, TemporaryDirectory[str]] = {}


@cache
def checkpoint(kind: str) -> Path:
    """The folder of a family, written once per process."""
    _FOLDERS[kind] = TemporaryDirectory()
    return write(Path(_FOLDERS[kind].name), kind)


@cache
def _wrapped(kind: str) -> PretrainedVLM:
    return PretrainedVLM.from_pretrained(str(checkpoint(kind))).eval()


def wrapped(kind: str) -> PretrainedVLM:
    """Our wrapper of a family's folder, a copy of its own."""
    return copy.deepcopy(_wrapped(kind))
