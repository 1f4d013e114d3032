"""What judges' answers say: each function raises a ``ValueError`` that says why an answer cannot be read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from umm_zoo.metrics.yes_no import parse_yes_no

#: Stands before and after the JSON of an answer in VIEScore's prompts.
_DELIMITER = "||V^=^V||"


def parse_json(answer: str, schema: Mapping[str, type]) -> dict[str, Any]:
    """The one JSON object of an answer; text around it, such as a code fence, is not read.

    Args:
        answer: of a judge.
        schema: types by key; further keys are kept. ``int`` takes whole numbers and booleans, ``float`` any number.
    """
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        raise ValueError("no JSON object")
    try:
        found = json.loads(answer[start : end + 1], object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    for key, kind in schema.items():
        if key not in found:
            raise ValueError(f"no '{key}'")
        found[key] = _typed(key, found[key], kind)
    return found


def _typed(key: str, value: Any, kind: type) -> Any:
    if kind is int and isinstance(value, (int, float)) and float(value).is_integer():
        return int(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind not in (int, float) and isinstance(value, kind):
        return value
    raise ValueError(f"'{key}' is {json.dumps(value)[:40]}, no {kind.__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def labelled_scores(answer: str, labels: Sequence[str], highest: int, place: int = -1) -> list[int]:
    """Digits up to ``highest`` behind their labels (``Realism: 2``, ``**Realism** 2``), by WISE's rule.

    Without any label, lines that are such a digit and nothing else, as many as there are labels. ``place`` says which counts where
    a label stands several times.
    """
    found = dict[str, str]()
    for label in labels:
        matches = re.findall(rf"{re.escape(label)}\*{{0,2}}\s*:?\s*([0-{highest}])\b", answer, re.IGNORECASE)
        if matches:
            found[label] = matches[place]
    if not found:
        lines = re.findall(rf"(?m)^\s*([0-{highest}])\s*$", answer)
        found = dict(zip(labels, lines, strict=True)) if len(lines) == len(labels) else {}
    if missing := [label for label in labels if label not in found]:
        raise ValueError(f"no number behind {', '.join(missing)}")
    return [int(found[label]) for label in labels]


def lines_of_scores(answer: str, count: int, lowest: int, highest: int) -> list[int]:
    """The whole numbers that end the lines of the form ``Label: 4``, which must be ``count``."""
    parts = [line.strip().replace("*", "").split(": ") for line in answer.splitlines()]
    found = [int(part[1]) for part in parts if len(part) == 2 and re.fullmatch(r"[0-9]+", part[1])]
    if len(found) != count:
        raise ValueError(f"{len(found)} scores, not {count}")
    return [_up_to(value, lowest, highest) for value in found]


def viescore(answer: str) -> list[float]:
    """The list of sub-scores from 0 to 10 under ``score`` in an answer's JSON, or an answer that is such a list or number alone."""
    text = answer.replace("\n", "")
    if text.count(_DELIMITER) == 2:
        text = text.split(_DELIMITER)[1]
    if "{" in text:
        scores = parse_json(text, {"score": object})["score"]
    else:
        found = re.search(r"\[.*\]|^\s*\d+(\.\d+)?\s*$", text)
        if found is None:
            raise ValueError("no JSON object and no list")
        try:
            scores = json.loads(found[0])
        except ValueError:
            raise ValueError(f"no list: {found[0][:40]}") from None
    scores = scores if isinstance(scores, list) else [scores]
    if not scores:
        raise ValueError("no score")
    return [_up_to(_typed("score", score, float), 0, 10) for score in scores]


def yes_or_no(answer: str) -> int:
    """1 where the first word is yes, 0 where it is no."""
    if (said := parse_yes_no(answer)) < 0:
        raise ValueError("its first word is neither yes nor no")
    return said


def _up_to(value: Any, lowest: int, highest: int) -> Any:
    if not lowest <= value <= highest:
        raise ValueError(f"{value}, not from {lowest} to {highest}")
    return value
