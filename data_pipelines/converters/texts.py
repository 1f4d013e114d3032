"""Texts of converted samples: turns, their ``<image>`` markers, and what else a row says."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from data_pipelines.decoding import BadSampleError
from umm_zoo.conversation import IMAGE_MARKER, Conversation

_AN_BEFORE = ("hour", "honest", "honour", "honor", "heir")
_A_BEFORE = ("uni", "use", "usu", "euro", "ewe", "one", "once", "ukulele", "utensil")


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


def wording(cell: Any, number: int, what: str = "text") -> str:
    """A text, or of a list of equally good ones the one that the row's number chooses."""
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
    """The plain values of a row that a sample keeps beside what is ``used`` otherwise: numbers, and texts up to ``longest``."""
    return {
        name: value
        for name, value in row.items()
        if name not in used
        and (isinstance(value, int | float) or (isinstance(value, str) and (longest is None or len(value) <= longest)))
    }
