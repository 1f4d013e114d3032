"""Items that are there several times, for what is to be done once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def distinct(items: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """Numbers of the items that differ, the first of each kind, and for every item its place among them."""
    kinds: dict[Hashable, int] = {}
    firsts, places = list[int](), list[int]()
    for number, item in enumerate(items):
        if item not in kinds:
            kinds[item] = len(firsts)
            firsts.append(number)
        places.append(kinds[item])
    return firsts, places
