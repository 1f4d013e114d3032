"""Files of GenEval's prompts: ``evaluation_metadata.jsonl``, checked line by line."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from umm_zoo.benchmarks.geneval.detector import SPELLINGS
from umm_zoo.errors import UserError, did_you_mean, locating
from umm_zoo.metrics.geneval_rule import RELATIONS

#: The official 553 prompts.
SHIPPED = Path(__file__).resolve().parent.parent / "prompts" / "geneval.jsonl"


def read_metadata(file: str | Path, classes: Collection[str], colours: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a file; empty lines are none.

    Args:
        file: a JSON object per line, with ``prompt``, ``tag``, ``include`` and ``exclude`` as in ``GenEvalRule``.
        classes: that the detector knows.
        colours: that can be told.

    Raises:
        UserError: there is no such file, or a line cannot be judged.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(file, "no file", "GenEval's evaluation_metadata.jsonl, or one like it")
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(file, f"bytes that are no UTF-8 ({error.reason})", "lines of JSON") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with locating(place=f"{file}:{number}"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError("", f"no JSON ({error})", "an object per line") from error
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise UserError("", "no 'prompt'", "an object with prompt, tag and include")
            check_wanted(row, classes, colours)
            rows.append(row)
    if not rows:
        raise UserError(file, "no prompts", "one or more")
    return rows


def check_wanted(row: Mapping[str, Any], classes: Collection[str], colours: Collection[str]) -> None:
    """Refuse a requirement that could never be fulfilled, or not be judged, with a ``UserError``."""
    if not isinstance(row.get("tag"), str):
        raise UserError("", f"the tag {row.get('tag')!r}", "a name, such as two_object")
    for part in ("include", "exclude"):
        clauses = row.get(part, [])
        if not isinstance(clauses, list) or not all(isinstance(clause, dict) for clause in clauses):
            raise UserError("", f"{part} {clauses!r}", "a list of objects with class and count")
        for place, clause in enumerate(clauses):
            _check_clause(f"{part} {place}", clause, place if part == "include" else 0, classes, colours)
    if not row.get("include") and not row.get("exclude"):
        raise UserError("", "neither include nor exclude", "what an image must show")


def _check_clause(where: str, clause: dict[str, Any], place: int, classes: Collection[str], colours: Collection[str]) -> None:
    """One clause, which has ``place`` others before it."""
    allowed = {"class", "count", "color", "position"} if where.startswith("include") else {"class", "count"}
    if unknown := [key for key in clause if key not in allowed]:
        raise UserError("", f"{where}: '{unknown[0]}'", ", ".join(sorted(allowed)), did_you_mean(unknown[0], allowed))
    for key, known in (("class", classes), ("color", colours)):
        if (key in clause or key == "class") and (word := clause.get(key)) not in known:
            kind = "the detector's classes" if key == "class" else ", ".join(colours)
            meant = SPELLINGS.get(str(word))
            hint = did_you_mean(meant) if meant in known else did_you_mean(str(word), known)
            raise UserError("", f"{where}: {key} {word!r}", f"one of {kind}", hint)
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError("", f"{where}: count {count!r}", "a whole number of 1 or more")
    if "position" in clause:
        position = clause["position"]
        whole = isinstance(position, list) and len(position) == 2 and type(position[1]) is int
        if not whole or position[0] not in RELATIONS or not 0 <= position[1] < place:
            expected = f"[one of {', '.join(RELATIONS)}; the place of an earlier clause]"
            raise UserError("", f"{where}: position {position!r}", expected)
