"""Pieces of conversations as token ids and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from umm_zoo.backbones.templates import IGNORE, Piece

#: Token ids or labels, ``[L]``.
Numbers = NDArray[np.int32]
Flags = NDArray[np.bool_]


def special_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a special token.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    found = tokenizer.convert_tokens_to_ids(token)  # get_vocab would copy the whole vocabulary for every turn
    if not isinstance(found, int) or tokenizer.convert_ids_to_tokens(found) != token:
        own = f"its end token is '{tokenizer.eos_token}', its special tokens are {tokenizer.all_special_tokens}"
        raise ValueError(f"template: found '{token}', expected a token of the tokenizer ({own})")
    return found


def stop_ids(tokenizer: PreTrainedTokenizerBase, end: str) -> list[int]:
    """Tokens that close an answer: the tokenizer's own end token, and ``end`` or, where that is plain text, all that contain it."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if end in tokenizer.all_special_tokens:
        return sorted({*own, special_id(tokenizer, end)})
    return sorted({*own, *(index for index in tokenizer.get_vocab().values() if end in tokenizer.decode([index]))})


def encode(
    tokenizer: PreTrainedTokenizerBase,
    pieces: list[Piece],
    image_token_id: int,
    lengths: Sequence[int],
    first: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """``encode_all`` of one conversation."""
    [(ids, labels)] = encode_all(tokenizer, [pieces], image_token_id, [lengths], first)
    return ids.tolist(), labels.tolist()


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[Piece]],
    image_token_id: int,
    lengths: Sequence[Sequence[int]],
    first: Sequence[int] = (),
) -> list[tuple[Numbers, Numbers]]:
    """Token ids and labels of conversations, with as many image tokens for each image as ``lengths`` says.

    All of a row is tokenised as one text, as the library does, so that no border between pieces changes a token; a token is trained
    if it shares a character with a trained piece. Text is read as text: one that spells a special token forges nothing. The texts
    of all rows go through the tokenizer in one call; in a second one where some must be read word by word.

    Args:
        tokenizer: a fast one, which can tell the characters of a token.
        rows: pieces of each, from ``ChatTemplate.render``.
        image_token_id: stands at the places of image tokens.
        lengths: tokens of each image piece of a row.
        first: tokens before the others (``ChatTemplate.first_ids``), left out where these open with the tokenizer's first one.
    """
    plans = [list(_plan(tokenizer, pieces, image_token_id)) for pieces in rows]
    read = {}
    for split in (False, True):
        texts = [part for plan in plans for part in plan if isinstance(part, _Text) and part.split is split]
        read[split] = _read(tokenizer, texts, image_token_id)
    return [
        _row([_start(tokenizer, pieces, first), *plan], read, own) for plan, pieces, own in zip(plans, rows, lengths, strict=True)
    ]


class _Tokens(NamedTuple):
    """Ids ``[L]``, which of them are trained, and which stand for an image."""

    ids: Numbers
    trained: Flags
    is_image: Flags

    @classmethod
    def of(cls, ids: Sequence[int], trained: bool = False, is_image: bool = False) -> _Tokens:
        """All of one kind."""
        return cls(np.array(ids, dtype=np.int32), np.full(len(ids), trained), np.full(len(ids), is_image))


class _Text(NamedTuple):
    """A text with its trained spans; special tokens in it are such where it is not to be ``split``."""

    text: str
    spans: list[tuple[int, int]]
    split: bool

    @classmethod
    def of(cls, pieces: list[Piece], split: bool) -> _Text:
        """Some pieces, joined."""
        ends = accumulate(len(piece.text) for piece in pieces)
        spans = [(end - len(piece.text), end) for piece, end in zip(pieces, ends, strict=True) if piece.trained]
        return cls("".join(piece.text for piece in pieces), spans, split)


@lru_cache(maxsize=8)
def _forgeable(tokenizer: PreTrainedTokenizerBase, size: int, image_token_id: int) -> tuple[dict[str, int], re.Pattern[str]]:
    """Ids of a tokenizer's special tokens and image token by their names, and what finds them in a text; ``size`` is its number of
    tokens, for it may grow."""
    known = {
        str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special or number == image_token_id
    }
    longest_first = sorted(map(re.escape, known), key=len, reverse=True)
    return known, re.compile("|".join(longest_first) or "(?!)")


def _plan(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece], image_token_id: int) -> Iterator[_Text | _Tokens]:
    """A row as texts to be tokenised, and tokens between them."""
    known, forged = _forgeable(tokenizer, len(tokenizer), image_token_id)
    image = next((name for name, number in known.items() if number == image_token_id), None)
    runs = [(kind, list(group)) for kind, group in groupby(pieces, key=lambda piece: piece.kind)]
    named = all(image is not None if piece.kind == "image" else piece.text in known for piece in pieces if piece.kind != "text")
    if named and not any(kind == "text" and forged.search("".join(piece.text for piece in group)) for kind, group in runs):
        yield _Text.of([piece._replace(text=image or "") if piece.kind == "image" else piece for piece in pieces], split=False)
        return
    for kind, group in runs:
        if kind == "text":
            yield _Text.of(group, split=True)
        for piece in group if kind != "text" else ():
            number = image_token_id if kind == "image" else special_id(tokenizer, piece.text)
            yield _Tokens.of([number], piece.trained, kind == "image")


def _start(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece], first: Sequence[int]) -> _Tokens:
    return _Tokens.of([] if pieces and pieces[0].kind == "special" and pieces[0].text == tokenizer.bos_token else first)


def _read(tokenizer: PreTrainedTokenizerBase, parts: Sequence[_Text], image_token_id: int) -> Iterator[_Tokens]:
    """Tokens of each text in its turn."""
    if not parts:
        return
    split, unread = parts[0].split, {"return_attention_mask": False, "return_token_type_ids": False}
    read = tokenizer([part.text for part in parts], add_special_tokens=False, split_special_tokens=split, **unread)
    for part, own in zip(parts, read.encodings or [], strict=True):
        ids, trained = np.array(own.ids, dtype=np.int32), np.zeros(len(own), dtype=bool)
        if part.spans:  # of one text at a time: the tuples of all would set off Python's search for garbage
            starts, stops = np.array(own.offsets).reshape(-1, 2).T
            for first, last in part.spans:
                trained |= (starts < last) & (stops > first)
        yield _Tokens(ids, trained, (ids == image_token_id) & (not split))


def _row(
    plan: Sequence[_Text | _Tokens], read: Mapping[bool, Iterator[_Tokens]], lengths: Sequence[int]
) -> tuple[Numbers, Numbers]:
    """Ids and labels of a row, its texts taken in turn from what was ``read`` of all."""
    parts = [next(read[part.split]) if isinstance(part, _Text) else part for part in plan]
    ids, trained, is_image = (np.concatenate(own) for own in zip(*parts, strict=True))
    counts = np.ones(len(ids), dtype=np.int64)
    counts[is_image] = lengths[: is_image.sum()]
    return np.repeat(ids, counts), np.repeat(np.where(trained, ids, np.int32(IGNORE)), counts)


def pad(rows: Sequence[Sequence[int] | NDArray[np.int32]], value: int, left: bool) -> Tensor:
    """Rows of different lengths as one ``[B, L]`` tensor."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for own, row in zip(padded, rows, strict=True):
        own[padded.shape[1] - len(row) if left else 0 :][: len(row)] = row
    return torch.from_numpy(padded)
