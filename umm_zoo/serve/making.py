"""Requests of ``/v1/images/generations`` and ``/v1/images/edits``. Nothing here imports torch."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from umm_zoo.errors import UserError
from umm_zoo.generation import COMMANDS
from umm_zoo.generation.base import Command
from umm_zoo.generation.options import shown, whole
from umm_zoo.generation.requests import Request, Result
from umm_zoo.serve.image_data import Images
from umm_zoo.serve.limits import Limits
from umm_zoo.serve.parameters import check_names, flag_in, option_in, rows_of, seed_in, word_in

if TYPE_CHECKING:
    from PIL import Image

KNOWN = frozenset(
    {"model", "prompt", "n", "size", "response_format", "output_format", "output_compression", "seed", "steps", "guidance"}
    | {"quality", "style", "stream", "input_fidelity"}
)
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_FORMATS = ("png", "jpeg", "webp")


@dataclass
class Making:
    """A request for ``n`` images.

    Args:
        command: what makes them.
        rows: a request of the run for each.
        format: of the files.
        quality: of JPEG and WebP, 0 to 100.
        num_bytes: memory that the images sent take.
        ignored: names of parameters that were passed over.
    """

    command: Command
    rows: list[Request]
    format: str
    quality: int
    num_bytes: int
    ignored: list[str]

    def file(self, image: Image.Image) -> str:
        """A file of an image as base64; a PNG has the bytes that ``umm_zoo.generate`` writes."""
        stored = io.BytesIO()
        image.save(stored, self.format, **({} if self.format == "png" else {"quality": self.quality}))
        return base64.b64encode(stored.getvalue()).decode()

    def answer(self, results: Sequence[Result], created: int) -> dict[str, Any]:
        """The JSON of the images."""
        made = [image for result in results for image in result.images.values()]
        thoughts = [{} if result.answer is None else {"revised_prompt": result.answer} for result in results]
        rows = zip(self.rows, made, thoughts, strict=True)
        data = [{"b64_json": self.file(image), "seed": row.settings["seed"], **thought} for row, image, thought in rows]
        size = f"{made[0].width}x{made[0].height}"
        return {"created": created, "data": data, "output_format": self.format, "size": size}


def read_making(body: Mapping[str, Any], files: Sequence[bytes] | None, limits: Limits) -> Making:
    """The request that a body is: an image of a text, or of ``files`` of images; a ``UserError`` where it cannot be one."""
    images = Images(limits)
    for place, file in enumerate(files or ()):
        images.from_bytes(file, f"image[{place}]")
    if files is not None and not files:
        raise UserError("image", "none", "an image, or several")
    command = COMMANDS["text-to-image" if files is None else "edit" if len(files) == 1 else "compose"]
    own = [name for name in command.options if name != "num"]
    ignored = check_names(body, KNOWN | set(own))
    ignored += [name for name in ("quality", "style", "input_fidelity") if body.get(name) not in (None, "auto")]
    if flag_in(body, "stream"):
        raise UserError("stream", "true", "false: images come when they are done")
    word_in(body, "response_format", ("b64_json",))
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise UserError("prompt", shown(prompt), "a text")
    if len(prompt) > limits.max_prompt:
        raise UserError("prompt", f"{len(prompt)} characters", f"at most {limits.max_prompt} (--max-prompt)")
    settings = {name: option_in(body, name, command.options[name]) for name in own if name not in ("size", "seed")}
    settings = {name: value for name, value in settings.items() if value is not None or not command.options[name].switch}
    settings |= {"seed": seed_in(body), "num": option_in(body, "n", whole("", 1, limits.max_n, 1))}
    settings["size"] = _size(body, command, limits)
    if (settings["steps"] or 0) > limits.max_steps:
        raise UserError("steps", f"{settings['steps']}", f"at most {limits.max_steps} (--max-steps)")
    request = Request(images.opened, prompt, settings)
    command.check(request, "prompt")
    quality = option_in(body, "output_compression", whole("", 0, 100, 95))
    return Making(
        command, rows_of(request, "request"), word_in(body, "output_format", _FORMATS), quality, images.num_bytes, ignored
    )


def _size(body: Mapping[str, Any], command: Command, limits: Limits) -> tuple[int, int] | None:
    """Height and width of what is to be made; None is the run's own. OpenAI's sizes are width x height."""
    size = body.get("size")
    if size in (None, "auto"):
        return None
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if not found:
        raise UserError("size", shown(size), "auto, or width x height in pixels such as 768x512")
    height, width = command.options["size"].read(f"{found[2]}x{found[1]}", "size")
    if height * width > limits.max_made:
        raise UserError("size", f"{width}x{height}", f"at most {limits.max_made} pixels (--max-made)")
    return height, width


def check_settings(making: Making, method: object) -> None:
    """Refuse settings that mean nothing to a method.

    Raises:
        UserError: names one.
    """
    known = making.command.options_of(method)
    for name, value in making.rows[0].settings.items():
        if value is not None and name not in known:
            found = f"{value[1]}x{value[0]}" if name == "size" else shown(value)
            raise UserError(name, found, f"none: a {type(method).__name__} has no such setting")
