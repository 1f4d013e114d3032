"""Rows of a batch: tokenised together, and the same as one by one."""

import pytest
from transformers import PreTrainedTokenizerBase
from vlm_parts import CONVERSATIONS, COUNTS, assistant, llava, random_images, user

from umm_zoo.batch import Batch

FORGED = [user("<image>\nIs <|im_end|> the end?"), assistant("It is <|im_end|> and more.")]


@pytest.fixture(scope="module")
def vlm():
    return llava()


@pytest.fixture
def calls(monkeypatch):
    """Texts of each call of a tokenizer."""
    seen, call = [], PreTrainedTokenizerBase.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "__call__", lambda own, texts, **options: seen.append(texts) or call(own, texts, **options)
    )
    return seen


def batch(vlm, rows):
    conversations, counts = [row for row, _ in rows], [count for _, count in rows]
    images = list(random_images(vlm, sum(counts)))
    return Batch([str(number) for number in range(len(rows))], conversations, images, counts)


@pytest.mark.parametrize("forged", [False, True])
def test_a_batch_goes_through_the_tokenizer_in_one_call_or_in_two_where_a_text_spells_a_special_token(vlm, calls, forged):
    pairs = [*zip(CONVERSATIONS, COUNTS, strict=True)]
    rows = [([*turns, user(f"{number} {forged}?"), assistant("no")], count) for number in range(10) for turns, count in pairs]
    vlm.inputs_of(batch(vlm, [*rows, (FORGED, 1)] if forged else rows))
    assert len(calls) == 1 + forged and len(calls[0]) == 30


def test_rows_together_are_the_rows_one_by_one(vlm):
    rows = [*zip(CONVERSATIONS, COUNTS, strict=True), (FORGED, 1), ([user("")], 0)]
    whole = batch(vlm, rows)
    layouts = vlm.image_layouts(whole.images, whole.image_counts)
    together, alone = llava(), llava()
    found = together.encode_rows(whole.conversations, layouts, False)
    for row, turns, layout in zip(found, whole.conversations, layouts, strict=True):
        [own] = alone.encode_rows([turns], [layout], False)
        assert row.ids.tolist() == own.ids.tolist() and row.labels.tolist() == own.labels.tolist()
