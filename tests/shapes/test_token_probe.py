"""Probes of tokens: what stands in them is read, what does not is guessed, and each object is asked of its own cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from values_over_ranks import scored

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.scenes import PLACES
from umm_zoo.shapes.token_probe import TokenProbe, cross_fitted


def world(count: int, told: bool) -> tuple[Outputs, Batch]:
    """Images of 4 x 4 tokens of width 3, an object each; where it is told, its mark is the sign of a token of its cell."""
    generator = torch.Generator().manual_seed(0)
    tokens, meta = list[Tensor](), []
    for image in range(count):
        cell, mark = image % 4, int(torch.randint(2, (), generator=generator))
        board = torch.randn(4, 4, 3, generator=generator)
        if told:
            board[2 * (cell // 2), 2 * (cell % 2), 1] = 4.0 * (2 * mark - 1)
        tokens.append(board.flatten(0, 1))
        meta.append({"scene": {"objects": [{"cell": PLACES[2][cell], "mark": "AB"[mark]}]}, "class": "ab"[mark]})
    return Outputs(tokens=tokens), Batch([f"row{i}" for i in range(count)], [[]] * count, meta=meta)


def test_a_mark_that_stands_in_the_tokens_of_its_cell_is_read() -> None:
    found = scored(TokenProbe(["mark"]), world(400, told=True))
    assert found["mark"] == 1.0 and 0.5 <= found["mark_chance"] < 0.6


def test_a_mark_that_stands_nowhere_is_guessed() -> None:
    assert scored(TokenProbe(["mark"]), world(400, told=False))["mark"] < 0.6


def test_a_value_of_the_image_is_read_from_all_of_it_and_what_no_row_has_is_left_out() -> None:
    found = scored(TokenProbe(["class", "shape"]), world(400, told=True))
    assert set(found) == {"class", "class_chance"} and found["class"] > 0.7  # a quarter of the tokens says it, of four places


def test_ranks_together_are_the_whole() -> None:
    outputs, batch = world(60, told=True)
    halves = [
        (Outputs(tokens=[outputs.tokens[row] for row in rows]), batch.select(list(rows)))  # type: ignore[index]
        for rows in (range(25), range(25, 60))
    ]
    assert scored(TokenProbe(["mark"]), *halves) == pytest.approx(scored(TokenProbe(["mark"]), (outputs, batch)))


def test_no_probe_scores_what_it_has_learnt() -> None:
    """Labels that are noise, and as many features as rows: a probe that was scored on its own rows would be always right."""
    generator = torch.Generator().manual_seed(0)
    features, truth = torch.randn(300, 300, generator=generator).double(), torch.randint(2, (300,), generator=generator)
    assert cross_fitted(features, truth, torch.arange(300) % 5, 1e-6) < 0.62


def test_a_method_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="tokens"):
        TokenProbe().update(Outputs(), world(3, told=True)[1])
