"""What judges' answers say, and the answers that say nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umm_zoo.benchmarks.judging.reading import labelled_scores, lines_of_scores, parse_json, viescore, yes_or_no
from umm_zoo.benchmarks.judging.texts import JudgeTexts
from umm_zoo.errors import UserError

CORRECT = {"correct": int}
LEGACY = ("Consistency", "Realism", "Aesthetic Quality")


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"correct": 1, "reason": "all {there}"}', 1),
        ('```json\n{"correct": 0}\n```', 0),
        ('Here it is: {"correct": true} as asked', 1),
        ('{"correct": 1.0}', 1),
    ],
)
def test_one_json_object_is_read(answer: str, value: int) -> None:
    assert parse_json(answer, CORRECT)["correct"] == value


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("yes", "no JSON object"),
        ("} {", "no JSON object"),
        ('{"correct": 1', "no JSON object"),
        ('{"correct": 1} {"correct": 0}', "Extra data"),
        ('{"correct": 1, "correct": 0}', "a key twice"),
        ('{"correct": "1"}', "no int"),
        ('{"correct": 0.5}', "no int"),
        ('{"correct": null}', "no int"),
        ('{"correct": NaN}', "NaN"),
        ('{"reason": "fine"}', "no 'correct'"),
        ("{'correct': 1}", "no JSON"),
        ("{" * 100_000 + "}", "no JSON"),
    ],
)
def test_what_is_no_such_object_is_refused(answer: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(answer, CORRECT)


@pytest.mark.parametrize(
    ("read", "answer", "value"),
    [
        (lambda text: labelled_scores(text, ["Score"], 1, 0), "**Score**: 1", [1]),
        (lambda text: labelled_scores(text, ["Score"], 1, 0), "SCORE 0, though a score: 1 is near", [0]),
        (lambda text: labelled_scores(text, ["Score"], 1), " 1 \n", [1]),
        (lambda text: labelled_scores(text, LEGACY, 2), "Consistency: 2\n**Realism**: 1\naesthetic quality 0", [2, 1, 0]),
        (lambda text: labelled_scores(text, LEGACY, 2), "2\n1\n0", [2, 1, 0]),
        (lambda text: lines_of_scores(text, 3, 1, 5), "Brief reasoning: 2 legs: 3 arms\nA: 5\n B & C: 1\n**D**: 3", [5, 1, 3]),
        (viescore, '||V^=^V||\n{"score": [8, 3.5],\n"reasoning": "a\nb"}\n||V^=^V||', [8.0, 3.5]),
        (viescore, '{"score": 7, "reasoning": "x"}', [7.0]),
        (viescore, "[6, 0]", [6.0, 0.0]),
        (viescore, " 9 ", [9.0]),
        (yes_or_no, "Yes, there is.", 1),
        (yes_or_no, "no", 0),
    ],
)
def test_scores_are_read(read: Callable[[str], Any], answer: str, value: Any) -> None:
    assert read(answer) == value


@pytest.mark.parametrize(
    ("read", "answer"),
    [
        (lambda text: labelled_scores(text, ["Score"], 1), "Score: 2"),
        (lambda text: labelled_scores(text, ["Score"], 1), "Score: 10"),
        (lambda text: labelled_scores(text, ["Score"], 1), "**Score:** 1"),
        (lambda text: labelled_scores(text, ["Score"], 1), "It is fine"),
        (lambda text: labelled_scores(text, ["Score"], 1), "1\n1"),
        (lambda text: labelled_scores(text, LEGACY, 2), "Consistency: 2\nRealism: 1"),
        (lambda text: lines_of_scores(text, 3, 1, 5), "A: 5\nB: 4"),
        (lambda text: lines_of_scores(text, 3, 1, 5), "A: 5\nB: 4\nC: 6"),
        (lambda text: lines_of_scores(text, 3, 1, 5), "A: 5\nB: 4\nC: 3.5"),
        (viescore, '{"score": [8, 11]}'),
        (viescore, '{"score": []}'),
        (viescore, '{"score": ["8"]}'),
        (viescore, '{"reasoning": "x"}'),
        (viescore, "eight of ten"),
        (viescore, "[six, 0]"),
        (yes_or_no, "maybe"),
        (yes_or_no, ""),
    ],
)
def test_scores_that_cannot_be_are_refused(read: Callable[[str], Any], answer: str) -> None:
    with pytest.raises(ValueError):
        read(answer)


def test_texts_of_a_release_have_their_own_places(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("""PROMPT: "{prompt_data['Prompt']}", {"json": 1}, EXPLANATION: "{explanation}".""")
    texts = JudgeTexts.read(str(file), "wise_judge.json", {"user": ("prompt", "explanation")})
    assert texts.fill("user", prompt="a {explanation}", explanation="b") == (
        'PROMPT: "a {explanation}", {"json": 1}, EXPLANATION: "b".'
    )
    assert texts.about()["text"] == "the file mine.txt"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps({"user": "Look at {prompt}"}), "user: found no place for the explanation, expected {explanation}"),
        (json.dumps({"system": "x"}), "found no text 'user'"),
        ("[]", "found no text 'user'"),
        ("{", "found no JSON"),
    ],
)
def test_texts_without_a_place_are_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=said):
        JudgeTexts.read(str(tmp_path / "mine.json"), "wise_judge.json", {"user": ("prompt", "explanation")})
