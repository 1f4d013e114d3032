from types import SimpleNamespace

import pytest
import torch

from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.buffers import PackedImages
from umm_zoo.batch import Batch, Task, stacked
from umm_zoo.callbacks.augment import OtherImages, ShiftAndFlip, shift_and_flip
from umm_zoo.errors import UserError
from umm_zoo.objectives.step import whole_steps


def test_every_result_is_a_shift_or_a_mirrored_shift_of_its_own_image():
    images = torch.rand(6, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    changed = shift_and_flip(images, 2, True, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    mirrored = 0
    for old, new in zip(padded, changed, strict=True):
        windows = [old[:, i : i + 7, j : j + 5] for i in range(5) for j in range(5)]
        plain = any(torch.equal(new, window) for window in windows)
        mirrored += not plain
        assert plain or any(torch.equal(new.flip(-1), window) for window in windows)
    assert 0 < mirrored < 6


def test_draws_depend_on_the_generator_alone_and_no_shift_no_flip_is_the_identity():
    images = torch.rand(4, 3, 6, 6)
    one, same, other = (stacked(shift_and_flip(images, 3, True, torch.Generator().manual_seed(seed))) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(stacked(shift_and_flip(images, 0, False, torch.Generator())), images)


def test_the_callback_changes_the_batch_and_repeats_itself():
    images = torch.rand(2, 3, 8, 8)
    results = []
    for index in (3, 3, 4):
        batch = Batch(keys=["a", "b"], conversations=[[], []], images=images, image_counts=[1, 1])
        ShiftAndFlip(max_shift=2).on_train_batch_start(SimpleNamespace(global_rank=0), None, batch, index)
        results.append(stacked(batch.images))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def raw(key, *sizes):
    images = [torch.randint(256, (*size, 3), dtype=torch.uint8) for size in sizes]
    packed = PackedImages(torch.cat([image.flatten() for image in images]), list(sizes)) if images else None
    return RawBatch([key], [[]], packed, [len(images)], has_target=[False], tasks=[Task.QUESTION], meta=[{}], crops=[None])


def test_micro_batches_that_are_looked_at_ahead_are_changed_as_on_their_own_turn():
    """As the loader gives them, images of unequal sizes packed in bytes."""
    given = [raw("a", (8, 8)), raw("b", (8, 6), (4, 10)), raw("c", (8, 8)), raw("d")]
    batches = [one.batch() for one in given]
    turns = [one.batch() for one in whole_steps(given, 4)]
    module = SimpleNamespace(moved=lambda other: other.batch())
    for index, batch in enumerate(turns, start=5):
        ShiftAndFlip(max_shift=2).on_train_batch_start(SimpleNamespace(global_rank=1), module, batch, index)
    assert [len(batch.ahead or ()) for batch in turns] == [3, 0, 0, 0] and turns[3].images == []
    for ahead, own, given in zip(turns[0].ahead, turns[1:3], batches[1:], strict=False):
        assert torch.equal(ahead.images[0], own.images[0]) and not torch.equal(own.images[0], given.images[0])


def test_each_row_is_shown_the_images_of_the_next():
    images = torch.rand(6, 3, 4, 4)
    batch = Batch(keys=["a", "b", "c"], conversations=[[]] * 3, images=images, image_counts=[2, 2, 2])
    OtherImages().on_validation_batch_start(None, None, batch, 0)
    assert torch.equal(stacked(batch.images), images[[2, 3, 4, 5, 0, 1]])
    uneven = Batch(keys=["a", "b"], conversations=[[]] * 2, images=images[:3], image_counts=[2, 1])
    with pytest.raises(UserError, match="rows of 1 and 2 images in one batch"):
        OtherImages().on_validation_batch_start(None, None, uneven, 0)
