"""Requests to a method from Python: images and texts in, texts and images out, as ``python -m umm_zoo.generate`` makes them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import LightningModule

from umm_zoo.errors import UserError
from umm_zoo.generation.answering import Ask, Caption
from umm_zoo.generation.generating import Compose, Edit, Refine, TextToImage
from umm_zoo.generation.options import settings_in, whole
from umm_zoo.generation.requests import Request, Result
from umm_zoo.generation.run_data import RunData

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from umm_zoo.batch import Images
    from umm_zoo.generation.base import Command


class CannotGenerateError(UserError, AttributeError):
    """The error of a method that has no ``generate``: to whoever looks for the capability the attribute is not there."""


class FromPython(LightningModule):
    """Mixin of methods: requests from Python, as ``python -m umm_zoo.generate`` answers them at equal seeds and settings.

    An image is a path, an opened image, or a tensor ``[3, H, W]`` (floats in [-1, 1], or bytes), of any size: it is brought to what
    the run's data makes of images. Tensors are taken in 8 bits, as files are. A text alone is one request and gives one result; a
    list of texts (of images, where there is no text) is a batch and gives a list. Generated images are PIL's.

        model = Method.load("runs/wemmu/toy/stage4")
        model.ask("one.png", "What colour is the circle?")
        model.generate("top left: a small red circle", n=4, seed=3)

    Settings are those of the command, None being the run's own; errors are a ``UserError`` of one line.

    Attributes:
        run_data: what the run's data makes of images; ``Method.load`` says it.
    """

    run_data: RunData = RunData()

    if TYPE_CHECKING:
        generate: Callable[..., Any]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let the ``generate`` of a subclass (``outputs.Draws``) take texts too."""
        super().__init_subclass__(**keywords)
        if "generate" in vars(cls):
            cls.generate = _takes_texts(cls.generate)

    def __getattr__(self, name: str) -> Any:
        if name == "generate":
            from umm_zoo.generation.abilities import lacking

            raise CannotGenerateError("", lacking(self, "generate images", "umm_zoo.outputs.Draws").problems)
        return super().__getattr__(name)

    @property
    def refuses(self) -> frozenset[str]:
        """What its capabilities do not take, so that nobody is offered it.

        Settings by name (``steps``, ``size`` …), ``images`` where images are generated from words alone, and ``reconstruct``.
        """
        return frozenset()

    def use_data_of(self, experiment: Mapping[str, Any], source: str | Path, trust: Sequence[str] = ()) -> None:
        """Bring images to what the data of an experiment makes of them."""
        self.run_data = RunData.of(experiment.get("data") or {}, source, trust)

    def ask(
        self,
        image: Any,
        question: str | Sequence[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        top_p: float = 1.0,
    ) -> Any:
        """The answer to a question about an image, about several (a list), or about none (None).

        A list of questions gives a list of answers: about the same image, or with as many entries in the list of images.
        """
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        found = [one.answer for one in self._asked(Ask(), _rows(image, question), settings, batch_size)]
        return found[0] if isinstance(question, str) else found

    def caption(
        self,
        image: Any,
        prompt: str = "Describe the image.",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        top_p: float = 1.0,
    ) -> Any:
        """The description of an image, or those of a list of images."""
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        rows = [([one], prompt) for one in _images(image)]
        found = [one.answer for one in self._asked(Caption(), rows, settings, batch_size)]
        return found if _is_list(image) else found[0]

    def edit(
        self,
        image: Any,
        instruction: str | Sequence[str],
        n: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
        size: Any = None,
        batch_size: int = 16,
    ) -> Any:
        """An image changed as an instruction says, or made of several (a list); see ``ask`` for lists, ``generate`` for ``n``."""
        settings = {"n": n, "seed": seed, "steps": steps, "guidance": guidance, "image_guidance": image_guidance, "size": size}
        rows = _rows(image, instruction)
        if none := [text for shown, text in rows if not shown]:
            raise UserError("image", f"none for '{none[0]}'", "an image to change", "generate makes images of texts alone")
        found = [self._generated(Edit() if len(shown) == 1 else Compose(), [(shown, text)], settings, 1) for shown, text in rows]
        return found[0][0] if isinstance(instruction, str) else [one for (one,) in found]

    def refine(
        self,
        image: Any,
        prompt: str,
        rounds: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
    ) -> tuple[str, list[Any]]:
        """What an image lacks of a prompt, a line for each round, and the images generated so, none where nothing is to change."""
        settings = {"rounds": rounds, "seed": seed, "steps": steps, "guidance": guidance, "image_guidance": image_guidance}
        (result,) = self._asked(Refine(), [(_images(image), prompt)], {**settings, "size": None}, 1)
        return result.answer or "", list(result.images.values())

    def features(self, image: Any) -> Any:
        """What the method's network makes of an image, or of each in a list: see ``image_features``."""
        import torch

        from umm_zoo.backbones.prefix import evaluation_mode
        from umm_zoo.generation.model import Model

        model = Model.of(self, self.run_data, str(self.device))
        with torch.no_grad(), evaluation_mode(self):
            found = []
            for one in _images(image):
                made = self.image_features([part.to(model.device) for part in model.load_images(one)])
                found.append(made[0] if len(made) == 1 else torch.cat(made))
        return found if _is_list(image) else found[0]

    def image_features(self, images: Images) -> list[Tensor]:
        """Features of M prepared images, of the first of these that the method has as a part of its own; override it for others.

        A ``FeatureEncoder``: its vector ``[F]``; a vision-language model: tokens ``[N, D]`` as they enter the language model; a
        codec: the latent ``[C, h, w]``.

        Raises:
            UserError: it has none of them.
        """
        from umm_zoo.generation.abilities import features_of_parts

        return features_of_parts(self, images)

    # -- what stands behind them ---------------------------------------------------------------------------------------------

    def _from_texts(
        self,
        prompts: str | Sequence[str],
        n: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: Any = None,
        batch_size: int = 16,
        think: bool = False,
    ) -> Any:
        """``generate`` of texts: an image of a prompt, or a list of ``n``, seed after seed; of a list of prompts a list of these.

        Args:
            prompts: a text, or a list of them.
            n: images of each prompt; None is one, alone and not in a list.
            seed: of the first image of each prompt.
            steps, guidance: of the sampler.
            size: side in pixels, ``(height, width)`` or ``"HxW"``.
            batch_size: prompts at a time.
            think: write about each prompt first, and generate from what was written, which ``image.info["thought"]`` holds.
        """
        settings = {"n": n, "seed": seed, "steps": steps, "guidance": guidance, "size": size, "think": think}
        found = self._generated(TextToImage(), _rows(None, prompts), settings, batch_size)
        return found[0] if isinstance(prompts, str) else found

    def _generated(
        self, command: Command, rows: Sequence[tuple[list[Any], str]], settings: dict[str, Any], batch_size: int
    ) -> list[Any]:
        """Of each row an image, or a list of n."""
        count, size = settings.pop("n"), settings.pop("size")
        if isinstance(size, tuple | list):
            size = "x".join(map(str, size))
        settings |= {"num": 1 if count is None else count, "size": size}
        if "image_guidance" not in command.options and settings.pop("image_guidance", None) is not None:
            raise UserError("image_guidance", "a scale for several images", "one input image")
        results = self._asked(command, rows, settings, batch_size)
        images: list[Image.Image] = [image for result in results for image in result.images.values()]
        return images if count is None else [images[start : start + count] for start in range(0, len(images), count)]

    def _asked(
        self, command: Command, rows: Sequence[tuple[list[Any], str]], settings: Mapping[str, Any], batch_size: int
    ) -> list[Result]:
        """Results of rows under settings, which are checked as those of the command line."""
        from umm_zoo.backbones.prefix import evaluation_mode
        from umm_zoo.generation.model import Model
        from umm_zoo.generation.running import run_batch

        called = {"num": "n"}  # here
        own = settings_in({name: command.options[name] for name in settings}, settings, lambda name: called.get(name, name))
        batch_size = whole("", 1, 100_000).read(batch_size, "batch_size")
        requests = [
            request
            for place, (images, text) in enumerate(rows)
            for request in Request(images, text, own, f"request {place}" if len(rows) > 1 else "").seed_after_seed()
        ]
        for request in requests:
            command.check(request, "text")
        model = Model.of(self, self.run_data, str(self.device))
        with evaluation_mode(self):
            return [result for some in model.batches(requests, batch_size) for result in run_batch(model, command, some)]


def _takes_texts(own: Callable[..., Any]) -> Callable[..., Any]:
    """A ``generate`` that takes a batch of requests as before, and texts as ``FromPython._from_texts``."""

    @functools.wraps(own)
    def generate(self: Any, *arguments: Any, **keywords: Any) -> Any:
        first = arguments[0] if arguments else keywords.get("prompts")
        return (
            self._from_texts(*arguments, **keywords) if isinstance(first, str | list | tuple) else own(self, *arguments, **keywords)
        )

    return generate


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4


def _images(value: Any) -> list[Any]:
    """The images of one, of a list of them, or of none."""
    return [] if value is None else [_opened(one) for one in value] if _is_list(value) else [_opened(value)]


def _opened(image: Any) -> Path | Image.Image:
    """An image of a user as an upright RGB one.

    Raises:
        UserError: it is none.
    """
    from PIL import Image

    from umm_zoo.generation.images import on_white, open_image
    from umm_zoo.generation.tensors import tensor_image

    if isinstance(image, str | os.PathLike):
        return open_image(Path(image))
    if isinstance(image, Image.Image):
        try:
            return on_white(image)
        except ValueError as error:
            raise UserError("image", f"one that cannot be used ({error})", "an 8-bit image") from error
    return tensor_image(image)


def _rows(images: Any, texts: str | Sequence[str]) -> list[tuple[list[Any], str]]:
    """(images, text) of each request.

    Raises:
        UserError: what should be texts is none, or there are as many images as texts neither.
    """
    if isinstance(texts, str):
        return [(_images(images), texts)]
    if not isinstance(texts, list | tuple):
        raise UserError("text", f"a {type(texts).__name__}", "a text, or a list of them")
    if not _is_list(images):
        shared = _images(images)
        return [(shared, text) for text in texts]
    if len(images) != len(texts):
        raise UserError("image", f"{len(images)} in a list for {len(texts)} texts", "one image for all, or a list of as many")
    return [(_images(own), text) for own, text in zip(images, texts, strict=True)]
