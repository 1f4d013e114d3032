"""Images of unequal sizes in one batch of Qwen2.5-VL: as each alone, in one call of the vision tower."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.backbones.vlm_parts import assistant, llava, qwen, user
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError

#: Rows with 1, 0, 3 and 1 images.
ROWS = [
    [user("<image>\nWhat colour is the circle?"), assistant("red")],
    [user("Say yes."), assistant("yes, and again yes")],
    [user("From <image> to <image><image>: what changed?"), assistant("the circle")],
    [user("<image>"), assistant("no")],
]
COUNTS = [1, 0, 3, 1]
SIZES = [(24, 40), (16, 16), (40, 16), (16, 16), (32, 24)]  # tokens are 8 x 8 pixels


@pytest.fixture(scope="module")
def vlm() -> Qwen25VL:
    return qwen().eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in SIZES]


def alone() -> list[tuple[int, list[Tensor]]]:
    """Each row and its images."""
    shown = images()
    return [(row, shown[sum(COUNTS[:row]) : sum(COUNTS[: row + 1])]) for row in range(4)]


def prompts() -> list:
    return [row[:1] for row in ROWS]


def test_one_call_of_the_tower_encodes_each_as_alone(vlm: Qwen25VL) -> None:
    calls: list[int] = []
    handle = vlm.model.model.visual.register_forward_hook(lambda module, given, made: calls.append(len(given[0])))
    together = vlm.encode_images(images())
    handle.remove()
    assert calls == [4 * (15 + 4 + 10 + 4 + 12)]
    for image, features, size in zip(images(), together, SIZES, strict=True):
        assert features.shape == (size[0] // 8 * (size[1] // 8), 32)
        assert_close(features, vlm.encode_images([image])[0], rtol=0, atol=1e-5)


def test_gradients_are_those_of_each_alone(vlm: Qwen25VL) -> None:
    weights = list(vlm.model.model.visual.parameters())

    def gradients(*groups: list[Tensor]) -> list[Tensor]:
        shown = [image.requires_grad_() for group in groups for image in group]
        made = [one for group in groups for one in vlm.encode_images(group)]
        return list(torch.autograd.grad(sum(one.square().sum() for one in made), [*shown, *weights]))

    for one, many in zip(gradients(images()), gradients(*([image] for image in images())), strict=True):
        assert_close(one, many, rtol=1e-4, atol=1e-5)
        assert one.abs().sum() > 0


@pytest.mark.parametrize("for_generation", [False, True])
def test_positions_are_the_librarys_of_each_row_alone(vlm: Qwen25VL, for_generation: bool) -> None:
    inputs = vlm.embed(prompts(), images(), COUNTS, for_generation)
    assert not inputs.attention_mask.all()
    for row, shown in alone():
        real = inputs.attention_mask[row]
        ids, kinds = inputs.token_ids[row, real][None], inputs.image_mask[row, real][None].int()
        grids = torch.tensor([[1, image.shape[1] // 4, image.shape[2] // 4] for image in shown]) if shown else None
        expected, _ = vlm.model.model.get_rope_index(ids, kinds, image_grid_thw=grids)
        assert torch.equal(inputs.position_ids[:, row, real], expected[:, 0])


def test_positions_of_two_unequal_images_by_hand(vlm: Qwen25VL) -> None:
    inputs = vlm.embed([[user("<image><image>")]], [torch.zeros(3, 16, 24), torch.zeros(3, 32, 8)], [2])
    places = inputs.image_mask[0].nonzero()[:, 0]
    start = int(places[0])
    wide = start + torch.tensor([[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]])  # 2 x 3 tokens
    # the longer side of the first, vision_end and vision_start lie between; then 4 x 1 tokens
    tall = start + 3 + 2 + torch.tensor([[0] * 4, [0, 1, 2, 3], [0] * 4])
    assert_close(inputs.position_ids[:, 0, places], torch.cat([wide, tall], dim=1))
    assert int(inputs.position_ids[:, 0, int(places[-1]) + 1].unique()) == start + 3 + 2 + 4


def test_losses_of_rows_are_those_of_each_alone(vlm: Qwen25VL) -> None:
    together = vlm(vlm.embed(ROWS, images(), COUNTS))
    for row, shown in alone():
        own = vlm(vlm.embed(ROWS[row : row + 1], shown, [len(shown)]))
        assert_close(together.nll[row], own.nll[0], rtol=0, atol=1e-5)


def test_left_padded_answers_and_their_log_probs_are_those_of_each_alone(vlm: Qwen25VL) -> None:
    inputs = vlm.embed(prompts(), images(), COUNTS, for_generation=True)
    samples = vlm.sample_from(inputs, 2, max_new_tokens=5, temperature=1.0, generator=torch.Generator().manual_seed(1))
    scored, _ = vlm.log_probs(vlm.with_answers(inputs, samples.tokens, samples.mask))
    greedy = vlm.sample(prompts(), images(), COUNTS, 1, max_new_tokens=5, temperature=0.0)
    for row, shown in alone():
        own = vlm.embed(prompts()[row : row + 1], shown, [len(shown)], for_generation=True)
        tokens, mask = samples.tokens[2 * row : 2 * row + 2], samples.mask[2 * row : 2 * row + 2]
        expected, _ = vlm.log_probs(vlm.with_answers(own, tokens, mask))
        assert_close(scored[2 * row : 2 * row + 2, -5:], expected[:, -5:], rtol=0, atol=1e-4)
        assert_close(samples.log_probs[2 * row : 2 * row + 2], expected[:, -5:], rtol=0, atol=1e-4)
        answer = vlm.sample_from(own, 1, max_new_tokens=5, temperature=0.0)
        assert answer.tokens[0].tolist() == greedy.tokens[row, : answer.tokens.shape[1]].tolist()


def test_labels_and_lengths_are_counted_with_the_sizes_of_each_row() -> None:
    vlm, batch = qwen(), Batch([str(row) for row in range(4)], ROWS, images(), COUNTS)
    lengths = vlm.embed(ROWS, images(), COUNTS).attention_mask.sum(dim=1).tolist()
    assert lengths[2] - lengths[0] > 10
    vlm.max_length = max(length for row, length in enumerate(lengths) if row != 2)
    with pytest.raises(UserError, match="max_length") as caught:
        vlm.check_rows(batch)
    assert caught.value.row == 2
    vlm.check_rows(batch.select([0, 1, 3]))
    kept = batch.select([3, 0, 1])
    assert vlm.count_labels(kept) == int(vlm(vlm.inputs_of(kept)).num_tokens.sum())


def test_a_square_tower_names_the_size_that_it_cannot_take() -> None:
    model = llava()
    square = torch.zeros(3, model.image_size, model.image_size)
    with pytest.raises(UserError, match=r"data\.image_size: found images of 16x24 pixels, expected the vision tower's"):
        model.embed(ROWS[2:], [square, square, torch.zeros(3, 16, 24), square], [3, 1])
