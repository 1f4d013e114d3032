"""Configurations stored beside weights, refused where they leave open what the weights compute.

A library fills a key that is not there with its own default. The shapes fit all the same, and the
outputs are those of another model.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import transformers
from packaging.version import InvalidVersion, Version
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from umm_zoo.backbones.diffusers_keys import HARMLESS, SINCE
from umm_zoo.backbones.families import use
from umm_zoo.errors import note

#: Keys of transformers' configurations that change outputs and not the shapes of weights; a model has those of its class.
MEANING = frozenset(
    [
        "hidden_act",
        "hidden_activation",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "rms_norm_eps",
        "num_attention_heads",
        "num_heads",
        "rope_theta",
        "rope_parameters",
        "partial_rotary_factor",
        "feed_forward_proj",
        "relative_attention_max_distance",
        "image_size",
        "patch_size",
        "window_size",
        "fullatt_block_indexes",
        "spatial_merge_size",
        "temporal_patch_size",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "projector_hidden_act",
        "image_token_id",
        "image_token_index",
    ]
)
#: Those that published files of the library's fourth generation may leave out: they are younger than many of them.
_YOUNG = {"rope_parameters", "relative_attention_max_distance", "partial_rotary_factor", "layer_types", "sliding_window"}
_YOUNG |= {"use_sliding_window", "temporal_patch_size", "fullatt_block_indexes", "image_token_id", "image_token_index"}
#: Words in keys that matter to a training from nothing alone, or to the library's own generation.
_OF_TRAINING = ("dropout", "drop_path", "dropped", "initializer", "use_cache", "_init_value")
#: Models out of whose weights the library, or a key mapping here, takes a part: by the part's type.
_HOLDS = {"clip_vision_model": "clip", "clip_text_model": "clip", "siglip_vision_model": "siglip", "janus_vqgan": "janus"}
#: What every configuration may hold beside its class's own keys.
_COMMON = frozenset(PreTrainedConfig().to_dict()) | {"torch_dtype", "auto_map", "text_config", "rope_scaling", "rope_theta"}
_COMMON |= {"quantization_config"}


def complete_diffusers(
    kind: type[Any], source: str | Path, stored: Mapping[str, Any], stated: Mapping[str, Any], legacy: Collection[str] = ()
) -> dict[str, Any]:
    """Keys that the file leaves out and ``stated`` gives.

    Args:
        kind: class of the network.
        source: for the message.
        stored: what stands in ``config.json``.
        stated: what the experiment says.
        legacy: names of the class in older files.

    Raises:
        ValueError: a network of another class, a key that is needed and nowhere, or one that the installed library does not know.
    """
    name = kind.__name__
    assert_class_name(name, source, stored, legacy)
    known = list(inspect.signature(kind.__init__).parameters)[1:]
    written = _version(stored.get("_diffusers_version"))
    _refuse_unknown(source, stored, [*known, "quantization_config"], written, Version(version("diffusers")), "diffusers")
    missing = [key for key in known if key not in stored and name not in HARMLESS.get(key, ())]
    if written is not None:
        missing = [key for key in missing if Version(SINCE.get(name, {}).get(key, "0")) <= written]
    _refuse_missing(source, [key for key in missing if key not in stated])
    return {key: stated[key] for key in missing}


def assert_class_name(name: str, source: str | Path, stored: Mapping[str, Any], legacy: Collection[str] = ()) -> None:
    """Refuse the weights of another network of diffusers, before they are read.

    Raises:
        ValueError: the class has another name.
    """
    found = stored.get("_class_name") or stored.get("model_type", name)  # the latter is transformers' word
    if found not in (name, *legacy):
        raise ValueError(f"{source}: found weights of a {found}, expected those of a {name}{use(found)}")


def complete_transformers(source: str | Path, stored: dict[str, Any], stated: Mapping[str, Any]) -> bool:
    """Put what ``stated`` gives in the place of keys that the file leaves out; whether there were any.

    Args:
        source: for the message.
        stored: what stands in ``config.json``; changed in place.
        stated: what the experiment says.

    Raises:
        ValueError: a key that is needed and nowhere, or one that the installed library does not know.
    """
    written, own = _version(stored.get("transformers_version")), Version(transformers.__version__)
    filled = False
    parts = CONFIG_MAPPING[stored["model_type"]].sub_configs if stored.get("model_type") in CONFIG_MAPPING else {}
    missing = [name for name, kind in parts.items() if stored.get(name) is None and kind is AutoConfig]
    for section, kind, fields, said in _sections(stored, stated):
        needed = _needed(kind, bool(section), written, own)
        aliases = kind.attribute_map
        for key in sorted(needed - fields.keys()):
            if key in said:
                fields[key], filled = said[key], True
            elif not any(aliases.get(other) == key for other in fields):
                missing.append(section + key)
        turned = ("rope_theta", "rope_type", *(["mrope_section"] if kind.model_type == "qwen2_5_vl_text" else []))
        missing += [f"{section}{key}" for key in _open_rotation(fields.get("rope_parameters"), turned, "rope_parameters")]
        known = {*kind().to_dict(), *aliases, *_COMMON}
        _refuse_unknown(source, fields, known, written, own, "transformers")
    _refuse_missing(source, missing)
    return filled


def config_of(kind: Any, stored: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a model class (of any, for the library's ``Auto`` classes), or the one inside that is for it."""
    own = getattr(kind, "config_class", None) or CONFIG_MAPPING[stored["model_type"]]
    inside = [value for value in stored.values() if isinstance(value, Mapping) and value.get("model_type") == own.model_type]
    fields = stored if stored.get("model_type", own.model_type) == own.model_type or not inside else inside[0]
    return cast(PreTrainedConfig, own.from_dict(dict(fields)))


def assert_model_type(source: str | Path, stored: Mapping[str, Any], kind: Any) -> None:
    """Refuse the weights of another kind of model by the name of its type, before they are read.

    Raises:
        ValueError: another model's, or the original layout of LLaVA or Janus.
    """
    own, found = getattr(kind, "config_class", None), stored.get("model_type")
    if found is None and (network := stored.get("_class_name")) is not None:
        raise ValueError(f"{source}: found weights of a {network}, expected a model of transformers{use(network)}")
    if "mm_vision_tower" in stored or "mm_projector_type" in stored:
        hint = "such as llava-hf/llava-1.5-7b-hf, or this one converted with transformers' convert_llava_weights_to_hf.py"
        raise ValueError(f"{source}: found LLaVA's original layout (model_type '{found}'), expected the library's, {hint}")
    if found == "multi_modality":
        hint = "such as deepseek-community/Janus-Pro-1B, or this one converted with transformers' convert_janus_weights_to_hf.py"
        raise ValueError(f"{source}: found Janus's original layout (model_type '{found}'), expected the library's, {hint}")
    if own is None or found in (None, own.model_type, _HOLDS.get(own.model_type)):
        return
    raise ValueError(f"{source}: found a model of type '{found}', expected '{own.model_type}'{use(found)}")


def _sections(stored: dict[str, Any], stated: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any], Mapping[str, Any]]]:
    """The configuration and those inside it: prefix for messages, class, fields, and what is stated of it."""
    top: Any = CONFIG_MAPPING[stored["model_type"]] if stored.get("model_type") in CONFIG_MAPPING else None
    inner = {} if top is None else top.sub_configs
    if top is not None:
        flat = inner.get("text_config", AutoConfig) if "text_config" not in stored else AutoConfig
        yield "", top if flat is AutoConfig else flat, stored, stated  # the fourth generation wrote Qwen2.5-VL flat
    for name, fields in stored.items():
        if isinstance(fields, dict) and name.endswith("_config"):
            listed = fields.get("model_type") in CONFIG_MAPPING
            kind: Any = CONFIG_MAPPING[fields["model_type"]] if listed else inner.get(name, AutoConfig)
            if kind is not AutoConfig:
                yield f"{name}.", kind, fields, stated.get(name) or {}


def _needed(kind: Any, nested: bool, written: Version | None, own: Version) -> set[str]:
    """Keys that must stand there.

    The library's fifth generation writes every key of a class; its fourth left out what was the default in a configuration inside
    another one. What came to a class since a file was written cannot be told from here, so only the same release must say all.
    """
    declared = set(kind().to_dict()) - set(PreTrainedConfig().to_dict()) - set(kind.sub_configs)
    declared = {key for key in declared if not any(word in key for word in _OF_TRAINING)}
    if written is not None and written.release[:2] == own.release[:2]:
        return declared
    if written is None:
        return declared & MEANING - {"relative_attention_max_distance"}
    if written.major >= 5:
        return declared & MEANING
    return set() if nested else declared & MEANING - _YOUNG


def _open_rotation(rope: Any, needed: Collection[str], where: str) -> list[str]:
    """Missing keys of rotary positions, which may be given per type of layer."""
    if not isinstance(rope, Mapping):
        return []
    if rope and all(isinstance(value, Mapping) for value in rope.values()):
        return [key for name, inner in rope.items() for key in _open_rotation(inner, needed, f"{where}.{name}")]
    return [f"{where}.{key}" for key in needed if key not in rope]


def _refuse_missing(source: str | Path, missing: Collection[str]) -> None:
    if missing:
        keys = ", ".join(f"'{key}'" for key in list(missing)[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ValueError(
            f"{source}: config.json: found no {keys}, expected what the weights were made with"
            " (the library's default may be another model's); state it under config: in the experiment"
        )


def _refuse_unknown(
    source: str | Path, stored: Mapping[str, Any], known: Collection[str], written: Version | None, own: Version, library: str
) -> None:
    """Refuse keys of a newer library, name others that it does not read; null switches nothing on."""
    unknown = [key for key, value in stored.items() if key not in known and not key.startswith("_") and value is not None]
    if not unknown:
        return
    keys = ", ".join(f"'{key}'" for key in unknown)
    if written is not None and written.release[:2] > own.release[:2]:
        raise ValueError(
            f"{source}: config.json: found {keys}, written by {library} {written}, expected keys that {library} {own} knows;"
            f" install a newer {library}"
        )
    if library == "diffusers" or (written is not None and written.major >= 5):
        note(f"{source}: config.json: {library} {own} does not read {keys}")


def _version(text: Any) -> Version | None:
    try:
        return Version(str(text))
    except InvalidVersion:
        return None
