"""Drawing and scoring tokens, without any model."""

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.generation import append_answers, decode, label_log_probs, nucleus
from umm_zoo.backbones.templates import IGNORE
from umm_zoo.errors import UserError

STOP, PAD = 3, 4


def one_hot(*tokens):
    return torch.nn.functional.one_hot(torch.tensor(tokens), 5) * 20.0


def test_each_row_stops_for_itself():
    script = iter([one_hot(STOP, 1), one_hot(2, STOP), one_hot(1, 1)])
    seen = []
    tokens, mask, log_probs = decode(lambda drawn: seen.append(drawn.tolist()) or next(script), one_hot(0, 0), [STOP], PAD, 9)
    assert tokens.tolist() == [[0, STOP, PAD], [0, 1, STOP]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    assert seen == [[0, 0], [STOP, 1]]  # and no step after the last stop
    assert log_probs[0, 2] == 0 and (log_probs.abs() < 1e-6).all()


def test_length_is_bounded():
    tokens, mask, _ = decode(lambda drawn: one_hot(1), one_hot(1), [STOP], PAD, 4)
    assert tokens.tolist() == [[1] * 4] and mask.all()


def test_draws_follow_the_tempered_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    tokens, _, log_probs = decode(lambda drawn: logits, logits.expand(20000, 5), [STOP], PAD, 1, 0.5, generator)
    expected = (logits / 0.5).softmax(0)
    assert_close(tokens[:, 0].bincount(minlength=5) / 20000, expected, rtol=0, atol=0.01)
    assert_close(log_probs[:, 0], expected.log()[tokens[:, 0]])


def test_same_generator_same_draws():
    draws = [
        decode(lambda drawn: torch.zeros(6, 5), torch.zeros(6, 5), [], PAD, 3, 1.0, torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    ]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_one_line(temperature, bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(UserError, match="weights: found a next token whose probability is nan"):
        decode(lambda drawn: logits, torch.zeros(2, 5), [], PAD, 3, temperature)
    suppressed = torch.zeros(2, 5)
    suppressed[:, 3] = -torch.inf  # a token that is not allowed is none of them
    assert decode(lambda drawn: suppressed, suppressed, [], PAD, 3, temperature)[0].shape == (2, 3)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_label_log_probs_are_a_shifted_log_softmax(temperature):
    hidden, head = torch.randn(2, 6, 7), torch.nn.Linear(7, 11)
    labels = torch.randint(0, 11, (2, 6)).masked_fill(torch.rand(2, 6) < 0.4, IGNORE)
    log_probs, mask = label_log_probs(hidden, labels, head, temperature)
    whole = (head(hidden) / temperature).log_softmax(-1)
    for row in range(2):
        for place in range(1, 6):
            wanted = labels[row, place] != IGNORE
            assert mask[row, place - 1] == wanted
            assert_close(log_probs[row, place - 1], whole[row, place - 1, labels[row, place]] if wanted else torch.tensor(0.0))


@pytest.mark.parametrize("mrope", [False, True])
def test_answers_stand_behind_their_repeated_prompts(mrope):
    positions = torch.tensor([[0, 0, 1], [0, 1, 2]])
    if mrope:  # the second prompt ends in an image of width 4
        positions = torch.stack([positions, positions, torch.tensor([[0, 0, 1], [0, 1, 5]])])
    mask = torch.tensor([[False, True, True], [True, True, True]])
    ids = torch.tensor([[PAD, 1, 2], [0, 1, 2]])
    prompts = VLMInputs(ids, torch.randn(2, 3, 8), mask, positions, torch.full_like(ids, IGNORE), torch.zeros_like(mask))
    tokens, kept = torch.tensor([[1, STOP], [STOP, PAD], [2, 2], [0, STOP]]), torch.ones(4, 2, dtype=torch.bool)
    kept[1, 1] = False
    joined = append_answers(prompts, tokens, kept, torch.randn(4, 2, 8))
    assert joined.token_ids[:, :3].tolist() == ids[[0, 0, 1, 1]].tolist()
    assert joined.labels.tolist() == [[IGNORE] * 3 + row for row in [[1, STOP], [STOP, IGNORE], [2, 2], [0, STOP]]]
    assert joined.attention_mask[1].tolist() == [False, True, True, True, False]
    next_ids = joined.position_ids[..., 3:]
    expected = torch.tensor([[2, 3], [2, 3], [6, 7] if mrope else [3, 4], [6, 7] if mrope else [3, 4]])
    assert_close(next_ids, expected.expand(3, 4, 2) if mrope else expected)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="found temperature -1"):
        decode(lambda drawn: drawn, torch.zeros(1, 5), [], PAD, 3, temperature=-1.0)
    inputs = VLMInputs(*(torch.zeros(2, 3, dtype=torch.long),) * 6)
    with pytest.raises(ValueError, match="found 3 answers, expected a multiple of 2"):
        append_answers(inputs, torch.zeros(3, 1), torch.ones(3, 1), torch.zeros(3, 1, 8))


def test_the_nucleus_is_the_fewest_tokens_that_reach_the_share():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    kept = nucleus(logits, 0.7).exp()
    torch.testing.assert_close(kept, torch.tensor([[0, 2 / 3, 0, 1 / 3], [1.0, 0, 0, 0]]))
    torch.testing.assert_close(nucleus(logits, 0.0).exp(), torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0]]))


def test_a_watch_ends_rows_and_sees_what_belongs_to_each():
    seen = []

    def watch(tokens, kept, running):
        seen.append((tokens.tolist(), kept.tolist()))
        return running & (tokens != 7)

    logits = torch.full((2, 9), -1e9)
    logits[0, 7], logits[1, 4] = 0, 0
    tokens, mask, _ = decode(lambda last: logits, logits, [5], 0, 3, watch=watch)
    assert tokens.tolist() == [[7, 0, 0], [4, 4, 4]] and mask.sum(1).tolist() == [1, 3]
    assert seen == [([7, 4], [True, True]), ([0, 4], [False, True]), ([0, 4], [False, True])]
