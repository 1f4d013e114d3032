"""Texts in the cells of a table: captions, answers and turns in any of the usual writings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipelines.converters.texts import from_json, without_markers
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import read_turns
from umm_zoo.conversation import Conversation


def captions_of(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """The captions or prompts of a row: of each column one, or those of a list, or of JSON text as BAGEL's (``{"0": "…"}``)."""
    found: list[str] = []
    for name in columns:
        cell = from_json(row.get(name))
        if isinstance(cell, int | float):
            cell = str(cell) if math.isfinite(cell) and not isinstance(cell, bool) else None
        for one in cell.values() if isinstance(cell, dict) else cell if isinstance(cell, list) else [cell]:
            if not isinstance(one, str | None):
                raise BadSampleError(f"text is something else than a text: {one!r:.80}")
            found += [text] if isinstance(one, str) and (text := without_markers(one)) else []
    if not found:
        raise BadSampleError(f"empty text: {row.get(columns[0])!r}"[:200])
    return found


def answer_of(cell: Any) -> tuple[str, dict[str, Any]]:
    """The most frequent of several answers (VQAv2's are ``{"answer": …}``); the first of those wins that are equally frequent.

    Several may be JSON text; a list of numbers is one answer, a box.
    """
    if isinstance(several := from_json(cell), list) and all(isinstance(item, str | dict) for item in several):
        cell = several
    answers = [item.get("answer") if isinstance(item, dict) else item for item in (cell if isinstance(cell, list) else [cell])]
    answers = [answer for answer in answers if not (isinstance(answer, float) and not math.isfinite(answer))]  # NaN: there is none
    texts = [str(answer).strip() for answer in answers if isinstance(answer, str | int | float) and str(answer).strip()]
    if not texts:
        raise BadSampleError(f"empty answer: {cell!r}"[:200])
    return Counter(texts).most_common(1)[0][0], {"answers": texts} if len(texts) > 1 else {}


def turns_of(cell: Any) -> Conversation:
    """Turns in any of the usual writings, JSON text included."""
    cell = from_json(cell)
    if isinstance(cell, list) and cell and all(isinstance(turn, dict) and "user" in turn for turn in cell):
        roles = ("user", "assistant")
        cell = [{"role": role, "text": turn[role]} for turn in cell for role in roles if isinstance(turn.get(role), str)]
    return read_turns(cell)
