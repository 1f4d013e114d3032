"""Configurations and weights of Janus, checked before the library would fail over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, JanusConfig, JanusForConditionalGeneration, JanusVisionConfig
from transformers.models.janus.modeling_janus import (
    JanusModel,
    JanusPreTrainedModel,
    JanusVisionAlignerMLP,
    JanusVisionModel,
    JanusVQVAEAlignerMLP,
    JanusVQVAEHead,
)

from umm_zoo.backbones.janus_vq import vq_config, vq_downsampling
from umm_zoo.backbones.language_models import attention_by_part
from umm_zoo.backbones.llava_loading import Dtype, load_decoder, part_config, read_part
from umm_zoo.backbones.loading import (
    assert_known,
    find_source,
    image_processor_of,
    load_checkpoint,
    on_meta_device,
    torch_dtype,
)
from umm_zoo.backbones.stock_processor import stock_processor
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.batch import IMAGE_MARKER


class _Body(JanusModel):
    def __init__(self, config: JanusConfig) -> None:
        JanusPreTrainedModel.__init__(self, config)
        vision, vq, text = (cast(Any, part) for part in (config.vision_config, config.vq_config, config.text_config))
        self.vision_model = JanusVisionModel._from_config(vision)
        self.aligner = JanusVisionAlignerMLP(vision)
        self.generation_embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.generation_aligner, self.generation_head = JanusVQVAEAlignerMLP(vq), JanusVQVAEHead(vq)
        self.language_model = AutoModel.from_config(config=text)
        self.post_init()


class JanusWithoutVQ(JanusForConditionalGeneration):
    """The library's model without its image tokenizer, beside another codec."""

    def __init__(self, config: JanusConfig) -> None:
        JanusPreTrainedModel.__init__(self, config)
        self.model = _Body(config)
        text = cast(Any, config.text_config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


def model_class(num_codes: int | None) -> type[JanusForConditionalGeneration]:
    """The library's class, or the one without an image tokenizer where another codec has ``num_codes``."""
    return JanusForConditionalGeneration if num_codes is None else JanusWithoutVQ


def janus_config(fields: Mapping[str, Any], shipped_tokenizer: bool, num_codes: int | None = None) -> JanusConfig:
    """The library's configuration from plain fields; widths that must be one number need not be stated.

    Args:
        fields: ``text_config``, ``vision_config``, ``vq_config`` …
        shipped_tokenizer: whether vocabulary and image token are those of the shipped one unless stated.
        num_codes: of a codec in the place of the library's; None for the library's.

    Raises:
        ValueError: an unknown field, or sizes that do not fit each other.
    """
    assert_known("config", fields, JanusConfig().to_dict())
    values: dict[str, Any] = {"tie_word_embeddings": False, **fields}  # the releases' output layers are their own
    text: Any = part_config("config.text_config", values.get("text_config"), shipped_tokenizer)
    vision, vq = dict(values.get("vision_config") or {}), dict(values.get("vq_config") or {})
    vision.setdefault("projection_dim", text.hidden_size)
    for name in ("projection_dim", "image_token_embed_dim"):
        vq.setdefault(name, text.hidden_size)
    if num_codes is not None:
        vq.setdefault("num_embeddings", num_codes)
    assert_known("config.vision_config", vision, JanusVisionConfig().to_dict())
    if "image_size" in vision and "patch_size" in vision and "num_image_tokens" not in vision:
        vision["num_image_tokens"] = (vision["image_size"] // vision["patch_size"]) ** 2
    if shipped_tokenizer:
        values.setdefault("image_token_id", load_tokenizer().get_vocab()[IMAGE_MARKER])
    elif "image_token_id" not in values:
        raise ValueError("config: found no 'image_token_id', expected that of <image_placeholder> in the tokenizer")
    built = JanusVisionConfig(**{key: value for key, value in vision.items() if key != "model_type"})
    config = JanusConfig(**{**values, "text_config": text, "vision_config": built, "vq_config": vq_config(vq, "config.vq_config")})
    assert_sizes(config, num_codes)
    return config


def assert_sizes(config: JanusConfig, num_codes: int | None = None) -> None:
    """Refuse parts that do not fit each other, by the names of the configuration.

    Args:
        config: of the library.
        num_codes: of a codec in the place of the library's; None for the library's.

    Raises:
        ValueError: says which number, and what it must be.
    """
    text, vision, vq = (cast(Any, part) for part in (config.text_config, config.vision_config, config.vq_config))
    if text.model_type != "llama":
        raise ValueError(f"config.text_config.model_type: found '{text.model_type}', expected 'llama'")
    width, patch, heads = f"{text.hidden_size}, the width of the language model", vision.patch_size, vision.num_attention_heads
    rules = [
        ("vision_config.projection_dim", vision.projection_dim, text.hidden_size, width),
        ("vq_config.projection_dim", vq.projection_dim, text.hidden_size, width),
        ("vq_config.image_token_embed_dim", vq.image_token_embed_dim, text.hidden_size, width),
        ("vision_config.hidden_size", vision.hidden_size, vision.hidden_size // heads * heads, f"a multiple of the {heads} heads"),
        ("vision_config.image_size", vision.image_size, vision.image_size // patch * patch, f"a multiple of the patches' {patch}"),
        (
            "vision_config.num_image_tokens",
            vision.num_image_tokens,
            (vision.image_size // patch) ** 2,
            f"{(vision.image_size // patch) ** 2}, the square of image_size / patch_size",
        ),
    ]
    if num_codes is None:
        factor = vq_downsampling(vq)
        levels = f"{factor}, which channel_multiplier {list(vq.channel_multiplier)} makes of a cell"
        rules.append(("vision_config.patch_size", patch, factor, levels))
    else:
        codes = f"{num_codes}, the codes of the codec"
        rules.append(("vq_config.num_embeddings", vq.num_embeddings, num_codes, codes))
    for name, found, needed, expected in rules:
        if found != needed:
            raise ValueError(f"config.{name}: found {found}, expected {expected}")


def new_janus(config: JanusConfig, dtype: Dtype, attention: str, num_codes: int | None = None) -> JanusForConditionalGeneration:
    """A Janus with random weights; ``auto`` is float32."""
    precision = torch_dtype("float32" if dtype == "auto" else dtype)
    return model_class(num_codes)._from_config(config, dtype=precision, attn_implementation=attention_by_part(attention))


def janus_around(
    language_model: str, fields: Mapping[str, Any], shipped_tokenizer: bool, dtype: Dtype, attention: str, num_codes: int | None
) -> JanusForConditionalGeneration:
    """A Janus whose language model is that of a checkpoint, whose output layer may be tied; the rest has random weights.

    Raises:
        ValueError: ``text_config`` among the fields: the checkpoint has one.
    """
    source = find_source(language_model, AutoModelForCausalLM)
    if fields.get("text_config") is not None:
        raise ValueError(f"config.text_config: found beside language_model: {source}, expected one of the two")
    known = {**fields, "text_config": read_part(source, "text_config")}
    model = new_janus(janus_config(known, shipped_tokenizer, num_codes), dtype, attention, num_codes)
    if not on_meta_device():
        decoder, head, _ = load_decoder(source, dtype, attention)
        cast(Any, model.model.language_model).load_state_dict(decoder.state_dict())
        model.lm_head.load_state_dict(head.state_dict())
    return model


def load_janus(
    source: str, dtype: Dtype, attention: str, stated: Mapping[str, Any] | None = None, num_codes: int | None = None
) -> JanusForConditionalGeneration:
    """A whole Janus; ``stated`` fills in what the stored configuration leaves open.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: tensors are missing, unexpected or of another shape; sizes do not fit each other.
    """
    replaced = () if num_codes is None else ("model.vqmodel.",)
    model = load_checkpoint(
        model_class(num_codes), source, dtype, replaced, stated, attn_implementation=attention_by_part(attention)
    )
    assert_sizes(model.config, num_codes)
    # older files leave it out; the library's default says that the two are one, and it does not tie them where the file has both
    model.config.tie_word_embeddings = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    return cast(JanusForConditionalGeneration, model.train())


def pixel_statistics(image_size: int, source: str | None = None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels in [0, 1]: what a checkpoint's processor says, else the releases' .5.

    Raises:
        ValueError: the processor makes images of another size.
    """
    said = {} if source is None else stock_processor(image_processor_of(source), source, crops=False)
    if (found := said.get("stock_size", image_size)) != image_size:
        raise ValueError(f"{source}: image processor: size: found {found}, expected {image_size}, the vision tower's")
    return list(said.get("mean", [0.5] * 3)), list(said.get("std", [0.5] * 3))
