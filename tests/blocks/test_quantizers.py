"""Quantizers, from numbers worked out by hand or by independent formulas."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.blocks.quantizers import (
    BinaryQuantizer,
    EMAQuantizer,
    FiniteScalarQuantizer,
    NoQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQuantizer,
    VectorQuantizer,
)
from umm_zoo.blocks.quantizers.binary import entropies
from umm_zoo.errors import UserError
from umm_zoo.testing import check_block

KINDS: dict[str, Callable[[], Quantizer]] = {
    "vq": lambda: VectorQuantizer(5, 33, normalised=False),
    "vq-l2": lambda: VectorQuantizer(5, 33),
    "ema": lambda: EMAQuantizer(5, 33),
    "sim": lambda: SimVQuantizer(5, 33, basis_dim=7),
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 5, 5]),
    "fsq-long": lambda: FiniteScalarQuantizer([8, 8, 8, 8, 8, 7]),
    "lfq": lambda: BinaryQuantizer(11, spherical=False),
    "bsq": lambda: BinaryQuantizer(18),
    "bsq-25": lambda: BinaryQuantizer(25),
    "bsq-28": lambda: BinaryQuantizer(28),
    "bsq-36": lambda: BinaryQuantizer(36, code_bits=16),
    "rvq": lambda: ResidualQuantizer([VectorQuantizer(5, 33, normalised=False) for _ in range(3)]),
    "rvq-shared": lambda: ResidualQuantizer([EMAQuantizer(5, 33)], repeats=4),
}


def double(*rows: tuple[float, ...]) -> Tensor:
    """Tokens [1, N, d] in float64."""
    return torch.tensor(rows, dtype=torch.float64)[None]


def table(quantizer: VectorQuantizer, *codes: tuple[float, ...]) -> VectorQuantizer:
    quantizer.double()
    quantizer.embedding.weight.data = torch.tensor(codes, dtype=torch.float64)
    return quantizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_values_belong_to_each_other_bit_for_bit(kind: str, dtype: torch.dtype):
    torch.manual_seed(0)
    quantizer = KINDS[kind]().to(dtype).eval()
    found = quantizer(torch.randn(2, 50, quantizer.dim).to(dtype))
    assert found.codes.dtype == torch.long and found.codes.shape == (2, 50, quantizer.codes_per_token)
    assert int(found.codes.min()) >= 0 and int(found.codes.max()) < quantizer.num_codes <= 2**16
    assert torch.equal(quantizer.values_of(found.codes), found.embeddings) and found.embeddings.dtype == dtype
    assert found.losses == {}


@pytest.mark.parametrize("kind", ["bsq", "bsq-25", "bsq-28", "bsq-36", "lfq", "fsq", "fsq-long"])
def test_every_code_survives_its_value(kind: str):
    quantizer = KINDS[kind]().eval()
    if isinstance(quantizer, BinaryQuantizer):
        codes = torch.stack([torch.randint(2**size, (2, 200)) for size in quantizer.sizes], dim=-1)
    else:
        assert isinstance(quantizer, FiniteScalarQuantizer)
        digits = torch.stack([torch.randint(int(level), (2, 200)) for level in quantizer.levels], dim=-1)
        codes = (digits * quantizer.strides).sum(dim=-1, keepdim=True) if quantizer.single else digits
    scaled = quantizer.values_of(codes)
    if isinstance(quantizer, FiniteScalarQuantizer):  # the inverse of its bound
        half, offset = (quantizer.levels - 1) * 1.001 / 2, torch.where(quantizer.levels % 2 == 0, 0.5, 0.0)
        scaled = ((scaled * quantizer.halves + offset) / half).atanh() - (offset / half).atanh()
    assert torch.equal(quantizer(scaled).codes, codes)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_known_without_numbers(kind: str):
    """So that ``fit --check`` tries a step on the meta device."""
    with torch.device("meta"):
        quantizer = KINDS[kind]()
        found = quantizer(torch.empty(2, 6, quantizer.dim))
    assert found.embeddings.shape == (2, 6, quantizer.dim) and found.codes.shape == (2, 6, quantizer.codes_per_token)


@pytest.mark.parametrize("kind", KINDS)
def test_contract_of_blocks(kind: str):
    torch.manual_seed(1)
    unused = [name for name, _ in KINDS[kind]().named_parameters()]  # tables learn from losses alone
    check_block(KINDS[kind](), unused=unused)


def test_binary_codes_on_the_sphere():
    quantizer = BinaryQuantizer(4, entropy=1.0, diversity=0.0).double()
    found = quantizer(double((3, -4, 0, 12)))
    assert_close(found.embeddings, double((0.5, -0.5, -0.5, 0.5)))
    assert found.codes.tolist() == [[[0b1001]]]  # a zero is a zero bit
    assert_close(found.losses["token_entropy"], torch.tensor(2.4065558219190, dtype=torch.float32))
    assert_close(quantizer(double((3, 4, -1, -2))).codes, torch.tensor([[[0b1100]]]))  # the first channel is the highest bit


def test_undecided_bits_alone_have_entropy_when_cold():
    found = BinaryQuantizer(4, inverse_temperature=100.0)(double((3, -4, 0, 12)).float())
    assert_close(found.losses["token_entropy"], torch.tensor(math.log(2)))


def test_probabilities_of_bits():
    logits = 4 * double((3 / 13, -4 / 13, 0, 12 / 13)) / 2
    assert_close(logits.sigmoid(), double((0.6133790784625, 0.3508318750112, 0.5, 0.8636748877149)))


@pytest.mark.parametrize(
    ("tokens", "group", "code"),
    [
        (((0.6, 0.8), (0.6, -0.8)), 1, 1.1241778535691),
        (((0.6, 0.8), (0.6, -0.8)), 2, 1.1241778535691),
        (((0.6, 0.8), (-0.6, -0.8)), 1, 2 * math.log(2)),
        (((0.6, 0.8), (-0.6, -0.8)), 2, 1.2199475999033),  # a group sees that its bits depend on each other
    ],
)
def test_entropies_of_two_tokens(tokens: tuple[tuple[float, ...], ...], group: int, code: float):
    found = entropies(4 * double(*tokens) / 2**0.5, group)
    assert_close(torch.stack(found), torch.tensor([0.7433063779417, code], dtype=torch.float64))


def test_loss_of_binary_codes():
    quantizer = BinaryQuantizer(2, entropy=3.0, diversity=0.5, inverse_temperature=2.0, commitment=0.7)
    tokens = double((0.6, 0.8), (0.6, -0.8)).float()
    losses = quantizer(2 * tokens).losses
    token, code = entropies(4 * 2.0 * tokens / 2**0.5)
    squared = (0.5**0.5 - 0.6) ** 2 + (0.5**0.5 - 0.8) ** 2
    assert_close(losses["commitment"], torch.tensor(squared))
    assert_close(losses["loss"], 3.0 * (token - 0.5 * code) / 2.0 + 0.7 * squared)


def test_groups_of_bits_against_all_codes_written_out():
    torch.manual_seed(0)
    u = F.normalize(torch.randn(1, 40, 6, dtype=torch.float64), dim=-1)
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64) / 6**0.5
    p = (2 * 1.7 * u[0] @ codes.T).softmax(dim=-1)  # [40, 64]
    token, code = entropies(4 * 1.7 * u / 6**0.5, group=6)
    assert_close(token, -(p * p.log()).sum(dim=-1).mean())
    assert_close(code, -(p.mean(dim=0) * p.mean(dim=0).log()).sum())


@pytest.mark.parametrize(
    ("ste_scale", "expected"),
    [("paper", (0.128, -0.096)), ("release", (0.0905096679919, -0.0678822509939))],
)
def test_gradient_through_the_sphere(ste_scale: str, expected: tuple[float, float]):
    latents = double((3, 4)).requires_grad_()
    BinaryQuantizer(2, ste_scale=ste_scale).double()(latents).embeddings[..., 0].sum().backward()  # type: ignore[arg-type]
    assert_close(latents.grad, double(expected))
    assert abs(float((latents.detach() * latents.grad).sum())) < 1e-12  # type: ignore[operator]  # nothing along the radius


@pytest.mark.parametrize(("bits", "expected"), [(9, 0.359375), (18, 0.3819243084), (28, 0.3899221946), (36, 0.3931120147)])
def test_error_on_the_sphere_hardly_grows_with_the_bits(bits: int, expected: float):
    torch.manual_seed(0)
    u = F.normalize(torch.randn(1, 40_000, bits), dim=-1)
    error = (BinaryQuantizer(bits).eval()(u).embeddings - u).square().sum(dim=-1)
    assert abs(float(error.mean()) - expected) < 4 * float(error.std()) / 200


def test_lookup_free_codes_are_signs():
    found = BinaryQuantizer(3, spherical=False, entropy=0.0).double()(double((0.2, -7.0, 0.0)))
    assert_close(found.embeddings, double((1, -1, -1)))
    assert found.codes.item() == 0b100


@pytest.mark.parametrize(
    ("levels", "values", "codes"),
    [
        ([8, 5, 5, 5], ((0, 0, 0, 0), (0.5, -1, 0.5, -0.5), (0.75, -1, 1, -1)), (500, 326, 167)),
        ([7, 5, 5, 5], ((0, 0, 0, 0), (2 / 3, -1, 0.5, -0.5), (1, -1, 1, -1)), (437, 285, 146)),
        ([8, 8, 8, 8], ((0, 0, 0, 0), (0.5, -0.75, 0.25, -0.25), (0.75, -1, 0.75, -1)), (2340, 1870, 455)),
    ],
)
def test_finite_scalars(levels: list[int], values: tuple[tuple[float, ...], ...], codes: tuple[int, ...]):
    found = FiniteScalarQuantizer(levels).double()(double((0, 0, 0, 0), (1, -1, 0.3, -0.3), (9, -9, 9, -9)))
    assert_close(found.embeddings, double(*values))
    assert found.codes[0, :, 0].tolist() == list(codes)


def test_gradient_of_finite_scalars_keeps_the_slope_of_the_tanh():
    latents = double((0.3, -0.2)).requires_grad_()
    FiniteScalarQuantizer([5, 5]).double()(latents).embeddings.sum().backward()
    half = 4 * 1.001 / 2
    assert_close(latents.grad, half / 2 * (1 - latents.detach().tanh() ** 2))


@pytest.mark.parametrize("group", [1, 9])
def test_gradients_stay_finite_where_bits_are_certain(group: int):
    latents = torch.tensor([[[1.0] * 9, [1.0] * 4 + [-1.0] * 5]]).requires_grad_()
    quantizer = BinaryQuantizer(9, entropy=1.0, inverse_temperature=100.0, entropy_bits=group)
    quantizer(latents).losses["loss"].backward()
    assert latents.grad is not None and latents.grad.isfinite().all()


CODES, TOKENS = ((0, 0), (1, 0), (0, 2)), ((0.9, 0.2), (0.1, 1.2), (0.4, 0.1))


def test_nearest_codes_and_their_loss():
    quantizer = table(VectorQuantizer(2, 3, normalised=False), *CODES)
    found = quantizer(double(*TOKENS))
    assert found.codes.flatten().tolist() == [1, 2, 0]
    losses = {name: float(value.detach()) for name, value in found.losses.items()}
    assert losses == pytest.approx({"codebook": 0.145, "commitment": 0.145, "loss": 0.18125})


def test_unit_vectors_choose_by_direction():
    codes, tokens = ((3.0, 0.0), (0.0, 0.1), (1.0, 1.0)), double(*TOKENS)
    assert table(VectorQuantizer(2, 3), *codes)(tokens).codes.flatten().tolist() == [0, 1, 0]
    assert table(VectorQuantizer(2, 3, normalised=False), *codes)(tokens).codes.flatten().tolist() == [2, 2, 1]


def test_codebook_term_moves_codes_and_commitment_moves_latents():
    quantizer = table(VectorQuantizer(2, 3, normalised=False), *CODES)
    latents = double(*TOKENS).requires_grad_()
    losses = quantizer(latents).losses
    (moved,) = torch.autograd.grad(losses["codebook"], quantizer.embedding.weight, retain_graph=True)
    chosen = quantizer.embedding.weight.detach()[[1, 2, 0]]
    expected = torch.zeros_like(moved).index_add(0, torch.tensor([1, 2, 0]), 2 * (chosen - latents[0].detach()) / 6)
    assert_close(moved, expected)
    (pulled,) = torch.autograd.grad(losses["commitment"], latents)
    assert_close(pulled[0], 2 * (latents[0].detach() - chosen) / 6)


def test_entropy_of_a_table_against_its_formula():
    quantizer = table(VectorQuantizer(2, 3, normalised=False, entropy=1.0, codebook=0.0, commitment=0.0, temperature=0.5), *CODES)
    distances = (double(*TOKENS)[0][:, None] - quantizer.embedding.weight[None]).square().sum(dim=-1)
    p = (-distances / 0.5).softmax(dim=1)
    expected = -(p * p.log()).sum(dim=1).mean() + (p.mean(dim=0) * p.mean(dim=0).log()).sum()
    assert_close(quantizer(double(*TOKENS)).losses["loss"], expected.float())
    cold = table(VectorQuantizer(2, 3, normalised=False, entropy=1.0, temperature=1e-4), *CODES)
    latents = double(*TOKENS).requires_grad_()
    cold(latents).losses["loss"].backward()
    assert latents.grad is not None and latents.grad.isfinite().all()


def test_a_search_in_parts_finds_the_same(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(5, 33), torch.randn(1, 40, 5)
    whole = quantizer(latents).codes
    monkeypatch.setattr("umm_zoo.blocks.quantizers.vector._DISTANCES", 100)  # three latents at a time
    assert torch.equal(quantizer(latents).codes, whole)


def test_codes_are_those_of_float32_under_autocast():
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(8, 4096), torch.randn(1, 500, 8)
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer(latents).codes
    assert torch.equal(codes, quantizer(latents).codes)


def test_levels_are_those_of_float32_for_latents_in_half_precision():
    torch.manual_seed(0)
    for levels in ([8, 5, 5, 5], [2, 2], [200, 3]):
        quantizer, latents = FiniteScalarQuantizer(levels), 2 * torch.randn(1, 500, len(levels)).bfloat16()
        assert torch.equal(quantizer(latents).codes, quantizer(latents.float()).codes)


def moving(**arguments: float) -> EMAQuantizer:
    quantizer = EMAQuantizer(2, 2, **arguments).double()  # type: ignore[arg-type]
    for buffer in (quantizer.codebook, quantizer.sums):
        buffer.copy_(torch.tensor(((0.0, 0.0), (1.0, 1.0))))
    return quantizer


BATCH = ((0.8, 1.0), (1.2, 1.4), (0.1, -0.1))


@pytest.mark.parametrize("parts", [(3,), (1, 2)], ids=["one micro-batch", "two"])
def test_moving_averages_take_in_a_step_at_once(parts: tuple[int, ...]):
    quantizer = moving()
    for part in double(*BATCH).split(parts, dim=1):
        quantizer(part)
    assert_close(quantizer.codebook, torch.tensor(((0.0, 0.0), (1.0, 1.0)), dtype=torch.float64))  # not before the step
    quantizer.after_step()
    assert_close(quantizer.counts, torch.tensor((1.0, 1.01), dtype=torch.float64))
    smooth = 2.01 * (1.01 + 1e-5) / (2.01 + 2e-5)  # counts 1 and 1.01
    expected = torch.tensor(((0.001, -0.001), (1.01 / smooth, 1.014 / smooth)), dtype=torch.float64)
    assert_close(quantizer.codebook, expected, atol=1e-8, rtol=0)


def test_a_step_without_latents_moves_nothing():
    quantizer = moving(restart_below=0.5)
    quantizer.counts.fill_(0.1)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(double(*BATCH))
    quantizer.after_step()
    for name in ("counts", "sums", "codebook"):
        assert torch.equal(quantizer.state_dict()[name], before[name])


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_of_a_step_that_is_skipped_is_remembered(wrapped: bool):
    table = moving()
    quantizer = ResidualQuantizer([table], repeats=2) if wrapped else table
    quantizer(double((float("nan"), 1.0)))
    quantizer.forget_step()
    before = copy.deepcopy(table.state_dict())
    quantizer.after_step()
    for name in ("counts", "sums"):
        assert torch.equal(table.state_dict()[name], before[name])
    assert table.codebook.isfinite().all()


def test_a_code_that_is_hardly_used_becomes_a_latent_of_the_step():
    torch.manual_seed(0)
    quantizer = moving(restart_below=0.5)
    quantizer.counts.copy_(torch.tensor((0.1, 1.0)))
    quantizer(double((0.8, 1.0), (1.2, 1.4)))  # both of the second code
    quantizer.after_step()
    assert quantizer.codebook[0].tolist() in ([0.8, 1.0], [1.2, 1.4]) and quantizer.counts[0] == 1
    assert_close(quantizer.codebook[1], quantizer.sums[1] / quantizer.counts[1], atol=1e-4, rtol=0)


def test_a_linear_map_of_a_fixed_table():
    quantizer = SimVQuantizer(2, 3, commitment=1.0).double()
    quantizer.embedding.weight.copy_(torch.tensor(CODES))
    torch.nn.init.eye_(quantizer.embedding_proj.weight)
    torch.nn.init.zeros_(quantizer.embedding_proj.bias)
    twin = table(VectorQuantizer(2, 3, normalised=False, commitment=1.0), *CODES)
    found, expected = quantizer(double(*TOKENS)), twin(double(*TOKENS))
    assert torch.equal(found.codes, expected.codes)
    assert_close(found.losses, expected.losses)
    before = quantizer.book().detach()
    torch.optim.SGD(quantizer.parameters(), 0.1).zero_grad()
    found.losses["loss"].backward()
    torch.optim.SGD(quantizer.parameters(), 0.1).step()
    assert (quantizer.book() - before).norm(dim=1).min() > 1e-3  # all of them, those too that nothing chose
    assert {name for name, _ in quantizer.named_parameters()} == {"embedding_proj.weight", "embedding_proj.bias"}


def test_residual_codes_and_their_commitment():
    stage = EMAQuantizer(2, 4, commitment=1.0).double()
    stage.codebook.copy_(torch.tensor(((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.25))))
    quantizer = ResidualQuantizer([stage], repeats=2)
    latents = double((1.3, 0.2)).requires_grad_()
    found = quantizer(latents)
    assert found.codes.tolist() == [[[1, 3]]]
    assert_close(found.embeddings, double((1.25, 0.25)))
    assert_close(float(found.losses["commitment"].detach()), 0.03375)  # (.065 + .0025) / 2
    found.losses["loss"].backward()
    cumulative = ((double((1.3, 0.2)) - double((1.0, 0.0))) + (double((1.3, 0.2)) - double((1.25, 0.25)))) / 2
    assert_close(latents.grad, cumulative)
    quantizer.after_step()
    assert_close(stage.counts.sum(), torch.tensor(0.99 * 4 + 0.01 * 2, dtype=torch.float64))  # both depths, one update


def test_noise_of_representation_autoencoders():
    torch.manual_seed(0)
    quantizer, latents = NoQuantizer(6, noise=0.8), torch.zeros(20_000, 2, 6)
    assert abs(float(quantizer(latents).embeddings.square().mean()) - 0.8**2 / 3) < 2e-3
    assert torch.equal(quantizer.eval()(latents).embeddings, latents)


@pytest.mark.parametrize(
    "made",
    [
        lambda: BinaryQuantizer(40, code_bits=17),
        lambda: BinaryQuantizer(40, entropy_bits=13),
        lambda: VectorQuantizer(4, 2**16 + 1),
        lambda: FiniteScalarQuantizer([5, 1]),
        lambda: ResidualQuantizer([VectorQuantizer(4, 8)]),
        lambda: ResidualQuantizer([]),
        lambda: ResidualQuantizer([EMAQuantizer(4, 8), EMAQuantizer(5, 8)]),
    ],
)
def test_impossible_arguments_are_refused(made: Callable[[], Quantizer]):
    with pytest.raises((ValueError, UserError), match="expected"):
        made()
