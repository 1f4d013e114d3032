"""Commands that make images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command
from umm_zoo.generation.requests import Request, Result, read_lines, read_requests

if TYPE_CHECKING:
    from umm_zoo.generation.model import Model


class Reconstruct(Command):
    """Reconstruction of every image from the language model's states."""

    help = "make images again from the language model's states: reconstruct IMAGE ..."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The noise it starts from."""
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
        parser.set_defaults(out="reconstructed")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request per image."""
        if not words:
            raise UserError("reconstruct", "no image", "reconstruct IMAGE ...")
        return [Request([Path(word)], "") for word in words]

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The first image of each line."""
        return [replace(request, images=request.images[:1]) for request in read_requests(file, "")]

    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Reconstruct a batch; beside each image what codec or patches alone would give."""
        from umm_zoo.callbacks.samples import to_pil
        from umm_zoo.outputs import Reconstructs

        if not isinstance(model.method, Reconstructs):
            raise model.cannot("reconstruct images", Reconstructs)
        images = model.batch_of(requests).images
        assert images is not None  # one per request
        made = {"round trip": model.method.round_trip(images), "reconstruction": model.method.reconstruct(images, arguments.seed)}
        rows = [{name: to_pil(column[row]) for name, column in made.items()} for row in range(len(requests))]
        return [Result(request, None, row) for request, row in zip(requests, rows, strict=True)]


class Generate(Command):
    """Base class of the commands that generate images."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Sampling settings of the images."""
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first image of a request (default: 0)")
        parser.add_argument("--num", type=int, default=1, metavar="N", help="images per request, seed after seed (default: 1)")
        parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the run's own)")
        followed = "how strongly the request is followed; 1 is none (default: the run's own)"
        parser.add_argument("--guidance", type=float, metavar="X", help=followed)
        parser.add_argument("--size", metavar="HxW", help="in pixels, such as 512 or 512x768 (default: the run's own)")
        parser.set_defaults(out="generated", image_guidance=None)

    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Generate a batch; an image depends on its request and seed alone."""
        from umm_zoo.callbacks.samples import to_pil
        from umm_zoo.outputs import Draws, Sampling

        if not isinstance(model.method, Draws):
            raise model.cannot("generate images", Draws)
        sampling = Sampling(arguments.steps, arguments.guidance, arguments.image_guidance, size_of(arguments.size))
        images = model.method.generate(model.batch_of(requests), [request.seed for request in requests], sampling)
        return [Result(request, None, {"generated": to_pil(image)}) for request, image in zip(requests, images, strict=True)]


class TextToImage(Generate):
    """Images of prompts."""

    help = "make images of prompts: text-to-image PROMPT ..."

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One per prompt."""
        if not words:
            raise UserError("text-to-image", "no prompt", "text-to-image PROMPT ..., each in quotes")
        return [Request([], word) for word in words]

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """A prompt per line of a plain text file, or requests of a JSONL file."""
        if file.suffix != ".txt":
            return super().read(file, arguments)
        lines = read_lines(file, "a text file")
        return [Request([], line.strip()) for line in lines if line.strip()]


class Edit(Generate):
    """Image changed as an instruction says."""

    help = "change an image: edit IMAGE INSTRUCTION"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The second scale of the three-term form."""
        super().add_arguments(parser)
        followed = "how strongly the image is followed (default: the run's own)"
        parser.add_argument("--image-guidance", type=float, metavar="X", help=followed)
        parser.add_argument("--picture-guidance", type=float, dest="image_guidance", help=argparse.SUPPRESS)  # its former name

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request."""
        if len(words) != 2:
            raise UserError("edit", f"{len(words)} words", "edit IMAGE INSTRUCTION, the instruction in quotes")
        return [Request([Path(words[0])], words[1])]


class Compose(Generate):
    """Image made of several as an instruction says."""

    help = "make one image of several: compose IMAGE IMAGE ... INSTRUCTION"

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request."""
        if len(words) < 3:
            expected = "compose IMAGE IMAGE ... INSTRUCTION, the instruction last and in quotes"
            raise UserError("compose", f"{len(words)} words", expected)
        return [Request([Path(word) for word in words[:-1]], words[-1])]


def size_of(text: str | None) -> tuple[int, int] | None:
    """``512`` or ``512x768`` as height and width; a ``UserError`` where the text is neither."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise UserError("--size", f"'{text}'", "512 or 512x768")
    return int(sides[0]), int(sides[-1])
