"""Captions compared by a judge: both orders, ties, habits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.judge_server import Told
from umm_zoo.batch import Batch, Turn
from umm_zoo.benchmarks.judging.caption_duel import CaptionDuel
from umm_zoo.benchmarks.judging.captions import compare_captions, verdict
from umm_zoo.benchmarks.judging.judge import Judge, Question
from umm_zoo.errors import UserError
from umm_zoo.outputs import Outputs

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


def duel(folder: Path, judge: Judge, others: dict[str, str]) -> CaptionDuel:
    for name in ("a", "b 1", "c"):
        Image.new("RGB", (9, 7)).save(folder / f"{name}.png")
    rows = [json.dumps({"key": key, "caption": caption}) for key, caption in others.items()]
    (folder / "others.jsonl").write_text("\n".join(rows))
    return CaptionDuel(judge, str(folder), str(folder / "others.jsonl"))


def test_captions_of_a_run_meet_those_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = duel(tmp_path, Told(longer), {"a": "a long one", "b_1": "short", "c": "same"})
    items = found.items()
    assert [(item.key, item.text) for item in items] == [(key, "Describe the image in detail.") for key in ("a", "b_1", "c")]
    batch = Batch(
        keys=["a", "b_1", "c"],
        conversations=[[Turn(role="user", text=item.text)] for item in items],
        images=list(IMAGES),
        image_counts=[1] * 3,
        meta=[dict(item.meta) for item in items],
    )
    verdicts = [verdict for _, verdict in found.verdicts(Outputs(answers=["brief", "a long one", "size"]), batch)]
    assert [verdict.score for verdict in verdicts] == [0, 1, 0.5]
    values = found.values_of(torch.tensor([list(verdict.record) for verdict in verdicts]))
    assert [float(values[name]) for name in ("win_rate", "wins", "ties", "losses", "failed")] == [0.5, 1, 1, 1, 0]
    assert float(values["first_share"]) == 0.5
    missed = duel(tmp_path, Told(lambda _: None), {"a": "x", "b_1": "y", "c": "z"})
    [(_, first), *_] = missed.verdicts(Outputs(answers=["x"] * 3), batch)
    assert first.score != first.score and first.again and first.reason == "told so"


def test_every_image_needs_a_caption_of_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="no caption of b_1; 2 of 3 are missing"):
        duel(tmp_path, Told(longer), {"a": "x", "c": " "}).items()
