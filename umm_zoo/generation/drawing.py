"""Verbs that draw."""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from umm_zoo.errors import Problem, UserError
from umm_zoo.generation.base import Model, Request, Result, Verb, read_requests


class Reconstruct(Verb):
    """Every image drawn again from what the language model makes of it."""

    help = "draw images again from the language model's states: reconstruct IMAGE ..."
    needs = "reconstruct"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The noise it starts from."""
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
        parser.set_defaults(out="reconstructed")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request per image."""
        if not words:
            raise UserError("reconstruct", [Problem("", "no image", "reconstruct IMAGE ...")])
        return [Request([Path(word)], "") for word in words]

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The first image of each line."""
        return read_requests(file, "")

    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Draw a batch, and beside each what codec or patches alone would give."""
        import torch

        from umm_zoo.callbacks.samples import to_pil

        method: Any = model.method
        images = torch.stack([model.load_image(request.images[0]) for request in requests]).to(model.device)
        generator = torch.Generator(model.device).manual_seed(arguments.seed)
        drawn = {"round trip": method.round_trip(images), "reconstruction": method.reconstruct(images, generator)}
        return [
            Result(request, None, {name: to_pil(column[row]) for name, column in drawn.items()})
            for row, request in enumerate(requests)
        ]


class Draw(Verb):
    """What the verbs have in common that draw what a request asks for."""

    needs = "draw_queries"
    deed = "draw what is asked"
    #: The method's guidance scale that ``--guidance`` sets.
    scale: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How the images are drawn."""
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first image of a request (default: 0)")
        parser.add_argument("--num", type=int, default=1, metavar="N", help="images per request, seed after seed (default: 1)")
        parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the run's own)")
        parser.add_argument("--guidance", type=float, metavar="X", help=f"scale '{self.scale}'; 1 is none (default: the run's own)")
        parser.add_argument("--size", metavar="HxW", help="in pixels, such as 512 or 512x768 (default: the run's own)")
        parser.set_defaults(out="drawn")

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """A request per line, several times where several images are wanted."""
        return several(read_requests(file), arguments)

    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Draw a batch; an image depends on its request and seed alone."""
        from umm_zoo.callbacks.samples import to_pil
        from umm_zoo.methods.bridge import drawing_batch

        method: Any = model.method
        images = [[model.load_image(path) for path in request.images] for request in requests]
        batch = drawing_batch([request.question for request in requests], images).to(model.device)
        seeds = [request.seed for request in requests]
        guidance = self.guidance(copy.copy(method.guidance), arguments)
        drawn = method.draw(batch, seeds, arguments.steps, guidance, size_of(arguments.size))
        return [Result(request, None, {"drawn": to_pil(image)}) for request, image in zip(requests, drawn, strict=True)]

    def guidance(self, own: Any, arguments: argparse.Namespace) -> Any:
        """The method's own scales, but for those stated."""
        if arguments.guidance is not None:
            setattr(own, self.scale, arguments.guidance)
        return own


class TextToImage(Draw):
    """Images of prompts."""

    help = "draw prompts: text-to-image PROMPT ..."
    scale = "text"

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One per prompt."""
        if not words:
            raise UserError("text-to-image", [Problem("", "no prompt", "text-to-image PROMPT ..., each in quotes")])
        return several([Request([], word) for word in words], arguments)

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """A prompt per line of a plain text file, or requests of a JSONL file."""
        if file.suffix != ".txt":
            return super().read(file, arguments)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(file, f"found no readable file ({error.strerror}), expected a text file") from error
        return several([Request([], line.strip()) for line in lines if line.strip()], arguments)


class Edit(Draw):
    """An image changed as an instruction says."""

    help = "change an image: edit IMAGE INSTRUCTION"
    scale = "edit"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The second scale of the three-term form."""
        super().add_arguments(parser)
        parser.add_argument("--image-guidance", type=float, metavar="X", help="scale 'reconstruction' (default: the run's own)")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request."""
        if len(words) != 2:
            raise UserError("edit", [Problem("", f"{len(words)} words", "edit IMAGE INSTRUCTION, the instruction in quotes")])
        return several([Request([Path(words[0])], words[1])], arguments)

    def guidance(self, own: Any, arguments: argparse.Namespace) -> Any:
        """Both scales."""
        if arguments.image_guidance is not None:
            own.reconstruction = arguments.image_guidance
        return super().guidance(own, arguments)


class Compose(Draw):
    """An image made of several as an instruction says."""

    help = "make one image of several: compose IMAGE IMAGE ... INSTRUCTION"
    scale = "composition"

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request."""
        if len(words) < 3:
            expected = "compose IMAGE IMAGE ... INSTRUCTION, the instruction last and in quotes"
            raise UserError("compose", [Problem("", f"{len(words)} words", expected)])
        return several([Request([Path(word) for word in words[:-1]], words[-1])], arguments)


def several(requests: list[Request], arguments: argparse.Namespace) -> list[Request]:
    """Each request as often as asked for, seed after seed."""
    return [replace(request, seed=arguments.seed + number) for request in requests for number in range(arguments.num)]


def size_of(text: str | None) -> tuple[int, int] | None:
    """``512`` or ``512x768`` as height and width.

    Raises:
        ValueError: neither.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise ValueError(f"--size: found '{text}', expected 512 or 512x768")
    return int(sides[0]), int(sides[-1])
