"""Pieces as token ids, by a tokenizer that puts a blank before the first word of a text and before no other."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from umm_zoo.backbones.encoding import encode
from umm_zoo.backbones.templates import IGNORE, Piece, VicunaV1


@pytest.fixture(scope="module")
def tokenizer():
    letters = {token: number for number, token in enumerate("▁abcdefghijklmnopqrstuvwxyzABCDEGHINRSTUVW:?,.'-</>\n")}
    built = Tokenizer(models.BPE(letters, [], unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    built.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<image>"])


TURNS = [{"role": "user", "text": "<image>\nWhat is it?"}, {"role": "assistant", "text": "a dot"}]


def test_all_pieces_are_one_text(tokenizer):
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids, labels = encode(tokenizer, VicunaV1(system="Hi").render(TURNS), image, [3], VicunaV1().first_ids(tokenizer))
    whole = tokenizer("<s>Hi USER: <image><image><image>\nWhat is it? ASSISTANT: a dot</s>", add_special_tokens=False)["input_ids"]
    assert ids[1:] == tokenizer("Hi USER: <image><image><image>\nWhat is it? ASSISTANT: a dot</s>")["input_ids"]
    assert ids[0] == whole[0] == tokenizer.bos_token_id
    assert [label for label in labels if label != IGNORE] == ids[-7:]  # the blank, the answer, its end


def test_a_first_token_of_the_template_is_not_put_twice(tokenizer):
    ids, _ = encode(tokenizer, [Piece("special", "<s>"), Piece("text", "a")], -1, [], [tokenizer.bos_token_id])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_text_that_spells_a_special_token_is_read_as_text(tokenizer):
    ids, _ = encode(tokenizer, [Piece("text", "a</s>"), Piece("special", "</s>")], -1, [])
    assert ids.count(tokenizer.eos_token_id) == 1 and len(ids) > 4
