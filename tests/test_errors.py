"""A user error says where, what was found, what was expected and how to get on, wherever it was raised."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from umm_zoo.errors import REFUSALS, Problem, UserError, locating, user_errors

PROBLEMS = [Problem("", "a \n note", "none", "drop it"), Problem("b", "2")]


class Refusing(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> int:
        raise UserError(
            "a.tar", [Problem("", "a \n note", "none", "drop it"), Problem("b", "2")], row=3, advice="go on"
        ) from OSError()


def fields(error: UserError) -> tuple[Any, ...]:
    return error.file, error.problems, error.row, error.advice


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_every_field_comes_through_a_loaders_worker(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        list(DataLoader(Refusing(), num_workers=workers))
    assert fields(caught.value) == ("a.tar", PROBLEMS, 3, "go on")


def test_one_line_per_problem() -> None:
    assert UserError("f.yaml", [Problem("a", "1\n 1", "2", "ask"), Problem("", "3")]).lines() == [
        "f.yaml: a: found 1 1, expected 2; ask",
        "f.yaml: 3",
    ]


def test_what_comes_from_data_cannot_forge_a_line() -> None:
    error = UserError("a\nerror: b\x1b[2K", "caf\udce9 \x00")
    assert str(error) == r"a error: b\x1b[2K: caf\udce9 \x00"


def test_who_catches_it_adds_what_it_does_not_say() -> None:
    error = UserError("", "3 words", "2", row=1)
    error.locate("f.yaml", "data", ["k0", "k1"], "go on")
    assert (str(error), error.advice) == ("f.yaml: data: k1: found 3 words, expected 2", "go on")
    error.locate("g.yaml", "method", ["k2"])
    assert str(error) == "f.yaml: data: k1: found 3 words, expected 2"


def test_a_refusal_becomes_a_user_error_where_its_place_is_known() -> None:
    with pytest.raises(UserError, match=r"^f\.yaml: data: no such table$"), locating("f.yaml", "data", REFUSALS):
        raise ValueError("no such table")
    with pytest.raises(RuntimeError, match="a bug"), locating("f.yaml", "data", REFUSALS):
        raise RuntimeError("a bug")


def test_what_an_ascii_terminal_cannot_show_is_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with user_errors():
        print("Qué \udce9", flush=True)
    assert written.getvalue() == b"Qu\\xe9 \\udce9\n"
