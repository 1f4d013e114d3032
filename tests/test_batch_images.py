"""Images of a batch: lists of any sizes, stacked in groups of equal size without needless copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umm_zoo.batch import Batch, by_size, map_by_size, stacked
from umm_zoo.errors import UserError
from umm_zoo.methods.requests import request_batch

SIZES = ((4, 6), (8, 2), (4, 6), (2, 2), (8, 2), (4, 6))


def images(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Tensor]:
    return [torch.full((3, *size), place / 10) for place, size in enumerate(sizes)]


def unequal() -> Batch:
    """Three rows with 2, 0 and 1 images; the first and the last ask for one."""
    shown = images(((4, 6), (8, 2), (2, 2)))
    rows = [[{"role": "user", "text": "<image>" * count}] for count in (2, 0, 1)]
    return Batch(["a", "b", "c"], rows, shown, [2, 0, 1], [torch.ones(3, 6, 4), None, torch.zeros(3, 2, 8)])  # type: ignore[arg-type]


def test_groups_of_equal_size_know_their_places() -> None:
    found = by_size(images())
    assert [places for places, _ in found] == [[0, 2, 5], [1, 4], [3]]
    assert [tuple(stack.shape) for _, stack in found] == [(3, 3, 4, 6), (2, 3, 8, 2), (1, 3, 2, 2)]
    assert all(torch.equal(stack[n], images()[place]) for places, stack in found for n, place in enumerate(places))
    assert by_size([]) == []


def test_results_of_groups_come_back_in_order_with_their_gradients() -> None:
    given, calls = [image.requires_grad_() for image in images()], []
    found = map_by_size(lambda stack: calls.append(len(stack)) or stack.mean(dim=(1, 2, 3)) ** 2, given)
    assert calls == [3, 2, 1]
    torch.testing.assert_close(torch.stack(found), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]) ** 2)
    torch.stack(found).sum().backward()
    for place, image in enumerate(given):
        torch.testing.assert_close(image.grad, torch.full_like(image, 2 * place / 10 / image.numel()))


def test_views_of_one_tensor_are_stacked_without_a_copy() -> None:
    whole = torch.rand(5, 3, 4, 6)
    batch = Batch(["a", "b"], [[], []], whole, [4, 1], whole[:2])
    assert stacked(batch.images).data_ptr() == whole.data_ptr() and torch.equal(stacked(batch.images), whole)
    assert stacked(batch.images[1:4]).data_ptr() == whole[1:].data_ptr()
    for places in ([0, 2], [2, 1], [1, 1]):
        assert torch.equal(stacked([whole[place] for place in places]), whole[places])
    last = whole.to(memory_format=torch.channels_last)
    assert stacked(list(last)).data_ptr() == last.data_ptr() and stacked(list(last)).stride() == last.stride()
    crops = list(whole[:, :, 1:3])  # not one behind the other
    assert torch.equal(stacked(crops), whole[:, :, 1:3])


def test_a_gradient_reaches_every_view() -> None:
    whole = torch.rand(3, 3, 2, 2, requires_grad=True)
    (stacked(list(whole)) * torch.arange(3.0)[:, None, None, None]).sum().backward()
    assert whole.grad is not None and whole.grad[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_sizes_that_cannot_be_stacked_are_named() -> None:
    with pytest.raises(UserError, match=r"data\.resize: found images of 4 x 6, 8 x 2, 2 x 2 px in one batch, expected .* one size"):
        stacked(images(), "data.resize")


def test_rows_keep_images_and_targets_of_any_size() -> None:
    chosen = unequal().select([2, 0])
    assert [tuple(image.shape) for image in chosen.images] == [(3, 2, 2), (3, 4, 6), (3, 8, 2)]
    assert [tuple(image.shape[1:]) for image in chosen.images_of(1)] == [(4, 6), (8, 2)]
    assert [tuple(target.shape[1:]) for target in chosen.requested] == [(2, 8), (6, 4)]
    assert unequal().has_target == [True, False, True] and unequal().target_of(1) is None and not unequal().images_of(1)


def test_a_move_keeps_order_and_values_and_takes_neighbours_in_memory_together() -> None:
    flat, calls = torch.arange(3.0 * (24 + 16 + 4)), []
    parts = flat.split([72, 48, 12])
    shown = [part.view(3, *size) for part, size in zip(parts, SIZES[:2] + SIZES[3:4], strict=True)]
    batch = Batch(["a"], [[]], shown, [3], [torch.ones(3, 2, 2)])

    def move(tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return tensor.double()

    moved = batch._map(move)
    assert calls == [12, 132] and moved.requested[0].dtype == torch.float64
    assert all(torch.equal(new, old.double()) for new, old in zip(moved.images, shown, strict=True))


def test_requests_may_show_images_of_any_size() -> None:
    batch = request_batch(["Join them.", "", "A dog."], [images()[:2], images()[3:4], []])
    assert batch.image_counts == [2, 1, 0] and [tuple(image.shape[1:]) for image in batch.images] == [(4, 6), (8, 2), (2, 2)]
