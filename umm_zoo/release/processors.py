"""What transformers reads beside the weights of a vision-language model: chat template, processor, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from umm_zoo.backbones.feature_encoder import LibraryEncoder
from umm_zoo.backbones.features import CLIPFeatures, CLIPVisionFeatures, SigLIPFeatures, TextImageEncoder
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.square_vlm import SquareVLM
from umm_zoo.backbones.stored_template import StoredTemplate
from umm_zoo.backbones.templates import ChatML, ChatTemplate, Plain, VicunaV1
from umm_zoo.errors import note

#: Contents of a turn, an image on a line of its own as ``Method.ask`` writes it; IMAGE stands for an image's tokens.
_MACRO = """\
{%- macro content(message) -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- set last = namespace(image = false, text = "\\n") -%}
{%- for item in message.content -%}
{%- if item.type == "image" -%}
{{- "" if last.text.endswith("\\n") else "\\n" -}}{{- IMAGE -}}{%- set last.image = true -%}{%- set last.text = "." -%}
{%- elif item.text -%}
{{- "\\n" if last.image and not item.text.startswith("\\n") else "" -}}{{- item.text -}}
{%- set last.image = false -%}{%- set last.text = item.text -%}
{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""
_OWN = """\
{{- BOS -}}
{%- set own = messages | selectattr("role", "equalto", "system") | list -%}
"""
#: In front of the template of a language model, whose contents are plain texts.
_PLAIN_TEXTS = """\
{%- set ns = namespace(texts = []) -%}
{%- for message in messages -%}
{%- set ns.texts = ns.texts + [{"role": message.role, "content": content(message)}] -%}
{%- endfor -%}
{%- set messages = ns.texts %}"""
_CHATML = """\
{%- if SYSTEM is not none and not own -%}{{- "<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n" -}}{%- endif -%}
{%- for message in messages -%}
{{- "<|im_start|>" + message.role + "\\n" -}}{{- content(message) -}}{{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""
_VICUNA = """\
{%- set start = content(own[0]) if own else SYSTEM -%}
{{- start -}}
{%- set ns = namespace(blank = "" if start == "" else " ") -%}
{%- for message in messages -%}
{%- if message.role == "user" -%}{{- ns.blank + "USER: " -}}{{- content(message) -}}{%- set ns.blank = " " -%}
{%- elif message.role == "assistant" -%}{{- " ASSISTANT: " -}}{{- content(message) -}}{{- END -}}{%- set ns.blank = "" -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- " ASSISTANT:" -}}{%- endif -%}
"""
_PLAIN = """\
{%- for message in messages -%}
{%- if message.role == "user" and message.content is not string -%}
{%- for item in message.content if item.type == "image" -%}{{- IMAGE -}}{%- endfor -%}
{%- elif message.role == "assistant" and loop.last -%}{{- content(message) -}}{{- END -}}
{%- endif -%}
{%- endfor -%}
"""

#: Image processors of encoders that take images of their own size as they are, whatever the processor.
_IMAGES: dict[type, str] = {
    CLIPVisionFeatures: "CLIPImageProcessor",
    CLIPFeatures: "CLIPImageProcessor",
    SigLIPFeatures: "SiglipImageProcessor",
}
_BODIES: dict[type, str] = {ChatML: _CHATML, VicunaV1: _VICUNA, Plain: _PLAIN}


def jinja(template: ChatTemplate, image: str, bos: str) -> str | None:
    """A chat template in the library's form, an ``image`` token for each image; None of a form that has none here."""
    image = "".join([*(piece.text for piece in template.around_image[:1]), image, *(p.text for p in template.around_image[1:])])
    values: dict[str, Any] = {"IMAGE": image, "BOS": bos, "SYSTEM": getattr(template, "system", None), "END": template.end}
    body = next(
        (body for kind, body in ((ChatML, _CHATML), (VicunaV1, _VICUNA), (Plain, _PLAIN)) if isinstance(template, kind)), None
    )
    if body is None:
        return None
    head = "".join(f"{{%- set {name} = {'none' if value is None else json.dumps(value)} -%}}\n" for name, value in values.items())
    return head + _MACRO + _OWN + body


def write_processor(module: Any, folder: Path) -> None:
    """Write what is missing beside the weights of a vision-language model or an encoder; of other parts nothing."""
    if isinstance(module, LibraryEncoder):
        _write_encoder(module, folder)
    if not isinstance(module, LibraryVLM):
        return
    tokenizer = module.tokenizer
    image = tokenizer.convert_ids_to_tokens(module.image_token_id) if module.image_token_id < len(tokenizer) else None
    text = None if image is None else jinja(module.template, str(image), tokenizer.bos_token or "")
    if isinstance(module.template, StoredTemplate):
        stored = module.template
        if stored.as_text and isinstance(module, SquareVLM):  # a whole model's came with the weights, and went with them
            head = f'{{%- set IMAGE = "{stored.marker}" -%}}\n{_MACRO}{_PLAIN_TEXTS}'
            (folder / "chat_template.jinja").write_text(head + stored.source, encoding="utf-8")
    elif text is None:
        note(f"{type(module).__name__}: its prompts have no form in transformers, so no chat template is written")
    else:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    _update(folder / "generation_config.json", eos_token_id=module.stop_ids, pad_token_id=module.pad_id)
    if isinstance(module, SquareVLM) and module.config.model_type == "llava":
        strategy, side = module.config.vision_feature_select_strategy, module.image_size
        processor = {
            "processor_class": "LlavaProcessor",
            "patch_size": module.config.vision_config.patch_size,
            "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": int(strategy == "default"),  # the class token, which that strategy takes off again
            "image_token": image,
        }
        images = {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "image_mean": module.image_mean.flatten().tolist(),
            "image_std": module.image_std.flatten().tolist(),
        }
        _update(folder / "processor_config.json", **processor)
        _update(folder / "preprocessor_config.json", **images)
    elif isinstance(module, Qwen25VL):
        _update(folder / "preprocessor_config.json", processor_class="Qwen2_5_VLProcessor")


def _write_encoder(encoder: LibraryEncoder, folder: Path) -> None:
    """The tokenizer of a text tower, and the image processor where none came with the weights.

    It says what this class does with images of any size; one that takes images of its own size as they are has no such file.
    """
    if isinstance(encoder, TextImageEncoder):
        encoder.text.tokenizer.save_pretrained(folder)
    kind = next((name for base, name in _IMAGES.items() if isinstance(encoder, base)), None)
    if kind is None or encoder.processor:
        return
    side = encoder.image_size
    cut = encoder.crop_ratio is not None
    _update(
        folder / "preprocessor_config.json",
        image_processor_type=kind,
        do_center_crop=cut,
        size={"shortest_edge": side} if cut else {"height": side, "width": side},
        crop_size={"height": side, "width": side},
        resample=3,
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
    )


def _update(file: Path, **values: Any) -> None:
    """Set keys of a JSON file, which is made where there is none."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**found, **values}, indent=2) + "\n", encoding="utf-8")
