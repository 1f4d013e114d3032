"""Packed sequences: who attends to whom, where tokens stand, and where losses are."""

from __future__ import annotations

import pytest
import torch

from umm_zoo.blocks.packed_masks import PackedMask, Split
from umm_zoo.blocks.sequence_plan import Item, Marks, SequencePlan
from umm_zoo.errors import UserError

MARKS = Marks(1, 2, 3, 4)
B1 = [Split("causal", 3), Split("noise", 2), Split("full", 2), Split("full", 2), Split("causal", 2)]


def test_the_mask_has_the_rows_that_a_pencil_gives() -> None:
    mask = PackedMask([B1])()[0].int()
    assert mask.sum() == 57
    assert mask[10].tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]  # the last word sees all but the noise
    assert mask[3].tolist() == mask[4].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert mask[5].tolist() == [1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]  # full within its own split
    assert mask[1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_rows_of_a_batch_have_their_own_masks_and_see_no_padding() -> None:
    short = [Split("full", 3), Split("causal", 1)]
    mask = PackedMask([short, B1])()
    assert torch.equal(mask[0, :4, :4], PackedMask([short])()[0]) and torch.equal(mask[1], PackedMask([B1])()[0])
    assert not mask[0, :4, 4:].any() and mask.any(-1).all()


def test_another_kind_of_split_is_a_user_error() -> None:
    with pytest.raises(UserError, match="'half' of 2 tokens"):
        PackedMask([[Split("full", 1)], [Split("half", 2)]])  # type: ignore[arg-type]


def test_an_image_has_one_position_and_a_generated_one_moves_nothing() -> None:
    items = [
        Item("text", [7, 8]),
        Item("noise", num_tokens=2),
        Item("clean", num_tokens=2),
        Item("seen", num_tokens=1),
        Item("text", [9], learnt=True),
    ]
    plan = SequencePlan.of([items], MARKS)
    assert plan.token_ids[0].tolist() == [1, 7, 8, 2, 3, 0, 0, 4, 3, 0, 0, 4, 3, 0, 4, 1, 9, 2]
    assert plan.positions[0].tolist() == [0, 1, 2, 3, *[4] * 4, *[4] * 4, *[5] * 3, 6, 7, 8]
    assert plan.route[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]  # marks of an image are words
    assert {kind: own.tolist() for kind, own in plan.places.items()} == {"noise": [5, 6], "clean": [9, 10], "seen": [13]}
    assert plan.next_positions.tolist() == [9]


def test_an_answer_is_learnt_with_its_end_and_from_what_opens_it() -> None:
    rows = [[Item("text", [7])], [Item("text", [8]), Item("text", [5, 6], learnt=True)]]
    plan = SequencePlan.of(rows, MARKS)
    assert plan.label_places.tolist() == [7 + 3, 7 + 4, 7 + 5] and plan.labels.tolist() == [5, 6, 2]
    assert plan.real.sum(1).tolist() == [3, 7] and plan.route[0, 3:].tolist() == [-1] * 4
    assert plan.text_places.tolist() == [0, 1, 2, *range(7, 14)]


def test_dropped_images_keep_their_positions_and_dropped_texts_none() -> None:
    items = [
        Item("text", [7], dropped=True),
        Item("clean", num_tokens=4, dropped=True),
        Item("seen", num_tokens=4, dropped=True),
        Item("noise", num_tokens=1),
    ]
    plan = SequencePlan.of([items], MARKS)
    assert plan.token_ids[0].tolist() == [3, 0, 4] and plan.positions[0].tolist() == [2, 2, 2]
