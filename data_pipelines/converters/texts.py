"""Texts of converted samples: turns, their ``<image>`` markers, and what else a row says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from typing import Any

from data_pipelines.converters.rows import texts_in
from data_pipelines.decoding import BadSampleError, parse_json
from umm_zoo.conversation import IMAGE_MARKER, Conversation

_AN_BEFORE = ("hour", "honest", "honour", "honor", "heir")
_A_BEFORE = ("uni", "use", "usu", "euro", "ewe", "one", "once", "ukulele", "utensil")
#: Metrics take names of kinds up to this many bytes.
_LONGEST_NAME = 32
_VIDEO = re.compile(r"(video|audio)s?(_(file|name|path|url)s?)?", re.I)
_FILE = re.compile(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif|npy|mp4|webm|mkv|avi|mov|mp3|wav|flac|ogg|m4a|obj|ply)", re.I)
#: Markers of other media, where a list of conversations puts them: at the beginning or the end of a line.
_MEDIUM = re.compile(r"(?m)(?:^\s*(?=<[a-z_]+>)|(?=<[a-z_]+>\s*$))<(video|audio|speech|sound|music|point|point_?cloud)>")


def keys_of(row: Mapping[str, Any], used: Container[str], is_medium: Callable[[str, str], object]) -> list[str]:
    """Keys of a row, other than those ``used``, with a text that is no text: a video, a sound, an image under another name."""
    others = {key: value for key, value in row.items() if key not in used}
    return [key for key, value in others.items() if any(text and is_medium(key, text) for text in texts_in(value))]


def is_file(_: str, text: str) -> bool:
    """Whether a text is the name of a file, of an image or another medium."""
    return _FILE.fullmatch(text.strip()) is not None


def check_keys(row: Mapping[str, Any], used: Container[str]) -> None:
    """Refuse a row with the file of a video or a sound beside its images, of which it would say less than it does."""
    if others := keys_of(row, used, lambda key, _: _VIDEO.fullmatch(key)):
        raise BadSampleError(f"not of images alone: '{others[0]}'")


def unread_files(row: Mapping[str, Any], used: Container[str]) -> list[str]:
    """What the report says of files that a row names under keys that nobody reads."""
    return [f"file under the key '{key}' that is not converted" for key in keys_of(row, used, is_file)]


def check_media(conversation: Conversation) -> None:
    """Refuse the marker of a medium that is no image, which would be kept as text; an element of HTML has an end, too."""
    for turn in conversation:
        if turn["role"] == "user" and (found := _MEDIUM.search(turn["text"])) and f"</{found[1]}>" not in turn["text"]:
            raise BadSampleError(f"not of images alone: <{found[1]}> in a turn")


def place_markers(conversation: Conversation, images: int) -> list[str]:
    """Change the turns until the user's hold exactly one marker per image, and say what was changed.

    As LLaVA's own loader does, a single marker is moved to the front of its turn; missing ones are added in front of the first user
    turn; markers of several images stay where they are, since the text around them may depend on it.
    """
    repairs = []
    asked = [turn for turn in conversation if turn["role"] == "user"]
    if not asked:
        raise BadSampleError("no user turn")
    for turn in conversation:
        if turn["role"] != "user" and IMAGE_MARKER in turn["text"]:
            turn["text"] = turn["text"].replace(IMAGE_MARKER, "").strip()
            repairs.append(f"{IMAGE_MARKER} outside of user turns removed")
    markers = sum(turn["text"].count(IMAGE_MARKER) for turn in asked)
    if markers > images:
        raise BadSampleError(f"more markers than images: {markers} {IMAGE_MARKER}, {images} images")
    if images == markers == 1:
        turn = next(turn for turn in asked if IMAGE_MARKER in turn["text"])
        moved = f"{IMAGE_MARKER}\n{turn['text'].replace(IMAGE_MARKER, '').strip()}"
        repairs += [f"{IMAGE_MARKER} moved to the front of its turn"] * (turn["text"].strip() != moved)
        turn["text"] = moved
    if markers < images:
        asked[0]["text"] = f"{IMAGE_MARKER}\n" * (images - markers) + asked[0]["text"].strip()
        repairs.append(f"missing {IMAGE_MARKER} added in front")
    return repairs


def without_markers(text: str) -> str:
    """A caption or prompt that cannot be mistaken for one with images in it."""
    return text.replace(IMAGE_MARKER, "").strip()


def from_json(cell: Any) -> Any:
    """The list or object that a text is the JSON of, or the cell itself."""
    if isinstance(cell, str) and cell.strip()[:1] in ("{", "[") and cell.strip()[-1:] in ("}", "]"):
        with suppress(BadSampleError):  # a text in brackets
            return parse_json(cell)
    return cell


def wording(cell: Any, number: int, what: str = "text") -> str:
    """A text, or of several equally good ones the one that the row's number chooses.

    Several are a list, or JSON text as BAGEL's captions are: ``{"0": "…", "1": "…"}``.
    """
    cell = from_json(cell)
    if isinstance(cell, dict):
        cell = list(cell.values())
    if isinstance(cell, list):
        if wrong := [item for item in cell if not isinstance(item, str | None)]:
            raise BadSampleError(f"{what} is a list of something else than texts: {wrong[0]!r:.80}")
        cell = [item for item in cell if item and item.strip()]
    if isinstance(cell, list) and cell:
        cell = cell[number % len(cell)]
    if not isinstance(cell, str) or not cell.strip():
        raise BadSampleError(f"empty {what}: {cell!r}"[:200])
    return cell.strip()


def with_article(noun: str) -> str:
    """``noun`` with "a" or "an", by its sound as far as spelling tells."""
    word = noun.lower()
    vowel = word.startswith(_AN_BEFORE) or (word[:1] in tuple("aeiou") and not word.startswith(_A_BEFORE))
    return f"{'an' if vowel else 'a'} {noun}"


def notes(row: Mapping[str, Any], used: Container[str | None], longest: int | None = None) -> dict[str, Any]:
    """The plain values of a row that a sample keeps beside what is ``used`` otherwise: numbers, and texts up to ``longest``.

    A number that is not finite becomes null: data frames write NaN where there was nothing, and JSON has no such number.
    """
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
        if name not in used
        and (isinstance(value, int | float) or (isinstance(value, str) and (longest is None or len(value) <= longest)))
    }


def is_name(value: object) -> bool:
    """Whether a value can be the kind or the task of a sample."""
    return isinstance(value, str) and 0 < len(value.strip().encode()) <= _LONGEST_NAME


def task_and_kind(row: Mapping[str, Any], task: str, kind: str) -> dict[str, Any]:
    """``task`` and ``kind`` of a sample: the row's own where it has them, else these; others of its own become ``row_kind``."""
    own = {name: row[name] for name in ("task", "kind") if name in row}
    taken = {name: value.strip() for name, value in own.items() if is_name(value)}
    return {"task": task, "kind": kind, **taken, **notes({f"row_{name}": own[name] for name in own.keys() - taken}, ())}
