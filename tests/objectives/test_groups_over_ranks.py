"""Where weights are shared out, ranks whose batches hold images of different sizes call each network equally often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_two_ranks

from umm_zoo.batch import by_size, map_by_size
from umm_zoo.objectives.step import StepMeans

pytestmark = pytest.mark.processes

#: Of each rank three lists: three sizes beside one, two beside two, two beside a single image.
SIZES = (
    [[(2, 4), (4, 2), (2, 2), (4, 2)], [(2, 2), (4, 2)], [(2, 2), (4, 2)]],
    [[(2, 2)] * 5, [(2, 2), (2, 2), (2, 4)], [(2, 2)]],
)


def work_of_rank(rank: int) -> list[Any]:
    rows = []
    for sizes in SIZES[rank]:
        images, calls = [torch.full((3, *size), float(place)) for place, size in enumerate(sizes)], []
        with StepMeans().training(sharded=True):
            groups = by_size(images)
            found = map_by_size(lambda stack, calls=calls: calls.append(len(stack)) or stack + 0.5, images)
        assert all(torch.equal(new, old + 0.5) for new, old in zip(found, images, strict=True))
        rows.append((len(calls), [places for places, _ in groups], [stack[:, 0, 0, 0].tolist() for _, stack in groups]))
        with StepMeans().training():
            assert len(by_size(images)) == len(set(sizes))
    return rows


def test_every_rank_has_as_many_groups_and_each_image_is_in_one() -> None:
    first, second = on_two_ranks(work_of_rank)
    assert [count for count, *_ in first] == [count for count, *_ in second] == [3, 2, 2]
    for rows, sizes in ((first, SIZES[0]), (second, SIZES[1])):
        for (count, groups, values), own in zip(rows, sizes, strict=True):
            assert len(groups) == count and [own or [0] for own in groups] == values  # an image's value is its place
            assert sorted(place for places in groups for place in places) == list(range(len(own)))
    assert second[2][1] == [[0], []]  # a single image stands in for another
