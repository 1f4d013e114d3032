"""Pieces of a page that opens from the disk: styles, scripts and images are inside it, and every text is escaped."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from umm_zoo.checkpoints.plain_files import strict_json
from umm_zoo.errors import UserError, printable
from umm_zoo.generation.images import open_image

STATIC = Path(__file__).parent / "static"


#: What a page may load: nothing but what is in it.
RULE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

#: Elements that hold nothing and have no end.
_EMPTY = ("img", "input", "meta")


class Markup(str):
    """Text that is HTML already."""


def text(value: Any) -> Markup:
    """A value as escaped text in one line; ``Markup`` stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(str(value))))


def block(value: str) -> Markup:
    """Lines of plain text as they stand: a file, a prompt."""
    return Markup("\n".join(text(line) for line in value.splitlines()))


def element(tag: str, /, *inside: Any, **attributes: Any) -> Markup:
    """One element; a trailing underscore of an attribute's name is left out, others become hyphens, and None leaves it out."""
    given = {key.rstrip("_").replace("_", "-"): html.escape(str(value)) for key, value in attributes.items() if value is not None}
    start = "".join([tag, *(f' {key}="{value}"' for key, value in given.items())])
    return Markup(f"<{start}>" + ("" if tag in _EMPTY else f"{''.join(map(text, inside))}</{tag}>"))


def number(value: float | None) -> str:
    """Four digits; ``none`` for what is no number."""
    if value is None or not isinstance(value, int | float) or math.isnan(value):
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(rows: Iterable[Sequence[Any]], head: Sequence[Any] = ()) -> Markup:
    """A table that scrolls by itself where the page is narrow; numbers are set flush right."""
    lines = [element("tr", *(element("th", cell, scope="col") for cell in head))] if head else []
    for row in rows:
        lines.append(element("tr", *(_cell(cell) for cell in row)))
    return element("div", element("table", *lines), class_="scroll", tabindex="0")


def _cell(value: Any) -> Markup:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return element("td", number(value), class_="number")
    return element("td", "" if value is None else value)


def folded(summary: Any, *inside: Any) -> Markup:
    """Something that opens on a click."""
    return element("details", element("summary", summary), *inside)


def command(line: str) -> Markup:
    """A command line with a button that copies it."""
    return element("div", element("code", line), element("button", "copy", type="button", data_copy=line), class_="command")


@lru_cache(maxsize=256)
def _stored(file: Path, changed: float, side: int, small: int) -> str:
    image = open_image(file)
    if max(image.size) <= small:  # pixel by pixel: a blur would hide what is there
        times = max(1, small // max(image.size))
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    elif max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, options = ("PNG", {}) if max(image.size) <= small else ("WEBP", {"quality": 80, "method": 2})
    stored = io.BytesIO()
    image.save(stored, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stored.getvalue()).decode()}"


def embedded(file: Path, side: int = 1600, small: int = 0) -> str:
    """An image file as an address that holds it, at most ``side`` pixels; made once while the file stays as it is.

    Args:
        file: the image.
        side: longest side that is kept.
        small: images up to this many pixels are enlarged to it, pixel by pixel.

    Raises:
        UserError: the file is no image.
    """
    return _stored(file, file.stat().st_mtime, side, small)


def embedded_if_sound(file: Path, side: int = 1600) -> str | None:
    """As ``embedded``; None where the file is damaged, or no longer there."""
    try:
        return embedded(file, side)
    except (UserError, OSError):
        return None


def data(value: Any, id_: str) -> Markup:
    """Plain values for the page's script; nothing in them can end the element."""
    inside = strict_json(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return element("script", Markup(inside), type="application/json", id=id_)


def page(title: str, *parts: Any, scripts: Sequence[str] = ()) -> str:
    """A whole page.

    Args:
        title: of the window.
        parts: of the body.
        scripts: names of files beside the style, put into the page.
    """
    sight = [element("meta", charset="utf-8"), element("meta", name="viewport", content="width=device-width, initial-scale=1")]
    rule = element("meta", http_equiv="Content-Security-Policy", content=RULE)
    style = element("style", Markup(static("page.css")))
    own = [element("script", Markup(static(name))) for name in scripts]
    head = element("head", *sight, rule, element("title", title), style)
    return f'<!doctype html>\n<html lang="en">{head}{element("body", element("main", *parts), *own)}</html>\n'


@lru_cache(maxsize=8)
def static(name: str) -> str:
    """A file of the folder ``static``."""
    return (STATIC / name).read_text(encoding="utf-8")
