"""The contact sheet: what a world's samples look like, with their words, on one page for a human eye."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from umm_zoo.shapes.rendering import render
from umm_zoo.shapes.samples import Sample
from umm_zoo.shapes.scenes import World

_IMAGE = 128
_TEXT_WIDTH = 250
_GAP = 10
_LINE = 14
_CHARACTERS = 40


def contact_sheet(world: World, samples: Sequence[Sample], columns: int = 3) -> Image.Image:
    """Draw samples in a grid, images enlarged without smoothing, so that a pixel of the world is seen as it is.

    Args:
        samples: of any task; the target of an edit stands after its inputs, in a black frame.
        columns: samples side by side.
    """
    slots = max((len(sample.scenes) + (sample.target is not None) for sample in samples), default=1)
    width, height = slots * (_IMAGE + _GAP) + _TEXT_WIDTH + _GAP, _IMAGE + _GAP
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (max(1, columns * width + _GAP), max(1, rows * height + _GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for i, sample in enumerate(samples):
        left, top = _GAP + i % columns * width, _GAP + i // columns * height
        for scene in [*sample.scenes, *([] if sample.target is None else [sample.target])]:
            image = Image.fromarray(render(world, scene)).resize((_IMAGE, _IMAGE), Image.Resampling.NEAREST)
            sheet.paste(image, (left, top))
            if scene is sample.target:
                pen.rectangle((left - 3, top - 3, left + _IMAGE + 2, top + _IMAGE + 2), outline="black", width=2)
            left += _IMAGE + _GAP
        lines = [f"[{sample.row['task']}: {sample.row['kind']}]"]
        for turn in sample.row["conversations"]:
            text = turn["text"].replace("<image>", "").strip()
            lines += textwrap.wrap(text if turn["role"] == "user" else f"> {text}", _CHARACTERS)
        for line, text in enumerate(lines[: _IMAGE // _LINE]):
            pen.text((left, top + line * _LINE), text, fill="dimgrey" if line == 0 else "black", font=font)
    return sheet


def save_contact_sheet(path: Path, world: World, samples: Sequence[Sample]) -> None:
    """Write the contact sheet of some samples as a PNG file."""
    contact_sheet(world, samples).save(path)
