"""Slot of what names the colours of objects, and GenEval's own: CLIP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from umm_zoo.backbones.features import CLIPFeatures
from umm_zoo.backbones.frozen import FrozenBackbone, freeze
from umm_zoo.backbones.precomputable import weights_hash
from umm_zoo.benchmarks.geneval.detector import device_of, exact_arithmetic
from umm_zoo.errors import Count
from umm_zoo.generation.tensors import from_pil, to_pil
from umm_zoo.metrics.geneval_rule import COLOURS, Found

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
#: Of what lies outside an object.
_GREY = (0x99, 0x99, 0x99)


class Subject(NamedTuple):
    """An object whose colour is asked for, and the image ``[3, H, W]`` in [-1, 1] that shows it."""

    image: Tensor
    name: str
    found: Found


class AttributeNamer(FrozenBackbone, ABC):
    """What names the colours of objects.

    Attributes:
        colours: the words that it may say.
    """

    colours: tuple[str, ...] = COLOURS

    @abstractmethod
    def forward(self, subjects: Sequence[Subject]) -> list[str]:
        """The colour of each object, whatever the others are."""

    @abstractmethod
    def digest(self) -> str:
        """What it is, for the card: its kind and a hash of its weights."""


class CLIPColours(AttributeNamer):
    """The likeliest of ten colours according to CLIP, as GenEval has it.

    What lies outside the object's mask becomes grey #999 (without a mask nothing does), the image is cut to the object's box and
    brought to CLIP's size as open_clip does: PIL's bicubic, then the centre. A colour is the normalised mean of three normalised
    texts. It runs in float32; the official script lets CUDA compute in float16.

    Args:
        encoder: both towers.
        batch_size: objects at a time.
    """

    def __init__(self, encoder: CLIPFeatures, batch_size: Count = 64) -> None:
        super().__init__()
        self.encoder, self.batch_size = freeze(encoder), batch_size
        self._texts: dict[str, Tensor] = {}  # by class

    @classmethod
    def from_pretrained(cls, source: str | Path = "openai/clip-vit-large-patch14", batch_size: Count = 64) -> Self:
        """A name on the hub or a folder in transformers' format; see ``CLIPFeatures.from_pretrained``."""
        return cls(CLIPFeatures.from_pretrained(source), batch_size)

    def digest(self) -> str:
        """``CLIP`` and a hash of its weights."""
        return f"CLIP {weights_hash(self.encoder)[:16]}"

    @torch.no_grad()
    def forward(self, subjects: Sequence[Subject]) -> list[str]:
        """The first of equally likely colours, in GenEval's order."""
        device, named = device_of(self.encoder), list[str]()
        with exact_arithmetic(device):
            for start in range(0, len(subjects), self.batch_size):
                some = subjects[start : start + self.batch_size]
                images = torch.stack([from_pil(shown(one, self.encoder.image_size)) for one in some]).to(device)
                texts = torch.stack([self._classifier(one.name, device) for one in some])  # [n, colours, F]
                likeness = torch.einsum("ncf,nf->nc", texts, F.normalize(self.encoder(images), dim=-1))
                named += [self.colours[place] for place in likeness.argmax(dim=1).tolist()]
        return named

    def _classifier(self, name: str, device: torch.device) -> Tensor:
        """A vector per colour for objects of a class, ``[colours, F]``."""
        if name not in self._texts:
            texts = [template.format(colour=colour, name=name) for colour in self.colours for template in TEMPLATES]
            vectors = F.normalize(self.encoder.encode_text(texts), dim=-1).unflatten(0, (len(self.colours), len(TEMPLATES)))
            self._texts[name] = F.normalize(vectors.mean(dim=1), dim=-1)
        return self._texts[name].to(device)


def shown(subject: Subject, size: int) -> Image.Image:
    """The object alone, in a square of ``size``."""
    image, found = to_pil(subject.image), subject.found
    if found.mask is not None:
        blank = Image.new("RGB", image.size, _GREY)
        image = Image.composite(image, blank, Image.fromarray(np.ascontiguousarray(found.mask, dtype=bool)))
    left, top, right, bottom = (round(float(edge)) for edge in found.box[:4])
    image = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))  # a box of half a pixel shows one
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))
