"""Pieces of conversations as token ids and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from umm_zoo.backbones.templates import IGNORE, Piece


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
    """Token ids and labels of one conversation, with as many image tokens for each image as ``lengths`` says.

    All is tokenised as one text, as the library does, so that no border between pieces changes a token; a token is trained if it
    shares a character with a trained piece. Text is read as text: one that spells a special token forges nothing.

    Args:
        tokenizer: a fast one, which can tell the characters of a token.
        pieces: from ``ChatTemplate.render``.
        image_token_id: stands at the places of image tokens.
        lengths: tokens of each image piece.
        first: tokens before the others (``ChatTemplate.first_ids``), left out where these open with the tokenizer's first one.
    """
    start = list(first)
    if pieces and pieces[0].kind == "special" and pieces[0].text == tokenizer.bos_token:
        start = []
    ids, labels, left = start, [IGNORE] * len(start), iter(lengths)
    for found, trained, is_image in _tokens(tokenizer, pieces, image_token_id):
        count = next(left) if is_image else 1
        ids += [found] * count
        labels += [found if trained else IGNORE] * count
    return ids, labels


@lru_cache(maxsize=8)
def _forgeable(tokenizer: PreTrainedTokenizerBase, size: int, image_token_id: int) -> tuple[dict[int, str], re.Pattern[str]]:
    """Special tokens and the image token of a tokenizer of that ``size``, by their ids, and what finds them in a text."""
    known = {
        number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special or number == image_token_id
    }
    longest_first = sorted(map(re.escape, known.values()), key=len, reverse=True)
    return known, re.compile("|".join(longest_first) or "(?!)")


def _tokens(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece], image_token_id: int) -> Iterator[tuple[int, bool, bool]]:
    """Id of each token, whether it is trained, and whether it stands for an image piece."""
    known, forged = _forgeable(tokenizer, len(tokenizer), image_token_id)
    runs = [(kind, list(group)) for kind, group in groupby(pieces, key=lambda piece: piece.kind)]
    for piece in pieces:
        if piece.kind == "special":
            special_id(tokenizer, piece.text)
    named = all(
        image_token_id in known if kind == "image" else all(piece.text in known.values() for piece in group)
        for kind, group in runs
        if kind != "text"
    )
    if named and not any(kind == "text" and forged.search("".join(piece.text for piece in group)) for kind, group in runs):
        image = known.get(image_token_id, "")
        whole = [Piece("text", image if piece.kind == "image" else piece.text, piece.trained) for piece in pieces]
        yield from ((found, trained, found == image_token_id) for found, trained in _texts(tokenizer, whole, split=False))
        return
    for kind, group in runs:
        if kind == "text":
            yield from ((found, trained, False) for found, trained in _texts(tokenizer, group, split=True))
        for piece in group if kind != "text" else ():
            number = image_token_id if kind == "image" else special_id(tokenizer, piece.text)
            yield number, piece.trained, kind == "image"


def _texts(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece], split: bool) -> Iterator[tuple[int, bool]]:
    text, spans = "", []
    for piece in pieces:
        if piece.trained:
            spans.append((len(text), len(text) + len(piece.text)))
        text += piece.text
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=split, return_offsets_mapping=True)
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield token, any(start < last and stop > first for first, last in spans)


def pad(rows: list[list[int]], value: int, left: bool) -> Tensor:
    """Rows of different lengths as one ``[B, L]`` tensor."""
    length = max(len(row) for row in rows)
    gaps = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)], dtype=torch.long)
