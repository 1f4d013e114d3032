"""Nodes become objects; what does not fit is said before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import toy_parts
from torch import nn

from umm_zoo.batch import Grid
from umm_zoo.conversation import Turn
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build
from umm_zoo.experiment.targets import find_target
from umm_zoo.experiment.types import describe_slot, mismatches
from umm_zoo.training.optimization import AdamW, OptimizerFactory, Schedule


class Base:
    """Stands in slots."""


class Sub(Base):
    """May stand where Base is asked for."""

    def __init__(self, number: float = 1.0) -> None:
        self.number = number

    @classmethod
    def doubled(cls, number: float) -> Base:
        return cls(2 * number)

    @staticmethod
    def loose() -> Base:
        return Base()


class Holder:
    """Every sort of slot."""

    def __init__(
        self,
        one: Base | None = None,
        many: dict[str, Base] | None = None,
        row: Sequence[Base] = (),
        pair: tuple[int, float] = (1, 2.0),
        grid: Grid | None = None,
        file: Path | None = None,
        anything: Any = None,
    ) -> None:
        self.one, self.many, self.row, self.pair, self.grid, self.file, self.anything = one, many, row, pair, grid, file, anything


def node(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"test_build_nodes.{name}", **arguments}


def test_inner_nodes_are_built_first_wherever_they_stand() -> None:
    holder = build(
        node(
            "Holder",
            one=node("Sub", number=2),
            many={"a": node("Sub")},
            row=[node("Sub")],
            anything={"deep": [node("Sub", number=5)]},
        )
    )
    assert (holder.one.number, holder.many["a"].number, len(holder.row), holder.anything["deep"][0].number) == (2, 1.0, 1, 5)


def test_classmethod_is_a_target() -> None:
    assert build(node("Sub.doubled", number=3)).number == 6
    assert find_target("test_build_nodes.Sub.doubled").kind is Sub  # what it says (Base) is wider than what it makes


def test_values_become_what_the_slot_says() -> None:
    holder = build(node("Holder", pair=[3, 4.0], grid=[5, 6], file="a/b"))
    assert holder.pair == (3, 4.0)
    assert holder.grid == Grid(5, 6) and holder.grid.num_cells == 30
    assert holder.file == Path("a/b")


def test_null_in_a_map_of_objects_removes_the_entry() -> None:
    assert list(build(node("Holder", many={"a": node("Sub"), "b": None})).many) == ["a"]
    assert build(node("Holder", anything={"b": None})).anything == {"b": None}


def test_constructor_error_names_the_node() -> None:
    inner = {"_target_": "umm_zoo.training.optimization.WarmupCosine", "total_steps": 0}
    with pytest.raises(UserError) as caught:
        build(node("Holder", anything=[{"deep": inner}]), "method")
    (line,) = caught.value.lines()
    assert line.startswith(
        "method.anything[0].deep: umm_zoo.training.optimization.WarmupCosine: schedule: total_steps must be >= 1"
    )


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("test_build_nodes.node", "which is a function"),
        ("test_build_nodes.Sub.loose", "which is a function"),
        ("test_build_nodes.Sub.missing", "test_build_nodes.Sub has no 'missing'"),
        ("umm_zoo.batch", "which is a module"),
        ("umm_zoo.batch.IMAGE_MARKER", "which is an object of str"),
        ("umm_zoo.method.Method", "an abstract class"),
        ("Sub", "'Sub'"),
        ("a..b", "'a..b'"),
        ("os.path.join", "which is a function"),
    ],
)
def test_only_classes_and_classmethods_are_targets(path: str, found: str) -> None:
    with pytest.raises(UserError, match="found") as caught:
        find_target(path)
    assert found in str(caught.value)


SUB, HEAD = node("Sub"), {"_target_": "toy_parts.Head", "in_dim": 1}


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (True, float, False),
        (1, bool, False),
        (None, int | None, True),
        (None, int, False),
        ("a", Literal["a", "b"], True),
        (1, Literal["a", 1], True),
        (True, Literal["a", 1], False),
        ("c", Literal["a", "b"], False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ([1, 2], Sequence[float], True),
        ("12", Sequence[str], False),
        ([1, 2.5], tuple[int, float], True),
        ([1, 2, 3], tuple[int, ...], True),
        ([1], tuple[int, int], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "x"}, Mapping[str, int], False),
        ([], dict[str, int], False),
        ({}, list[int], False),
        ("x", Path, True),
        ("x", Base, False),
        (SUB, Base, True),
        (SUB, Base | None, True),
        (SUB, int | Base, True),
        (HEAD, Base, False),
        (SUB, str, False),
        (SUB, Any, True),
        (HEAD, Callable[[int], int], True),
        (SUB, Callable[[int], int], False),
        ({"a": SUB}, dict[str, Base], True),
        ({"a": HEAD}, dict[str, Base] | None, False),
        ([SUB, HEAD], list[Base], False),
        ([3, 4], Grid, True),
        ([3], Grid, False),
        ({"role": "user"}, dict[str, Any], True),
        (HEAD, nn.Module, True),
        ([SUB], list[Turn], False),
        ("torch.nn.Linear", type[nn.Module], False),
    ],
)
def test_slots(value: Any, hint: Any, fits: bool) -> None:
    def class_of(inner: Mapping[str, Any]) -> type:
        return find_target(inner["_target_"]).kind

    assert (mismatches(value, hint, "here", class_of) == []) is fits


def test_problem_inside_a_container_names_the_element() -> None:
    (problem,) = mismatches({"a": 1, "b": [2, "x"]}, dict[str, int | list[int]] | None, "here")
    assert str(problem) == "here.b[1]: found 'x' (text), expected a whole number"


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "a whole number or null"),
        (list[str], "a list of text"),
        (dict[str, float], "a map from names to a number"),
        (
            Schedule,
            "a node of a umm_zoo.training.optimization.Schedule such as umm_zoo.training.optimization.Constant, umm_zoo.training.optimization.WarmupCosine",  # noqa: E501
        ),
    ],
)
def test_slots_in_words(hint: Any, words: str) -> None:
    assert describe_slot(hint) == words


def test_a_user_may_subclass_a_factory() -> None:
    class Mine(AdamW):
        pass

    assert mismatches({"_target_": "x"}, OptimizerFactory, "here", lambda node: Mine) == []
    assert issubclass(toy_parts.Toy, nn.Module)


@pytest.mark.parametrize("size", [2**23, 2**40])
def test_a_block_that_no_memory_holds_is_one_line(size: int) -> None:
    with pytest.raises(UserError, match=r"^method\.connector: .* sizes that this machine has no memory for$"):
        build({"_target_": "torch.nn.Linear", "in_features": size, "out_features": size}, "method.connector")
