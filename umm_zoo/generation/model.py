"""Method ready for use, and images of a user as its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning import LightningModule
from PIL import Image, ImageOps
from torch import Tensor

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.batch import Batch
from umm_zoo.conversation import repeat_markers
from umm_zoo.errors import UserError
from umm_zoo.generation.abilities import lacking
from umm_zoo.generation.images import open_image
from umm_zoo.generation.requests import Request
from umm_zoo.generation.run_data import RunData
from umm_zoo.generation.similarities import Similarities
from umm_zoo.generation.tensors import from_pil
from umm_zoo.methods.requests import request_batch

#: An image of a user.
Source = Path | Image.Image


class Resize(Protocol):
    """Image policy of a run's data, see ``data_pipelines.transforms``."""

    def images(self, image: Image.Image, size: int) -> list[Image.Image]:
        """The images made of one."""

    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """Width and height of what is made of one."""


@dataclass
class Model:
    """Method in evaluation mode, and how images become its inputs: files, or opened ones."""

    method: Any  #: asked for capabilities alone
    load_images: Callable[[Source], list[Tensor]]  #: made of one, as by the run's data
    load_shaped: Callable[[Source], Tensor]  #: the same in its own shape, where the model takes any
    device: str
    target_size: Callable[[Source], tuple[int, int] | None] = lambda _: None
    """Height and width that the run's data gives an image to generate of the source's shape; None for squares, in the run's own."""
    similarities: Similarities = field(default_factory=Similarities)  #: of an image and what was made of its caption

    @classmethod
    def of(cls, method: LightningModule, data: RunData, device: str) -> Model:
        """A method, moved to a device; images are brought to the size that the run's data brings them to.

        Raises:
            UserError: there is no such device, or an image policy that cannot be built.
        """
        backbone = next((module for module in method.children() if isinstance(module, VLMBackbone)), None)
        fixed = backbone.image_size if backbone is not None else None
        size, edge = fixed or data.get("image_size"), data.get("target_size") or data.get("image_size")
        resize: Resize | None = data.built("resize")
        targets: Resize | None = data.built("target_resize") or resize
        try:
            torch.zeros(1, device=device).item()  # the device of shapes alone has no value to give
            method.to(device)
        except (RuntimeError, AssertionError) as error:  # no such device; a torch without CUDA asserts
            reason = str(error).splitlines()[0]
            raise UserError("--device", f"'{device}' ({reason})", "a device of this machine: cpu, cuda, cuda:1 ...") from error

        def resized(source: Source) -> list[Tensor]:
            return load_images(source, size, resize)

        def shaped(source: Source) -> Tensor:
            return resized(source)[0] if fixed else load_shaped(source, size)

        def target_size(source: Source) -> tuple[int, int] | None:
            if targets is None or edge is None:
                return None
            width, height = targets.output_size(*opened(source).size, edge)
            return None if width == height else (height, width)

        return cls(method, resized, shaped, device, target_size)

    def batches(self, requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
        """Runs of at most ``size`` requests whose settings differ by their seeds alone."""
        for _, group in groupby(requests, lambda request: {**request.settings, "seed": None}):
            rows = list(group)
            yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def batch_of(self, requests: Sequence[Request]) -> Batch:
        """A row per request, on the model's device; a ``UserError`` where a file is no image."""
        parts = [[self.load_images(image) for image in request.images] for request in requests]
        pairs = zip(requests, parts, strict=True)
        own_images = [[images[0] for images in own[request.num_earlier_images :]] for request, own in pairs]
        asked = request_batch([request.question for request in requests], own_images)
        earlier = [[*request.earlier, *turns] for request, turns in zip(requests, asked.conversations, strict=True)]
        counts = [[len(images) for images in own] for own in parts]
        batch = replace(  # what was asked of an image is asked of all that is made of it
            asked,
            conversations=[repeat_markers(turns, own) for turns, own in zip(earlier, counts, strict=True)],
            images=[image for own in parts for images in own for image in images],
            image_counts=[sum(own) for own in counts],
        )
        return batch.to(self.device)

    def cannot(self, action: str, capability: type) -> UserError:
        """The error where the method lacks a capability (a protocol of ``umm_zoo.outputs``)."""
        return lacking(self.method, action, f"{capability.__module__}.{capability.__name__}")


def opened(source: Source) -> Image.Image:
    """A file's image, see ``open_image``; one that is opened already as it is."""
    return open_image(source) if isinstance(source, Path) else source


def load_image(path: Source, size: int | None) -> Tensor:
    """The centre of an image file, or all of it without a ``size``, see ``load_images``."""
    return load_images(path, size)[0]


def load_images(path: Source, size: int | None, resize: Resize | None = None) -> list[Tensor]:
    """The images made of a file, ``[3, H, W]`` in [-1, 1], see ``open_image``.

    A ``size`` makes them what ``resize`` does, or a square of this edge by cutting out the centre.
    """
    image = opened(path)
    if size is None:
        return [from_pil(image)]
    made = resize.images(image, size) if resize else [ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)]
    return [from_pil(one) for one in made]


def load_shaped(path: Source, size: int | None) -> Tensor:
    """An image file in its own shape, shrunk where its area is larger than that of a square of edge ``size``."""
    image = opened(path)
    scale = 1.0 if size is None else size / math.sqrt(image.width * image.height)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return from_pil(image)
