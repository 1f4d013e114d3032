"""Vision-language model whose language model is a mixture of an understanding and a generation expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from umm_zoo.backbones.answers import Answer, Decoding, WatchedAnswers
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.generation import decode
from umm_zoo.backbones.precision import ExactBuffers
from umm_zoo.backbones.roomy_cache import with_room
from umm_zoo.backbones.square_vlm import SquareVLM
from umm_zoo.batch import Grid, Images
from umm_zoo.blocks.expert_part import ExpertPart
from umm_zoo.blocks.mixture import MixtureStack
from umm_zoo.blocks.sequence_plan import Item, Marks, SequencePlan
from umm_zoo.errors import Count, UserError

#: Around texts, and around images.
_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class Context:
    """What rows hold so far, as keys and values: what a sampler or an answer goes on from.

    Args:
        cache: keys and values of ``[B, M]`` tokens.
        real: ``[B, M]`` bool, False on padding.
        next_positions: ``[B]``, on the CPU.
    """

    def __init__(self, cache: DynamicCache, real: Tensor, next_positions: Tensor) -> None:
        self.cache, self.real, self.next_positions = cache, real, next_positions

    def mask(self, among: Tensor) -> Tensor:
        """Which keys new tokens may attend to, ``[B, N, M + N]``: all real ones, and each other as ``among [B, N, N]`` says."""
        return torch.cat([self.real[:, None].expand(-1, among.shape[1], -1), among], dim=-1)


class EncodesImages(ExactBuffers, ABC):
    """Vision tower and projector of a model whose language model lies elsewhere, and its tokenizer.

    Attributes:
        image_size: side in pixels of an image that it takes.
    """

    vision_tower: nn.Module
    projector: nn.Module
    image_size: int

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's."""

    @abstractmethod
    def image_grid(self, height: int, width: int) -> Grid:
        """Tokens of an image of that many pixels."""

    @abstractmethod
    def encode_images(self, images: Images) -> list[Tensor]:
        """Tokens ``[N, D]`` of each image."""


class MixtureModel(ExactBuffers):
    """Embeddings, mixture of experts and output layer, and the vision tower of another model with its projector.

    Texts stand between ``<|im_start|>`` and ``<|im_end|>`` each, without roles, images between ``<|vision_start|>`` and
    ``<|vision_end|>``: the form of Bagel's release, whose tokenizer is Qwen2.5's.

    Args:
        images: encodes images, and has the tokenizer.
        stack: the layers of both experts.
        embed_tokens, lm_head: words in and out.
        max_length: longest row in tokens; longer ones are refused.
    """

    def __init__(
        self,
        images: EncodesImages | SquareVLM,
        stack: MixtureStack,
        embed_tokens: nn.Embedding,
        lm_head: nn.Module,
        max_length: Count = 4096,
    ) -> None:
        super().__init__()
        self.width, self.max_length = stack.width, max_length
        self.vlm, self.stack, self.embed_tokens, self.lm_head = images, stack, embed_tokens, lm_head

    def parts(self) -> dict[str, nn.Module]:
        """``vision_tower``, ``projector``, ``understanding_expert`` with embeddings and output layer, ``generation_expert``."""
        tower: dict[str, nn.Module] = {"vision_tower": self.vlm.vision_tower, "projector": self.vlm.projector}
        words = {"embed_tokens": self.embed_tokens, **self.stack.layers_of(0), "lm_head": self.lm_head}
        understanding = ExpertPart(words, self.stack)
        if self.stack.experts == 1:
            return {**tower, "understanding_expert": understanding}
        return {**tower, "understanding_expert": understanding, "generation_expert": self.stack.experts_parts()[1]}

    @cached_property
    def marks(self) -> Marks:
        """Token ids around texts and images.

        Raises:
            UserError: the tokenizer has none.
        """
        known = self.vlm.tokenizer.get_vocab()
        if missing := [mark for mark in _MARKS if mark not in known]:
            raise UserError("tokenizer", f"no token '{missing[0]}'", "a tokenizer with Qwen2.5's special tokens")
        return Marks(*(known[mark] for mark in _MARKS))

    def words(self, text: str) -> list[int]:
        """Token ids of a text, without marks."""
        ids: list[int] = self.vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_images(self, images: Images) -> list[Tensor]:
        """Tokens ``[N, D]`` of each image as the tower reads it."""
        return self.vlm.encode_images(images)

    @property
    def blank(self) -> Tensor:
        """An image of nothing, ``[3, H, W]``."""
        return torch.zeros(3, self.vlm.image_size, self.vlm.image_size, device=self.embed_tokens.weight.device)

    def num_tokens(self, image: Tensor) -> int:
        """Tokens of an image as the tower reads it."""
        return self.vlm.image_grid(image.shape[-2], image.shape[-1]).num_cells

    def embed(self, plan: SequencePlan, images: dict[str, Sequence[Tensor]]) -> Tensor:
        """What enters the layers, ``[B, L, D]``: words, and tokens ``[N, D]`` of images by kind, in the plan's order."""
        device = self.embed_tokens.weight.device
        tokens: Tensor = self.embed_tokens(send(plan.token_ids, device))
        for kind, own in images.items():
            if own:
                rows = torch.cat(list(own)).to(tokens.dtype)
                flat = tokens.flatten(0, 1).index_copy(0, send(plan.places[kind], device), rows)
                tokens = flat.view(tokens.shape)
        return tokens

    def forward(self, plan: SequencePlan, tokens: Tensor) -> Tensor:
        """States ``[B, L, D]`` of whole sequences."""
        states: Tensor = self.stack(tokens, plan.route, plan.positions, plan.mask(tokens.device))
        return states

    def context(self, plan: SequencePlan, tokens: Tensor) -> Context:
        """Keys and values of sequences that others go on from."""
        cache = DynamicCache()
        if tokens.shape[1]:
            self.stack.read(tokens, plan.route, plan.positions, plan.mask(tokens.device), cache)
        return Context(cache, send(plan.real, tokens.device), plan.next_positions)

    def answer(self, context: Context, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """A text behind each row, at temperature 0 the likeliest; the context stays as it is."""
        return [own.text for own in self.write(context, Decoding(max_new_tokens, temperature, None))]

    @torch.no_grad()
    def write(self, context: Context, decoding: Decoding) -> list[Answer]:
        """A text behind each row; the context stays as it is."""
        rows, cache, real = len(context.real), with_room(context.cache), context.real
        route, positions = torch.zeros(rows, 1, dtype=torch.long), context.next_positions[:, None]

        def step(ids: Tensor) -> Tensor:
            nonlocal real, positions
            real = torch.cat([real, real.new_ones(rows, 1)], dim=1)
            states = self.stack.read(self.embed_tokens(ids)[:, None], route, positions, real[:, None], cache)
            positions = positions + 1
            logits: Tensor = self.lm_head(states[:, 0])
            return logits

        marks, longest, temperature = self.marks, decoding.max_new_tokens, decoding.temperature
        found = WatchedAnswers((real.sum(1) + 1).tolist(), decoding.watch, self.max_length, self._text)
        start = torch.full((rows,), marks.text_start, device=real.device)
        how = [marks.text_end], marks.text_end, longest, temperature, decoding.generators(real.device), decoding.top_p, found
        decode(step, step(start), *how)
        return found.answers()

    def _text(self, ids: Sequence[int]) -> str:
        end = ids.index(self.marks.text_end) if self.marks.text_end in ids else len(ids)
        text: Any = self.vlm.tokenizer.decode(list(ids[:end]))
        return str(text)


class MixtureVLM(MixtureModel):
    """A copy of a vision-language model's language model for each expert, beside its vision tower.

    Args:
        vlm: gives its language model away and encodes images from now on.
        experts: 2, or 1, with which all tokens share one set of weights.
        qk_norm: of queries and keys; None is what the language model has. True adds norms, as Bagel does to Qwen2.5.
        wider: factor on the width of the MLPs.
        max_length: longest row in tokens; longer ones are refused.

    Raises:
        UserError: a language model whose layers are not known here.
    """

    def __init__(
        self, vlm: SquareVLM, experts: Count = 2, qk_norm: bool | None = None, wider: Count = 1, max_length: Count = 4096
    ) -> None:
        given: Any = vlm.give_language_model()
        stack = MixtureStack.from_language_model(given.model, experts, qk_norm, wider)
        super().__init__(vlm, stack, given.model.embed_tokens, given.lm_head, max_length)


def plan_of(vlm: MixtureModel, rows: Sequence[Sequence[Item]], starts: Sequence[int] | None = None) -> SequencePlan:
    """The plan of rows of items in a model's words.

    Raises:
        UserError: a row is longer than the model takes.
    """
    for row, items in enumerate(rows):
        check_length(vlm, items, row)
    return SequencePlan.of(rows, vlm.marks, starts)


def check_length(vlm: MixtureModel, items: Sequence[Item], row: int) -> None:
    """Refuse a row that is longer than a model takes.

    Raises:
        UserError: names the row.
    """
    length = sum(len(item.ids) + item.num_tokens + 2 for item in items if not item.dropped)
    if length > vlm.max_length:
        raise UserError("", f"{length} tokens", f"at most {vlm.max_length} (method.vlm.max_length)", row=row)
