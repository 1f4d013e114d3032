"""Commands that make images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command
from umm_zoo.generation.options import MAX_SEED, Option, number, size, switch, whole
from umm_zoo.generation.requests import Request, Result

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from umm_zoo.generation.model import Model
    from umm_zoo.outputs import Sampling


def finite_pil(image: Tensor, row: int) -> Image.Image:
    """An image that a method has made, opened.

    Raises:
        UserError: it holds NaN or an infinity, which 8 bits would show as black or white.
    """
    from umm_zoo.generation.tensors import to_pil

    if not image.isfinite().all():
        raise UserError("", "a generated image with NaN or an infinity", "finite numbers", "look at weights and precision", row=row)
    return to_pil(image)


class Reconstruct(Command):
    """Reconstruction of every image from the language model's states."""

    help = "make images again from the language model's states: reconstruct IMAGE ..."
    num_images = (1, 1)
    asks = False
    options = {"seed": whole("of the noise", 0, MAX_SEED, 0)}
    out = "reconstructed"

    def words(self, words: list[str], arguments: argparse.Namespace) -> list[tuple[list[Path], str]]:
        """One request per image."""
        if not words:
            raise UserError("reconstruct", "no image", "reconstruct IMAGE ...")
        return [([Path(word)], "") for word in words]

    def possible(self, method: Any) -> bool:
        """Whether it reconstructs."""
        from umm_zoo.generation.abilities import refused
        from umm_zoo.outputs import Reconstructs

        return isinstance(method, Reconstructs) and "reconstruct" not in refused(method)

    def run(self, model: Model, requests: list[Request]) -> list[Result]:
        """Reconstruct one by one, each from its own seed; beside each image what codec or patches alone would give."""
        from umm_zoo.batch import stacked
        from umm_zoo.outputs import Reconstructs

        if not isinstance(model.method, Reconstructs):
            raise model.cannot("reconstruct images", Reconstructs)
        results = []
        for row, request in enumerate(requests):
            try:
                images = stacked(model.batch_of([request]).images[:1])  # of an image in tiles the overview
                made = model.method.reconstruct(images, request.settings["seed"])
            except UserError as error:
                error.row = row
                raise
            columns = {"round trip": model.method.round_trip(images), "reconstruction": made}
            results.append(Result(request, None, {name: finite_pil(column[0], row) for name, column in columns.items()}))
        return results


class CaptionAndReconstruct(Reconstruct):
    """Likeliest caption of every image, and an image made of it alone."""

    help = "describe images, and make them again from the captions alone: caption-and-reconstruct IMAGE ..."

    def possible(self, method: Any) -> bool:
        """Whether it reconstructs from captions."""
        from umm_zoo.outputs import ReconstructsFromCaptions

        return isinstance(method, ReconstructsFromCaptions)

    def run(self, model: Model, requests: list[Request]) -> list[Result]:
        """A file is described in its own shape, where the model takes any; images of one shape together."""
        from itertools import groupby

        import torch

        from umm_zoo.generation.model import opened
        from umm_zoo.outputs import ReconstructsFromCaptions

        if not self.possible(model.method):
            raise model.cannot("reconstruct images from captions", ReconstructsFromCaptions)
        results: list[Result] = []
        seen = [(request, model.load_shaped(request.images[0])) for request in requests]
        for _, group in groupby(seen, lambda pair: pair[1].shape):
            asked, images = zip(*group, strict=True)
            seeds = [request.settings["seed"] for request in asked]
            captions, made = model.method.reconstruct_from_captions(torch.stack(images).to(model.device), seeds)
            for request, caption, image in zip(asked, captions, made, strict=True):
                again = finite_pil(image, len(results))
                alike = model.similarities(opened(request.images[0]), again)
                results.append(Result(request, caption, {"reconstruction": again}, alike))
        return results


class Generate(Command):
    """Base class of the commands that generate images."""

    out = "generated"
    options = {
        "seed": whole("of the first image of a request", 0, MAX_SEED, 0),
        "num": whole("images per request, seed after seed", 1, 10_000, 1),
        "steps": whole("of the sampler; the run's own where none is said", 1, 1000),
        "guidance": number("how strongly the request is followed; 1 is none; the run's own where none is said", 0, 1000),
        "size": size("in pixels, such as 512 or 512x768; the run's own where none is said", 8192),
    }

    def possible(self, method: Any) -> bool:
        """Whether it generates, and from images where a request has some."""
        from umm_zoo.generation.abilities import refused
        from umm_zoo.outputs import Draws

        return isinstance(method, Draws) and not (self.num_images[1] and "images" in refused(method))

    def run(self, model: Model, requests: list[Request]) -> list[Result]:
        """Generate a batch, see ``results``.

        Where no size is said, what is made of images has the shape of the first one: the size that the run's data gives an image to
        generate of that shape (``Model.target_size``).
        """
        from dataclasses import replace

        from umm_zoo.outputs import Draws, Sampling

        if not isinstance(model.method, Draws):
            raise model.cannot("generate images", Draws)
        own = requests[0].settings
        sampling = Sampling(own["steps"], own["guidance"], own.get("image_guidance"), own["size"])
        sizes = [own["size"] or (model.target_size(request.images[0]) if request.images else None) for request in requests]
        found = dict[int, Result]()
        for shape in dict.fromkeys(sizes):
            rows = [row for row, other in enumerate(sizes) if other == shape]
            try:
                made = self.results(model, [requests[row] for row in rows], replace(sampling, size=shape))
            except UserError as error:
                error.row = None if error.row is None else rows[error.row]
                raise
            found.update(zip(rows, made, strict=True))
        return [found[row] for row in range(len(requests))]

    def results(self, model: Model, requests: list[Request], sampling: Sampling) -> list[Result]:
        """Results of requests of one size; an image depends on its request and seed alone."""
        seeds = [request.settings["seed"] for request in requests]
        images = model.method.generate(model.batch_of(requests), seeds, sampling)
        return [
            Result(request, None, {"generated": finite_pil(image, row)})
            for row, (request, image) in enumerate(zip(requests, images, strict=True))
        ]


class TextToImage(Generate):
    """Images of prompts."""

    help = "make images of prompts: text-to-image PROMPT ..."
    num_images = (0, 0)
    plain_files = True
    may_be_empty = True
    options = {**Generate.options, "think": switch("write about the prompt first, and generate from what was written")}

    def words(self, words: list[str], arguments: argparse.Namespace) -> list[tuple[list[Path], str]]:
        """One per prompt."""
        if not words:
            raise UserError("text-to-image", "no prompt", "text-to-image PROMPT ..., each in quotes")
        return [([], word) for word in words]

    def options_of(self, method: Any) -> dict[str, Option]:
        """Without ``think`` where a method cannot."""
        from umm_zoo.backbones.thoughts import Thinks

        found = super().options_of(method)
        return {name: option for name, option in found.items() if name != "think" or isinstance(method, Thinks)}

    def results(self, model: Model, requests: list[Request], sampling: Sampling) -> list[Result]:
        """As the base class; where it is asked for, the answer is what was written before."""
        from umm_zoo.backbones.thoughts import Thinks
        from umm_zoo.methods.reasoning import told

        if not requests[0].settings.get("think"):
            return super().results(model, requests, sampling)
        if not isinstance(model.method, Thinks):
            raise model.cannot("think before it generates", Thinks)
        batch, seeds = model.batch_of(requests), [request.settings["seed"] for request in requests]
        thoughts = model.method.think(batch, seeds)
        images = model.method.generate(told(batch, thoughts), seeds, sampling)
        results = []
        for row, (request, thought, image) in enumerate(zip(requests, thoughts, images, strict=True)):
            remark = "" if thought.marked else "without the marker of a rewrite: generated from the prompt as it was"
            if not thought.marked and (thought.reply or thought.request == thought.text):
                remark = "without the marker of a rewrite: generated from all of the text"
            made = finite_pil(image, row)
            made.info["thought"] = thought.text
            results.append(Result(request, thought.text, {"generated": made}, remark=remark))
        return results


class Edit(Generate):
    """Image changed as an instruction says."""

    help = "change an image: edit IMAGE INSTRUCTION"
    num_images = (1, 1)
    options = {
        **Generate.options,
        "image_guidance": number("how strongly the image is followed; the run's own where none is said", 0, 1000),
    }

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The image guidance under its former name too."""
        super().add_arguments(parser)
        parser.add_argument("--picture-guidance", dest="image_guidance", help=argparse.SUPPRESS)

    def words(self, words: list[str], arguments: argparse.Namespace) -> list[tuple[list[Path], str]]:
        """One request."""
        if len(words) != 2:
            raise UserError("edit", f"{len(words)} words", "edit IMAGE INSTRUCTION, the instruction in quotes")
        return [([Path(words[0])], words[1])]


class Compose(Generate):
    """Image made of several as an instruction says."""

    help = "make one image of several: compose IMAGE IMAGE ... INSTRUCTION"
    num_images = (2, 1000)

    def words(self, words: list[str], arguments: argparse.Namespace) -> list[tuple[list[Path], str]]:
        """One request."""
        if len(words) < 3:
            expected = "compose IMAGE IMAGE ... INSTRUCTION, the instruction last and in quotes"
            raise UserError("compose", f"{len(words)} words", expected)
        return [([Path(word) for word in words[:-1]], words[-1])]


class Refine(Edit):
    """Image generated again after what it lacks was said, round after round."""

    help = "say what an image lacks of its prompt, and generate it again so: refine IMAGE PROMPT"
    options = {**Edit.options, "rounds": whole("most of them; fewer where nothing is left to change", 1, 100, 1)}

    def words(self, words: list[str], arguments: argparse.Namespace) -> list[tuple[list[Path], str]]:
        """One request."""
        if len(words) != 2:
            raise UserError("refine", f"{len(words)} words", "refine IMAGE PROMPT, the prompt in quotes")
        return [([Path(words[0])], words[1])]

    def possible(self, method: Any) -> bool:
        """Whether it reflects on images."""
        from umm_zoo.backbones.thoughts import Reflects
        from umm_zoo.generation.abilities import refused

        return isinstance(method, Reflects) and not {"images", "refine"} & refused(method)

    def results(self, model: Model, requests: list[Request], sampling: Sampling) -> list[Result]:
        """The image of every round; the answer is what was said before each, a line each."""
        from umm_zoo.backbones.thoughts import Reflects
        from umm_zoo.methods import reasoning

        if not isinstance(model.method, Reflects):
            raise model.cannot("say what an image lacks", Reflects)
        loop, seeds = reasoning.Refine(requests[0].settings["rounds"]), [request.settings["seed"] for request in requests]
        results = []
        for row, rounds in enumerate(loop(model.method, model.batch_of(requests), seeds, sampling)):
            images = {f"round {k}": finite_pil(own.image, row) for k, own in enumerate(rounds, 1) if own.image is not None}
            remark = "" if images else "nothing to change: no image was made"
            results.append(Result(requests[row], "\n".join(own.thought.text for own in rounds), images, remark=remark))
        return results
