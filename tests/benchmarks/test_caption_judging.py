"""Captions compared by a judge: both orders, ties, habits."""

from __future__ import annotations

import pytest
import torch

from tests.judge_server import Told
from umm_zoo.benchmarks.judging.captions import compare_captions, verdict
from umm_zoo.benchmarks.judging.judge import Question

IMAGES = torch.zeros(3, 3, 8, 8)


def longer(question: Question) -> str:
    """Prefers the longer caption."""
    first, second = str(question.content[1]).split("A: ", 1)[1].split("\n\nB: ")
    letter = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "T"
    return f"A has {len(first)} letters.\n{letter}"


def test_a_choice_that_survives_the_swap_counts():
    found = compare_captions(Told(longer), IMAGES, ["a long one", "short", "same"], ["short", "a long one", "size"])
    assert (found.wins, found.ties, found.losses, found.invalid) == (1, 1, 1, 0)
    assert found.win_rate == 0.5 and found.first_share == 0.5


def test_a_judge_that_always_takes_the_first_decides_nothing():
    found = compare_captions(Told(lambda _: "Final answer: **A**"), IMAGES, ["x"] * 3, ["y"] * 3)
    assert (found.wins, found.ties, found.losses, found.first_share) == (0, 3, 0, 1.0)


@pytest.mark.parametrize("said", ["I cannot tell.", None])
def test_answers_without_a_verdict_are_counted_apart(said: str | None):
    found = compare_captions(Told(lambda _: said), IMAGES, ["x"] * 3, ["y"] * 3)
    assert found.invalid == 3 and found.win_rate != found.win_rate
    with pytest.raises(ValueError, match="2 and 3 captions"):
        compare_captions(Told(longer), IMAGES, ["x"] * 2, ["y"] * 3)


@pytest.mark.parametrize(
    ("answer", "found"),
    [("scores\nA", "first"), ("B.\n\n", "second"), ("Winner: T", "tie"), ("[[B]]", "second")],
)
def test_verdict_is_the_last_line(answer: str, found: str):
    assert verdict(answer) == found


@pytest.mark.parametrize("answer", ["A good caption", ""])
def test_last_line_without_a_letter_is_no_verdict(answer: str):
    with pytest.raises(ValueError, match="no letter"):
        verdict(answer)
