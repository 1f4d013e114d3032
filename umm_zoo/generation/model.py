"""Method of a finished run, ready for use, and image files as its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.batch import Batch, request_batch
from umm_zoo.callbacks.samples import from_pil
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build
from umm_zoo.generation.requests import Request
from umm_zoo.method import Method
from umm_zoo.training.finished_run import FinishedRun

#: Makes an image of a given edge, in pixels.
Square = Callable[[Image.Image, int], Image.Image]


@dataclass
class Model:
    """Method in evaluation mode, and how image files become its inputs."""

    method: Method
    load_image: Callable[[Path], Tensor]
    device: str

    def batch_of(self, requests: Sequence[Request]) -> Batch:
        """A row per request, on the model's device; a ``UserError`` where a file is no image."""
        images = [[self.load_image(path) for path in request.images] for request in requests]
        return request_batch([request.question for request in requests], images).to(self.device)

    def cannot(self, action: str, capability: type) -> UserError:
        """The error where the method lacks a capability (a protocol of ``umm_zoo.outputs``)."""
        found = f"a {type(self.method).__name__}, which cannot {action}"
        return UserError("", found, f"a method that can ({capability.__module__}.{capability.__name__})")


def load_model(run: FinishedRun, device: str) -> Model:
    """The method of a run with its weights; images become square as in the run's data.

    Where it cannot be built, weights do not fit, or there is no such device, it is a ``UserError``.
    """
    method, data = run.load_method(), run.experiment.data
    backbone = next((module for module in method.children() if isinstance(module, VLMBackbone)), None)
    size = (backbone.image_size if backbone is not None else None) or data.get("image_size")
    resize: Square | None = build(data["resize"], "data.resize") if data.get("resize") else None
    try:
        method.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device; a torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UserError("--device", f"'{device}' ({reason})", "a device of this machine: cpu, cuda, cuda:1 ...") from error
    return Model(method, lambda path: load_image(path, size, resize), device)


def load_image(path: Path, size: int | None, resize: Square | None = None) -> Tensor:
    """An image as ``[3, H, W]`` in [-1, 1]: any file that PIL opens, else a ``UserError``; transparency is laid on white.

    A ``size`` makes it a square of this edge, as ``resize`` does, or by cutting out the centre.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(path, f"no readable image ({type(error).__name__})", "PNG, JPEG, WebP ...") from error
    paper = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(paper, image).convert("RGB")
    if size is not None:
        image = resize(image, size) if resize else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return from_pil(image)
