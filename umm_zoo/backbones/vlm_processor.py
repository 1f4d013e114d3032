"""Parts of the processor beside a vision-language model's weights, read one by one: a whole one asks for torchvision."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from umm_zoo.backbones.loading import on_meta_device, one_line
from umm_zoo.backbones.tokenizer import assert_vocabulary, load_tokenizer
from umm_zoo.errors import UserError, did_you_mean

_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json")


def load_images(source: str, kind: str, settings: Mapping[str, Any]) -> Any:
    """The image processor of a name or folder, the library's PIL back-end.

    On the meta device none is read that is not on this machine; its sizes are the library's defaults.

    Args:
        source: the name or folder.
        kind: the model's type.
        settings: to be given to it.

    Raises:
        FileNotFoundError: there is none.
        UserError: it has no such setting.
    """
    if on_meta_device() and not Path(source).is_dir():
        return getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[kind]["pil"])()
    with one_line(source, "a folder with the model's image processor (preprocessor_config.json)"):
        images = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    known = {*images.valid_kwargs.__annotations__, *images.to_dict()}
    if unknown := sorted(set(settings) - known):
        hint = did_you_mean(unknown[0], known) or f"it has {', '.join(sorted(images.valid_kwargs.__annotations__))}"
        raise UserError("image_processor", f"'{unknown[0]}'", f"a setting of {type(images).__name__}", hint)
    return images


def load_words(source: str | None, config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of that configuration.

    Raises:
        ValueError: it has more tokens than the language model, or not the image token.
    """
    found, number = load_tokenizer(source), config.image_token_id
    assert_vocabulary(found, config.get_text_config().vocab_size)
    if number not in found.added_tokens_decoder:
        expected = f"one whose added token of the id {number} stands for images, as config.json says"
        raise ValueError(f"tokenizer: found {len(found)} tokens, expected {expected}")
    return found


def stored_template(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a name or folder: its processor's, else its tokenizer's.

    Raises:
        UserError: there is none.
    """
    with one_line(source, "a name or folder with a processor"):
        stored = ProcessorMixin.get_processor_dict(source)[0].get("chat_template") or tokenizer.chat_template
    if isinstance(stored, dict):
        stored = stored.get("default")
    if stored is None:
        hint = "state one, such as template: {_target_: umm_zoo.backbones.templates.ChatML}"
        raise UserError(source, "no chat template", "chat_template.jinja beside the weights", hint)
    return str(stored)


def copy_processor(source: str, images: Any, folder: str | Path) -> None:
    """Write an image processor, and beside it what else of a processor there is in a ``source`` on this machine."""
    images.save_pretrained(folder)
    for name in _FILES:
        if (own := Path(source, name)).is_file():
            shutil.copy(own, Path(folder, name))


def processed(images: Sequence[Tensor] | Tensor, counts: Sequence[int], how: Any, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What an image processor makes of images in [-1, 1], row after row.

    Args:
        images: rounded to 8 bits, as files are.
        counts: images of each row.
        how: the image processor.
        settings: given to it.
    """
    left = iter([_picture(image) for image in images])
    rows = [[next(left) for _ in range(count)] for count in counts if count]
    return tensors_of(how(rows, return_tensors="pt", **settings))


def tensors_of(made: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among what an image processor gives."""
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _picture(image: Tensor) -> Image.Image:
    """An image as the library's processors take it; a blank one for one without numbers (``--check``)."""
    if image.device.type == "meta":
        return Image.new("RGB", (image.shape[-1], image.shape[-2]))
    levels = ((image.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
