"""Bridges with input images and targets of unequal sizes in one batch: as each row alone."""

from __future__ import annotations

import pytest
import torch
from bridge_parts import PROMPTS, encoded, metaquery, wemmu
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.batch import Batch
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.conditioning import ConditionDropout, Guidance, Prompts
from umm_zoo.objectives.flow_matching import FlowMatching, Interpolant

COUNTS = (1, 0, 2, 1)
SHOWN = ((32, 32), (16, 40), (24, 24), (40, 16))
WANTED = ((8, 4), (4, 12), (8, 4), (6, 6))


def unequal() -> Batch:
    """An edit, a text-to-image row, a composition and an edit; the codec's factor is 2."""
    generator = torch.Generator().manual_seed(1)
    shown, wanted = ([torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes] for sizes in (SHOWN, WANTED))
    turns = [[{"role": "user", "text": PROMPTS[count]}] for count in COUNTS]
    return Batch([f"row {i}" for i in range(4)], turns, shown, list(COUNTS), wanted)  # type: ignore[arg-type]


class StillFlow(FlowMatching):
    """Its time and noise depend on the latent alone."""

    def draw(self, latents: Tensor, generator: torch.Generator | None = None) -> Interpolant:
        return self.interpolate(latents, latents.mean(dim=(1, 2, 3)).sigmoid(), (9 * latents).sin())


def bridge(kind: str) -> Bridge:
    """One whose steps are not random."""
    make = {"wemmu": wemmu, "metaquery": metaquery}[kind]
    method = make(objective=StillFlow(num_steps=2), dropout=ConditionDropout(text_to_image=0.0))
    if kind == "wemmu":
        method.queries.forward = lambda context, grid, generator=None: (
            torch.arange(grid.num_cells * 32.0).sin().view(1, -1, 32).expand(len(context.values), -1, -1)
        )
    return method


def gradients(method: Bridge) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in method.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("kind", ["wemmu", "metaquery"])
def test_the_loss_of_a_batch_is_the_mean_of_its_rows_alone_and_so_is_its_gradient(kind: str) -> None:
    method, batch = bridge(kind), unequal()
    losses = method.training_losses(batch)
    tokens = sum(int(count.useful) for count in method.token_counts.values())
    losses["loss"].backward()
    found, total = gradients(method), 0
    method.zero_grad(set_to_none=True)
    alone = []
    for row in range(4):
        own = method.training_losses(batch.select([row]))
        (own["loss"] / 4).backward()
        alone.append(own["loss"].detach())
        total += sum(int(count.useful) for count in method.token_counts.values())
    assert_close(losses["loss"].detach(), torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)
    assert tokens == total and len({round(float(loss), 6) for loss in alone}) == 4
    for name, expected in gradients(method).items():
        assert_close(found[name], expected, rtol=1e-3, atol=1e-5)


def test_details_lie_at_the_places_of_their_own_image() -> None:
    method, batch = wemmu(), unequal()
    together = encoded(method, batch).details
    grids = [[(4, 4)], [], [(2, 5), (3, 3)], [(5, 2)]]
    assert together.tokens.shape == (4, 19, 32)
    for row, own in enumerate(grids):
        cells = [h * w for h, w in own]
        expected = [place for place, count in enumerate(cells) for _ in range(count)]
        assert together.images[row].tolist() == expected + [-1] * (19 - len(expected))
        alone = encoded(method, batch.select([row])).details
        assert_close(together.tokens[row, : len(expected)], alone.tokens[0], rtol=0, atol=1e-5)
        length = len(expected)
        shift = together.positions[:, row, :1] - alone.positions[:, 0, :1] if length else torch.zeros(3, 1, dtype=torch.long)
        assert torch.equal(together.positions[:, row, :length] - shift, alone.positions[:, 0]) and not shift.any()
    second = together.positions[:, 2, 10:19]  # of the second image of row 2, 3 x 3
    offsets = second - second[:, :1]
    assert offsets.tolist() == [[0] * 9, [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3]


def test_chosen_rows_of_an_encoded_prompt_go_on_as_in_the_whole() -> None:
    method = wemmu()
    prompt, queries = encoded(method, unequal()), torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    length = prompt.prefix.attention_mask.shape[1]
    whole = method.condition(prompt, queries, grid := method.codec.latent_grid(4, 6)).values
    assert_close(method.condition(prompt.select([3, 1]), queries[[3, 1]], grid).values, whole[[3, 1]], rtol=0, atol=1e-5)
    assert prompt.prefix.cache.get_seq_length() == length and len(prompt.prefix.cache.layers[0].keys) == 4
    assert prompt.select(range(4)) is prompt


def test_black_images_keep_their_own_sizes() -> None:
    shown = Prompts("", "", black_images=True).apply(unequal(), ["text", "nothing", "nothing", "full"])
    assert [tuple(image.shape[1:]) for image in shown.images] == list(SHOWN)
    assert [float(image.max()) == -1 for image in shown.images] == [True, True, True, False]


def test_images_of_requests_of_unequal_sizes_are_those_of_each_alone() -> None:
    method, batch = wemmu(), unequal()
    texts, shown = batch.user_texts(), [batch.images_of(row) for row in range(4)]
    settings = {"guidance": Guidance(2.0, 1.5, 2.0, 2.0), "size": (8, 12)}
    together = method.sample(texts, shown, seed=3, **settings)
    for row in range(4):
        alone = method.sample(texts[row : row + 1], shown[row : row + 1], 3 + row, **settings)
        assert_close(together[row], alone[0], rtol=0, atol=1e-4)


def test_targets_that_the_decoder_cannot_make_are_named() -> None:
    method, batch = wemmu(), unequal()
    batch.targets[1] = torch.zeros(3, 4, 9)
    with pytest.raises(ValueError, match=r"images of \[4, 9\] pixels, expected multiples of 2"):
        method.training_losses(batch)
