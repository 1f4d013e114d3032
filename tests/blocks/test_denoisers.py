"""The denoiser head against an independent derivation, and the regression heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.references.ross_reference import denoise, denoiser_weights, position_vector, time_vector
from tools.ross_weights import head_from_release
from umm_zoo.batch import Tokens
from umm_zoo.blocks.denoisers import AttentionRegressionHead, DenoiserHead, MLPRegressionHead
from umm_zoo.blocks.transformer import as_map, as_tokens, position_table, time_embedding
from umm_zoo.objectives.gaussian import GaussianNoisePrediction

S, A, C, B = 0.841470984808, 0.009999833334, 0.540302305868, 0.999950000417


def randomised(head: DenoiserHead, seed: int = 0) -> DenoiserHead:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in head.named_parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.15 if "weight" in name else 0.3))
    return head


def small_head(width: int = 32, grid: int = 3, **changes: int | bool) -> DenoiserHead:
    return DenoiserHead(24, grid, channels=8, width=width, depth=2, **changes)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0, [1, 1, 0, 0]),
        (1, [C, B, S, A]),
        (999, [0.999649852981, -0.844469696289, -0.026460752737, -0.535603334614]),
    ],
)
def test_time_embedding_of_size_four(t, expected):
    found = time_embedding(torch.tensor([t], dtype=torch.float64), 4)[0]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_time_embedding_of_other_sizes():
    one = torch.tensor([1], dtype=torch.float64)
    eight = [C, 0.995004165278, B, 0.9999995, S, 0.099833416647, 0.009999833334, 0.000999999833]
    assert_close(time_embedding(one, 8)[0], torch.tensor(eight, dtype=torch.float64), rtol=0, atol=1e-10)
    assert_close(time_embedding(one, 5)[0], torch.tensor([C, B, S, A, 0], dtype=torch.float64), rtol=0, atol=1e-10)
    long = time_embedding(torch.tensor([0, 1, 500, 999]), 256)
    assert_close(long.square().sum(1), torch.full((4,), 128.0))
    entries = torch.tensor([C, 0.597375325081, 0.999999994226, S, 0.801961795215, 0.000107460783])
    assert_close(long[1, [0, 1, 127, 128, 129, 255]], entries, rtol=0, atol=1e-7)
    assert_close(long[2].double(), time_vector(500), rtol=0, atol=1e-4)


def test_position_table():
    zero, one = [0.0, 0, 1, 1], [S, A, C, B]
    expected = torch.tensor([zero + zero, one + zero, zero + one, one + one], dtype=torch.float64)
    assert_close(position_table(2, 8), expected, rtol=0, atol=1e-11)
    table = position_table(5, 1024)
    assert_close(table.square().sum(1), torch.full((25,), 512.0, dtype=torch.float64))
    assert_close(table[13], position_vector(2, 3, 1024), rtol=0, atol=1e-12)
    assert torch.equal(table[0, 512:], table[1, 512:]) and not torch.equal(table[0, :512], table[1, :512])


def test_grid_is_in_raster_order():
    grid = torch.arange(12.0).reshape(1, 3, 2, 2)
    assert as_tokens(grid)[0, 1].tolist() == [1, 5, 9]
    assert torch.equal(as_map(as_tokens(grid)), grid)
    with pytest.raises(ValueError, match="square grid"):
        as_map(torch.zeros(1, 6, 3))


@pytest.mark.parametrize("depth", [1, 3])
def test_output_against_the_derivation(depth):
    generator = torch.Generator().manual_seed(depth)
    weights = denoiser_weights(24, 4, 8, 64, depth, generator)
    head = head_from_release(weights)
    noisy, states = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(2, 16, 24, generator=generator)
    found = head(noisy, torch.tensor([7, 993]), Tokens(states))
    double = {name: tensor.double() for name, tensor in weights.items()}
    for row, t in enumerate((7, 993)):
        expected = denoise(double, noisy[row].double(), t, states[row].double())
        assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_double_precision_matches_to_rounding():
    weights = {k: v.double() for k, v in denoiser_weights(12, 3, 8, 32, 2, torch.Generator().manual_seed(1)).items()}
    head = head_from_release(weights)
    noisy, states = torch.randn(1, 8, 3, 3).double(), torch.randn(1, 9, 12).double()
    found = head(noisy, torch.tensor([0], dtype=torch.float64), Tokens(states))
    assert_close(found[0], denoise(weights, noisy[0], 0, states[0]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("condition_dim", "grid", "expected"),
    [(3584, 24, 64_474_176), (3584, 27, 64_630_848), (4096, 24, 64_998_464), (4096, 27, 65_155_136), (5120, 24, 66_047_040)],
)
def test_number_of_parameters(condition_dim, grid, expected):
    with torch.device("meta"):
        head = DenoiserHead(condition_dim, grid, trained_positions=True)
    assert sum(p.numel() for p in head.parameters()) == expected
    assert len(head.state_dict()) == 43


def test_deeper_heads_of_the_release():
    with torch.device("meta"):
        counts = [
            sum(t.numel() for t in DenoiserHead(3584, 27, width=width, depth=depth).state_dict().values())
            for depth, width in ((8, 1280), (12, 1536))
        ]
    assert counts == [247_018_304, 524_186_176]


def test_positions_are_a_buffer_unless_trained():
    frozen, trained = small_head(), small_head(trained_positions=True)
    assert "positions" not in dict(frozen.named_parameters()) and "positions" in dict(trained.named_parameters())
    assert frozen.state_dict().keys() == trained.state_dict().keys()
    assert torch.equal(frozen.positions, trained.positions)


def test_width_must_be_a_multiple_of_sixteen():
    with pytest.raises(ValueError, match=r"width: found 40, expected a multiple of heads \(16\)"):
        small_head(width=40)


def test_initialisation():
    head = DenoiserHead(24, 3, width=64)
    zero = {name for name, tensor in head.named_parameters() if not tensor.any()}
    modulations = {f"blocks.{i}.modulation.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert modulations | {"final_modulation.weight", "out.weight", "out.bias"} <= zero
    assert all(name in zero for name, _ in head.named_parameters() if name.endswith("bias"))
    for layer in (head.time_in[0], head.time_in[2], head.condition_in):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    bound = (6 / (64 + 192)) ** 0.5  # Xavier-uniform of a [192, 64] matrix
    assert float(head.blocks[0].attention.qkv.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(head.latent_in.weight.detach().abs().max()) == pytest.approx((6 / 128) ** 0.5, rel=0.01)


def test_fresh_output_is_zero():
    assert not small_head()(torch.randn(2, 8, 3, 3), torch.tensor([3, 900]), Tokens(torch.randn(2, 9, 24))).any()


def test_condition_gets_its_first_gradient_at_the_third_update():
    torch.manual_seed(0)
    head, objective = small_head(), GaussianNoisePrediction(num_draws=2)
    optimizer, norms = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0), []
    for _ in range(3):
        states = torch.randn(2, 9, 24, requires_grad=True)
        optimizer.zero_grad()
        objective.losses(head, torch.randn(2, 8, 3, 3), Tokens(states)).mean().backward()
        norms.append(float(states.grad.abs().sum()))
        optimizer.step()
    assert norms[0] == 0 and norms[1] == 0 and norms[2] > 0


def test_every_parameter_gets_a_gradient_once_nothing_is_zero():
    head = randomised(small_head(trained_positions=True))
    head(torch.randn(2, 8, 3, 3), torch.tensor([3, 900]), Tokens(torch.randn(2, 9, 24))).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in head.parameters())


def changed_tokens(head: DenoiserHead) -> list[int]:
    noisy, states = torch.randn(1, 8, 3, 3), torch.randn(1, 9, 24)
    other = states.clone()
    other[0, 4] += 1
    first, second = (as_tokens(head(noisy, torch.tensor([50]), Tokens(s)))[0] for s in (states, other))
    return [i for i in range(9) if not torch.equal(first[i], second[i])]


def test_condition_of_a_token_acts_on_it_alone_until_attention_mixes():
    head = randomised(small_head())
    assert changed_tokens(head) == list(range(9))
    with torch.no_grad():
        for block in head.blocks:
            block.attention.out.weight.zero_()
            block.attention.out.bias.zero_()
    assert changed_tokens(head) == [4]


def test_permuting_tokens_conditions_and_positions_permutes_the_output():
    head, order = randomised(small_head()), torch.randperm(9)
    noisy, states, t = torch.randn(1, 9, 8), torch.randn(1, 9, 24), torch.tensor([50])
    first = as_tokens(head(as_map(noisy), t, Tokens(states)))
    head.positions = head.positions[:, order]
    second = as_tokens(head(as_map(noisy[:, order]), t, Tokens(states[:, order])))
    assert_close(second, first[:, order])


@pytest.mark.parametrize(
    ("noisy", "states", "message"),
    [((2, 8, 3, 2), (2, 9, 24), r"DenoiserHead\.noisy: found"), ((2, 8, 3, 3), (2, 9, 23), r"DenoiserHead\.condition: found")],
)
def test_other_shapes_are_refused(noisy: tuple[int, ...], states: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        small_head()(torch.zeros(noisy), torch.zeros(2), Tokens(torch.zeros(states)))


@pytest.mark.parametrize(
    "head", [MLPRegressionHead(24, 8, 1), MLPRegressionHead(24, 8), AttentionRegressionHead(24, 3, 8, width=32)]
)
def test_regression_heads_predict_on_the_grid(head):
    found: Tensor = head(Tokens(torch.randn(2, 9, 24)))
    assert found.shape == (2, 8, 3, 3)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_regression_layers_are_those_of_the_release():
    linear, mlp = MLPRegressionHead(24, 8, 1), MLPRegressionHead(24, 8, 2)
    assert [tuple(p.shape) for p in linear.parameters()] == [(8, 24), (8,)]
    assert [tuple(p.shape) for p in mlp.parameters()] == [(24, 24), (24,), (8, 24), (8,)]
    with pytest.raises(ValueError, match="found 0, expected 1 or more"):
        MLPRegressionHead(24, 8, 0)


def test_control_head_has_the_size_of_the_denoiser():
    with torch.device("meta"):
        control, head = AttentionRegressionHead(3584, 27), DenoiserHead(3584, 27)
    sizes = [sum(p.numel() for p in h.parameters()) for h in (control, head)]
    assert 0.93 < sizes[0] / sizes[1] < 1.0
