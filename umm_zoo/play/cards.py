"""Results as HTML: every text is escaped, images are addresses of the playground itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from umm_zoo.errors import printable
from umm_zoo.play.commands import RunWords
from umm_zoo.play.following import Training
from umm_zoo.play.history import INPUTS, Entry
from umm_zoo.report.html import Markup, element, folded, text

#: Pixels of the longest side up to which an image is shown without a blur.
SMALL = 256
#: Where the playground's own addresses begin.
ROOT = "/play"


def file_address(run: int, call: str, name: str) -> str:
    """Address of a file in the history of the page's run of this number."""
    return f"{ROOT}/file/{run}/{quote(call)}/{quote(name)}"


def lines(value: str) -> Markup:
    """A text as it stands, with its line breaks."""
    return Markup("\n".join(text(printable(line)) for line in value.split("\n")))


def command(line: str) -> Markup:
    """A command line as it stands, with a button that copies it."""
    return element("div", element("code", lines(line)), element("button", "copy", type="button", data_copy=line), class_="command")


def result_card(entry: Entry, run: int, words: RunWords) -> Markup:
    """A result: the image large, the answer, what it was made with, the command, the way to the file."""
    call, row = entry.folder.name, entry.row
    parts: list[Markup] = []
    names = [Path(path).stem.partition("-")[2].replace("-", " ") for path in entry.images]
    for path, name in zip(entry.images, names, strict=True):
        shown = image_link(file_address(run, call, path.name), name, row)
        caption = element("figcaption", name) if len(names) > 1 else ""
        parts.append(element("figure", shown, caption))
    images = [element("div", *parts, class_="made")] if parts else []
    answer = [element("div", lines(row["answer"] or ""), class_="answer")] if row.get("answer") is not None else []
    alike = row.get("similarities") or {}
    similar = [element("div", "alike: " + ", ".join(f"{name} {value:.3f}" for name, value in alike.items()), class_="faint")]
    saved = [
        element("a", f"download{f' {name}' if len(names) > 1 else ''}", href=file_address(run, call, path.name), download=file)
        for path, name in zip(entry.images, names, strict=True)
        for file in [f"{call}-{path.name}"]
    ]
    below = element("div", *saved, element("span", settings_line(entry)), class_="facts faint")
    return element("article", *images, *answer, *(similar if alike else []), below, command(entry.line(words)), class_="result")


def image_link(address: str, name: str, row: Mapping[str, Any]) -> Markup:
    """An image that opens by itself on a click."""
    return element("a", element("img", src=address, alt=name, class_=_sharp(row)), href=address, target="_blank", rel="noopener")


def _sharp(row: Mapping[str, Any]) -> str | None:
    """Class of images so small that their pixels are to be seen as they are."""
    sides = [int(side) for side in str(row.get("size", "")).split("x") if side.isdecimal()]
    return "small" if sides and max(sides) <= SMALL else None


def settings_line(entry: Entry) -> str:
    """What it was made with, in words."""
    known = [f"{name.replace('_', ' ')} {value}" for name, value in entry.settings().items()]
    return ", ".join([*known, f"{entry.row.get('seconds', 0)} s"])


def history_card(entry: Entry, run: int, name: str, words: RunWords) -> Markup:
    """One line of the history, with its images small and its command folded."""
    call, row = entry.folder.name, entry.row
    addresses = [*((INPUTS, path.name) for path in entry.inputs), *((call, path.name) for path in entry.images)]
    images = [image_link(file_address(run, place, file), file, row) for place, file in addresses]
    head = element("div", element("b", row["command"]), f" {row.get('time', '')}, {name}", class_="faint")
    asked = element("div", lines(row["question"]), class_="asked") if row["question"] else Markup("")
    answer = element("div", lines(row["answer"]), class_="answer") if row.get("answer") else Markup("")
    saved = [
        element("a", "download", href=file_address(run, call, path.name), download=f"{call}-{path.name}")
        for path in entry.images[-1:]
    ]
    below = element("div", *saved, element("span", settings_line(entry)), class_="facts faint")
    inside = element("div", head, asked, answer, below, folded("command", command(entry.line(words))), class_="told")
    return element("article", element("div", *images, class_="thumbs"), inside, class_="entry")


def error_card(problems: Sequence[str]) -> Markup:
    """Lines of a user error."""
    return element("div", *(element("div", line) for line in problems), class_="wrong", role="alert")


def training_card(training: Training, name: str) -> Markup:
    """State, steps, command and last lines of a training."""
    share = min(1.0, training.steps / training.max_steps) if training.max_steps else 0.0
    steps = f"{training.steps:,} of {training.max_steps:,} steps" if training.max_steps else f"{training.steps:,} steps"
    head = element("div", element("b", name), " ", element("span", training.state, class_=f"state {training.state}"), f" {steps}")
    bar = element("progress", max="1", value=f"{share:.4f}") if training.max_steps else Markup("")
    elsewhere = "" if training.ours else "not started from a page: its output stands in its own terminal"
    said = element("pre", lines("\n".join(training.lines))) if training.lines else element("div", elsewhere, class_="faint")
    return element("div", head, bar, said, command(training.command) if training.command else "", class_="training")


def page_frame(address: str) -> Markup:
    """The page of a run, in a frame that can neither see nor touch the playground."""
    return element("iframe", src=address, sandbox="allow-scripts", title="page of the run", loading="lazy")
