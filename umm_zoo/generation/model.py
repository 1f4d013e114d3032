"""Method of a finished run, ready for use, and image files as its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.batch import Batch
from umm_zoo.callbacks.samples import from_pil
from umm_zoo.conversation import repeat_markers
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build
from umm_zoo.generation.images import open_image
from umm_zoo.generation.requests import Request
from umm_zoo.method import Method
from umm_zoo.methods.requests import request_batch
from umm_zoo.training.finished_run import FinishedRun


class Resize(Protocol):
    """Image policy of a run's data, see ``data_pipelines.transforms``."""

    def images(self, image: Image.Image, size: int) -> list[Image.Image]:
        """The images made of one."""

    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """Width and height of what is made of one."""


@dataclass
class Model:
    """Method in evaluation mode, and how image files become its inputs."""

    method: Method
    load_images: Callable[[Path], list[Tensor]]  #: made of one file, as by the run's data
    load_shaped: Callable[[Path], Tensor]  #: the same in the file's own shape, where the model takes any
    device: str
    target_size: Callable[[Path], tuple[int, int] | None] = lambda _: None
    """Height and width that the run's data gives an image to generate of the file's shape; None for squares, in the run's own."""

    def batches(self, requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
        """Runs of at most ``size`` requests whose settings differ by their seeds alone."""
        for _, group in groupby(requests, lambda request: {**request.settings, "seed": None}):
            rows = list(group)
            yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def batch_of(self, requests: Sequence[Request]) -> Batch:
        """A row per request, on the model's device; a ``UserError`` where a file is no image."""
        parts = [[self.load_images(path) for path in request.images] for request in requests]
        asked = request_batch([request.question for request in requests], [[images[0] for images in own] for own in parts])
        counts = [[len(images) for images in own] for own in parts]
        batch = replace(  # what was asked of an image is asked of all that is made of it
            asked,
            conversations=[repeat_markers(turns, own) for turns, own in zip(asked.conversations, counts, strict=True)],
            images=[image for own in parts for images in own for image in images],
            image_counts=[sum(own) for own in counts],
        )
        return batch.to(self.device)

    def cannot(self, action: str, capability: type) -> UserError:
        """The error where the method lacks a capability (a protocol of ``umm_zoo.outputs``)."""
        found = f"a {type(self.method).__name__}, which cannot {action}"
        return UserError("method", found, f"a method that can ({capability.__module__}.{capability.__name__})")


def load_model(run: FinishedRun, device: str) -> Model:
    """The method of a run with its weights; images are brought to the size that the run's data brings them to.

    Where it cannot be built, weights do not fit, or there is no such device, it is a ``UserError``.
    """
    method, data = run.load_method(), run.experiment.data
    backbone = next((module for module in method.children() if isinstance(module, VLMBackbone)), None)
    fixed = backbone.image_size if backbone is not None else None
    size = fixed or data.get("image_size")
    resize: Resize | None = build(data["resize"], "data.resize") if data.get("resize") else None
    targets: Resize | None = build(data["target_resize"], "data.target_resize") if data.get("target_resize") else resize
    try:
        torch.zeros(1, device=device).item()  # the device of shapes alone has no value to give
        method.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device; a torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UserError("--device", f"'{device}' ({reason})", "a device of this machine: cpu, cuda, cuda:1 ...") from error

    def resized(path: Path) -> list[Tensor]:
        return load_images(path, size, resize)

    def shaped(path: Path) -> Tensor:
        return resized(path)[0] if fixed else load_shaped(path, size)

    def target_size(path: Path) -> tuple[int, int] | None:
        edge = data.get("target_size") or data.get("image_size")
        if targets is None or edge is None:
            return None
        width, height = targets.output_size(*open_image(path).size, edge)
        return None if width == height else (height, width)

    return Model(method, resized, shaped, device, target_size)


def load_image(path: Path, size: int | None) -> Tensor:
    """The centre of an image file, or all of it without a ``size``, see ``load_images``."""
    return load_images(path, size)[0]


def load_images(path: Path, size: int | None, resize: Resize | None = None) -> list[Tensor]:
    """The images made of a file, ``[3, H, W]`` in [-1, 1], see ``open_image``.

    A ``size`` makes them what ``resize`` does, or a square of this edge by cutting out the centre.
    """
    image = open_image(path)
    if size is None:
        return [from_pil(image)]
    made = resize.images(image, size) if resize else [ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)]
    return [from_pil(one) for one in made]


def load_shaped(path: Path, size: int | None) -> Tensor:
    """An image file in its own shape, shrunk where its area is larger than that of a square of edge ``size``."""
    image = open_image(path)
    scale = 1.0 if size is None else size / math.sqrt(image.width * image.height)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return from_pil(image)
