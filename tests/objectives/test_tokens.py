"""Losses of hidden tokens against closed forms; attention of hidden tokens; generation in rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.backbones.janus_parts import JANUS, TEXTS, janus, spread
from umm_zoo.backbones.masked_janus import MaskedJanus, inside_full
from umm_zoo.backbones.unified import NullPrompt
from umm_zoo.blocks.masking import ConfidenceOrder, CosineUnmasking, RandomOrder
from umm_zoo.errors import UserError
from umm_zoo.objectives.tokens import AutoregressiveTokens, MaskedTokens

ERRORS = torch.tensor([0.239545, 0.551445, 3.094923], dtype=torch.float64)


def logits_of(errors: Tensor) -> Tensor:
    """Logits of two codes under which code 0 has these cross-entropies, ``[1, N, 2]``."""
    chance = (-errors).exp()
    return torch.stack([chance.log(), (1 - chance).log()], dim=-1)[None]


def masked(**arguments: object) -> MaskedJanus:
    built = MaskedJanus.from_config(JANUS, unconditional=NullPrompt(), **arguments)  # type: ignore[arg-type]
    spread(built)
    return built.eval()


@pytest.mark.parametrize("weighting, ratios, expected", [("masked_mean", None, 1.667234), ("inverse_ratio", [0.5], 2.222978)])
def test_losses_of_the_paper(weighting: str, ratios: list[float] | None, expected: float) -> None:
    hidden = torch.tensor([[True, False, True]])
    chance = None if ratios is None else torch.tensor(ratios, dtype=torch.float64)
    found = MaskedTokens(weighting=weighting).losses(logits_of(ERRORS), torch.zeros(1, 3).long(), hidden, chance)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_the_expectation_of_the_inverse_ratio_is_the_mean_over_all_tokens() -> None:
    chance, total = 0.3, 0.0
    for hidden in itertools.product([False, True], repeat=3):
        weight = chance ** sum(hidden) * (1 - chance) ** (3 - sum(hidden))
        own = MaskedTokens(weighting="inverse_ratio")
        found = own.losses(logits_of(ERRORS), torch.zeros(1, 3).long(), torch.tensor([hidden]), torch.tensor([chance]))
        total += weight * float(found)
    assert total == pytest.approx(1.295304, abs=1e-5) == float(ERRORS.mean())


def test_one_after_the_other_is_the_mean_of_all() -> None:
    own = janus()
    inputs, ids = own.image_prompt(TEXTS), torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    found, shares = AutoregressiveTokens()(own, inputs, ids)
    assert_close(found.mean(), F.cross_entropy(own.image_logits(inputs, ids).flatten(0, 1), ids.flatten()))
    assert shares.tolist() == [1.0, 1.0]


def test_prompts_are_causal_and_images_full() -> None:
    mask = inside_full(torch.tensor([[False, True, True, True, True], [True, True, True, True, True]]), 3)[:, 0]
    assert mask[0].int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert mask[1, 3:].all() and mask[1, :3].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_known_tokens_are_seen_from_every_place_and_hidden_ones_from_none() -> None:
    own, hidden = masked(), torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, [3, 9]] = True
    inputs, ids = own.image_prompt(TEXTS), torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    before, other = own.masked_logits(inputs, ids, hidden), ids.clone()
    other[:, [3, 9]] = (ids[:, [3, 9]] + 1) % 20
    assert_close(own.masked_logits(inputs, other, hidden), before)
    other[:, 15] = (ids[:, 15] + 1) % 20
    assert not torch.allclose(own.masked_logits(inputs, other, hidden)[:, 0], before[:, 0])


def test_a_row_does_not_depend_on_the_padding_of_its_prompt() -> None:
    own, hidden = masked(), torch.arange(16).expand(2, 16) % 3 == 0
    ids = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    together = own.masked_logits(own.image_prompt(TEXTS), ids, hidden)
    alone = own.masked_logits(own.image_prompt(TEXTS[:1]), ids[:1], hidden[:1])
    assert_close(alone, together[:1], atol=1e-5, rtol=1e-5)
    together.sum().backward()
    assert all(p.grad.isfinite().all() for p in own.language_model.parameters() if p.grad is not None)


def test_prompts_encoded_once_give_the_same_logits() -> None:
    own, hidden = masked(), torch.arange(16).expand(2, 16) % 3 == 0
    inputs, ids = own.image_prompt(TEXTS), torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    prefix = own.prefix(inputs)
    expected = own.masked_logits(inputs, ids, hidden)
    for _ in range(2):  # the prefix does not grow
        assert_close(own.logits_behind(prefix, ids, hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_depends_on_its_prompt_and_seed_alone(scale: float) -> None:
    own, tokens = masked(), MaskedTokens(unmasking=CosineUnmasking(5))
    together = tokens.sample(own, own.image_prompt(TEXTS), [3, 4, 5, 6], scale, 1.0)
    alone = tokens.sample(own, own.image_prompt(TEXTS[1:]), [5], scale, 1.0)
    assert together.ids.shape == (4, 16) and torch.equal(alone.ids[0], together.ids[2])
    assert_close(alone.log_probs[0], together.log_probs[2], atol=1e-4, rtol=1e-4)


def test_guidance_is_one_plus_g_times_the_conditional_minus_g_times_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = masked(), []
    monkeypatch.setattr(
        "umm_zoo.objectives.tokens.draw", lambda logits, *rest: seen.append(logits) or (logits.argmax(-1), logits[:, 0].sigmoid())
    )
    inputs, every = own.image_prompt(TEXTS[:1]), torch.ones(1, 16, dtype=torch.bool)
    MaskedTokens(unmasking=CosineUnmasking(1)).sample(own, inputs, [0], 3.0, 1.0)
    c, u = (own.masked_logits(rows, torch.zeros(1, 16).long(), every)[0] for rows in (inputs, own.unconditional(inputs)))
    assert_close(seen[0], 3 * c - 2 * u, atol=1e-4, rtol=1e-4)


def test_one_round_of_an_exact_model_has_the_model_s_distribution() -> None:
    """A sure model's tokens come out whatever the order; and at temperature 0 every round takes the likeliest."""
    own = masked()
    inputs, every = own.image_prompt(TEXTS[:1]), torch.ones(1, 16, dtype=torch.bool)
    expected = own.masked_logits(inputs, torch.zeros(1, 16).long(), every).argmax(-1)
    tokens = MaskedTokens(unmasking=CosineUnmasking(1), order=RandomOrder())
    assert torch.equal(tokens.sample(own, inputs, [0], 1.0, 0.0).ids, expected)


def test_the_surest_tokens_come_first() -> None:
    own = masked()
    inputs, every = own.image_prompt(TEXTS[:1]), torch.ones(1, 16, dtype=torch.bool)
    first = own.masked_logits(inputs, torch.zeros(1, 16).long(), every)[0].softmax(-1).amax(-1)
    tokens = MaskedTokens(unmasking=CosineUnmasking(4), order=ConfidenceOrder(0.0))
    made = tokens.sample(own, inputs, [0], 1.0, 0.0)
    sure = first.topk(2).indices  # two tokens in the first of four rounds
    assert_close(made.log_probs[0, sure].exp(), first[sure], atol=1e-4, rtol=1e-4)


def test_losses_are_told_apart_by_the_share_of_hidden_tokens() -> None:
    shares, losses = torch.tensor([0.25, 0.26, 1.0, 0.5]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    means, counts = MaskedTokens().losses_by(losses, shares)
    assert [float(own) for own in means.values()] == [1.0, 3.0, 0.0, 3.0] and list(counts.values()) == [1.0, 2.0, 0.0, 1.0]
    assert list(means) == list(MaskedTokens.makes) and list(means)[1] == "image_loss_hidden_50"


def test_models_and_objectives_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="a Janus beside MaskedTokens"):
        MaskedTokens(unmasking=CosineUnmasking(4)).check(janus())
    with pytest.raises(UserError, match="none beside a MaskedJanus"):
        AutoregressiveTokens().check(masked())
    with pytest.raises(UserError, match="18 rounds for 16 tokens"):
        MaskedTokens().check(masked())
    own = masked()
    with pytest.raises(UserError, match="come in rounds"):
        own.sample_image(own.image_prompt(TEXTS), [0, 1])
