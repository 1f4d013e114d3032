"""libyaml writes what PyYAML's own emitter does, and reads it as the same values."""

from __future__ import annotations

import math
import random

import pytest
import yaml

from umm_zoo.experiment.plain_yaml import yaml_text, yaml_tree

WORDS = [
    "x",
    "a b ",
    "'",
    '"',
    ": ",
    "#",
    "- ",
    "\n",
    "\t",
    "\\",
    "${a.b}",
    "{",
    "ü",
    "日本",
    "😀",
    "1e-5",
    "null",
    "yes",
    "0o7",
    "~",
    " ",
    "%",
    "@",
]
VALUES = [None, True, 3, -1, 0.1, 1e-5, 1e20, 5.0, math.inf, -math.inf, [], {}, "", "x " * 120, "ü " * 120, "/a/b" * 60]


def value(chance: random.Random, depth: int = 0) -> object:
    kind = chance.randrange(4 if depth < 3 else 2)
    if kind == 0:
        return chance.choice(VALUES)
    if kind == 1:
        return "".join(chance.choices(WORDS, k=chance.randrange(9)))
    inner = [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return inner if kind == 2 else {f"{chance.choice(WORDS)}{i}": child for i, child in enumerate(inner)}


@pytest.mark.parametrize("options", [{}, {"sort_keys": False, "allow_unicode": True, "width": 120}])
def test_text_and_values_are_those_of_pyyaml(options: dict[str, object]) -> None:
    chance = random.Random(5)
    for _ in range(150):
        tree = {"a": value(chance), "b": value(chance)}
        text = yaml_text(tree, **options)
        assert text == yaml.safe_dump(tree, **options)
        assert yaml_tree(text) == yaml.safe_load(text) == tree
