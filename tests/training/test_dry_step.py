"""Memory of a step whose floats have shapes alone."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods import bridge_parts
from umm_zoo.batch import Batch
from umm_zoo.training.dry_step import step_bytes
from umm_zoo.training.memory import autocast_bytes

WIDTH = 64


def step_of(rows: int, network: nn.Module, losses) -> int:
    network.to("meta")
    batch = Batch([str(row) for row in range(rows)], [[]] * rows, torch.zeros(rows, 3, 8, 8), [1] * rows)
    method = SimpleNamespace(
        parameters=network.parameters, buffers=network.buffers, training_losses=lambda batch: {"loss": losses(network, batch)}
    )
    return step_bytes(method, batch)  # type: ignore[arg-type]


def test_what_lives_at_once_is_added_up() -> None:
    network = nn.Sequential(nn.Linear(192, WIDTH, bias=False), nn.Sigmoid(), nn.Linear(WIDTH, 1, bias=False))

    def losses(network: nn.Module, batch: Batch) -> Tensor:
        return network(torch.stack(batch.images).flatten(1)).sum()

    # the stacked images, what goes into the sigmoid and what comes out of it; the former step's gradients stand beside them
    assert step_of(100, network, losses) == 4 * 100 * (192 + 2 * WIDTH)


def test_attention_keeps_no_matrix_and_lengths_that_numbers_decide_are_known() -> None:
    def losses(network: nn.Module, batch: Batch) -> Tensor:
        length = int(torch.arange(3, device=batch.images[0].device).sum()) * 100  # 300
        tokens = network(batch.images[0].new_zeros(1, length, WIDTH))
        kept = tokens[torch.arange(length)[None] % 2 == 0]  # [150, WIDTH]
        assert kept.shape == (150, WIDTH)
        heads = tokens.view(1, length, 2, WIDTH // 2).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).sum() + kept.sum()

    assert step_of(1, nn.Linear(WIDTH, WIDTH), losses) < 10 * 300 * WIDTH * 4  # the matrix alone would be 2 x 300 x 300 x 4


def test_layers_computed_again_keep_their_input_alone() -> None:
    def losses(again: bool):
        def of(network: nn.Module, batch: Batch) -> Tensor:
            state = torch.stack(batch.images).flatten(1)
            for layer in network:  # type: ignore[attr-defined]
                state = torch.utils.checkpoint.checkpoint(layer, state, use_reentrant=False) if again else layer(state)
            return state.sum()

        return of

    network = nn.ModuleList(nn.Sequential(nn.Linear(192, 768), nn.GELU(), nn.Linear(768, 192)) for _ in range(6))
    assert step_of(50, network, losses(True)) < 0.5 * step_of(50, network, losses(False))


def test_attention_that_is_computed_again_keeps_no_matrix_either() -> None:
    def attend(tokens: Tensor) -> Tensor:
        heads = tokens.view(1, 300, 2, WIDTH // 2).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)

    def losses(network: nn.Module, batch: Batch) -> Tensor:
        tokens = network(batch.images[0].new_zeros(1, 300, WIDTH))
        return torch.utils.checkpoint.checkpoint(attend, tokens, use_reentrant=False).sum()

    assert step_of(1, nn.Linear(WIDTH, WIDTH), losses) < 12 * 300 * WIDTH * 4


def test_numbers_from_python_decide_lengths() -> None:
    def losses(network: nn.Module, batch: Batch) -> Tensor:
        device = batch.images[0].device
        real = torch.arange(5, device=device) < torch.tensor([3, 5], device=device)[:, None]
        return network(batch.images[0].new_zeros(2, 5, WIDTH)[real]).sum()  # three and five

    assert step_of(2, nn.Linear(WIDTH, 9, bias=False), losses) == 4 * WIDTH * (10 + 8)


def test_autocast_keeps_copies_of_what_learns_and_of_what_a_gradient_passes() -> None:
    method = bridge_parts.wemmu(["queries", "connector", "detail"])
    parts = [method.pathway, method.connector, method.detail, method.decoder]  # the codec and the frozen model pass no gradient
    weights = [own.weight for part in parts for own in part.modules() if isinstance(own, nn.Linear | nn.Conv2d)]
    assert autocast_bytes(method, "bf16-mixed") == 2 * sum(weight.numel() for weight in weights)
    assert autocast_bytes(method, "32-true") == autocast_bytes(method, "bf16-true") == 0
