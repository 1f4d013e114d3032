"""Rows of any numbers of images of any sizes, drawn at random: each as alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.backbones.vlm_parts import assistant, qwen, user
from umm_zoo.batch import Batch, by_size, map_by_size, stacked

VLM = qwen().eval()
SIZES = st.tuples(st.integers(12, 45), st.integers(12, 45))
ROWS = st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=4)


def batch(rows: list[list[tuple[int, int]]], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    turns = [[user("so: " + "<image> and " * len(own) + "what?"), assistant("yes " * (1 + len(own)))] for own in rows]
    images = [torch.rand(3, *size, generator=generator) * 2 - 1 for own in rows for size in own]
    return Batch([str(row) for row in range(len(rows))], turns, images, [len(own) for own in rows])  # type: ignore[arg-type]


@settings(max_examples=12, deadline=None)
@given(ROWS, st.integers(0, 99), st.booleans())
def test_embeddings_positions_and_labels_of_a_row_do_not_depend_on_the_others(rows, seed: int, for_generation: bool) -> None:
    whole = batch(rows, seed)
    turns = whole.prompts() if for_generation else whole.conversations
    together = VLM.embed(turns, whole.images, whole.image_counts, for_generation)
    grids = iter(VLM.image_grids(whole.images))
    for row, own in enumerate(rows):
        one = whole.select([row])
        alone = VLM.embed(one.prompts() if for_generation else one.conversations, one.images, one.image_counts, for_generation)
        real = together.attention_mask[row]
        assert torch.equal(together.token_ids[row, real], alone.token_ids[0]) and real.sum() == alone.token_ids.shape[1]
        assert torch.equal(together.labels[row, real], alone.labels[0])
        assert torch.equal(together.position_ids[:, row, real], alone.position_ids[:, 0])
        assert_close(together.embeddings[row, real], alone.embeddings[0], rtol=0, atol=1e-5)
        assert int(together.image_mask[row].sum()) == sum(next(grids).num_cells for _ in own)


@settings(max_examples=8, deadline=None)
@given(ROWS, st.integers(0, 99))
def test_losses_of_a_row_do_not_depend_on_the_others(rows, seed: int) -> None:
    whole = batch(rows, seed)
    with torch.no_grad():
        together = VLM(VLM.inputs_of(whole))
        for row in range(len(rows)):
            alone = VLM(VLM.inputs_of(whole.select([row])))
            assert_close(together.nll[row], alone.nll[0], rtol=0, atol=1e-4)
    assert VLM.count_labels(whole) == int(together.num_tokens.sum())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=9), st.booleans())
def test_groups_hold_every_image_once_and_results_keep_their_order(sizes: list[tuple[int, int]], one_memory: bool) -> None:
    flat = torch.arange(float(sum(3 * h * w for h, w in sizes)))
    parts = flat.split([3 * h * w for h, w in sizes])
    images = [part.view(3, *size) for part, size in zip(parts, sizes, strict=True)]
    images = images if one_memory else [image.clone() for image in images]
    groups = by_size(images)
    assert sorted(place for places, _ in groups for place in places) == list(range(len(sizes)))
    assert [stack.shape[2:] for _, stack in groups] == [torch.Size(size) for size in dict.fromkeys(sizes)]
    assert all(torch.equal(stack, torch.stack([images[place] for place in places])) for places, stack in groups)
    found = map_by_size(lambda stack: stack + len(stack), images)
    assert all(torch.equal(new, old + sizes.count(size)) for new, old, size in zip(found, images, sizes, strict=True))
    if len(groups) == 1 and one_memory:
        assert stacked(images).data_ptr() == flat.data_ptr()
