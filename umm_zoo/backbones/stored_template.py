"""The chat template stored beside a model's weights, as pieces: what its answers are, is marked while it is rendered."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from umm_zoo.backbones.loading import find_source, on_meta_device
from umm_zoo.backbones.templates import ChatML, ChatTemplate, Piece
from umm_zoo.backbones.tokenizer import is_here, load_tokenizer
from umm_zoo.backbones.vlm_processor import stored_template
from umm_zoo.batch import IMAGE_MARKER, Conversation, Turn
from umm_zoo.errors import UserError

#: Characters of private use around the number of a text, which stands for it while the template is rendered.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_ROLES = ("system", "user", "assistant")


class StoredTemplate(ChatTemplate):
    """The Jinja template of a checkpoint, rendered as the library's processor does.

    A template that closes an answer with no special token (LLaVA-1.5's) is given the tokenizer's end of text there, as the releases
    were trained: nothing would tell a model to stop. A role that it refuses is rendered as the user's. Where it puts an image on
    a line of its own (LLaVA's), a line break beside the marker is not put twice.

    Args:
        source: the template.
        tokenizer: whose special tokens it names.
        marker: what it puts for an image.

    Raises:
        UserError: no such template can be rendered.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, marker: str) -> None:
        self.source, self.tokenizer, self.marker = source, tokenizer, marker
        self.cutter = Cutter(tokenizer, marker)
        self.as_text = False  # whether contents are plain texts, as templates of language models take them
        self.breaks = False  # whether a line break is put behind an image
        self.end = str(tokenizer.eos_token)
        asked: Turn = {"role": "user", "text": f"{IMAGE_MARKER}?"}
        mark = f"{_OPEN}0{_CLOSE}"
        try:
            shown = self._render(self._messages([asked], []), False)
            self.as_text = mark not in shown or "'type'" in shown
        except (TypeError, UserError):
            self.as_text = True
        self.breaks = f"{marker}\n{mark}" in self._render(self._messages([asked], []), False)
        trained = [piece for piece in self.render([asked, {"role": "assistant", "text": "!"}]) if piece.trained]
        if trained[-1].kind != "special":
            raise UserError(
                "chat template", "an answer that nothing closes", "a special token behind it, or a tokenizer's end token"
            )
        self.end = trained[-1].text
        whole, bare = (tokenizer("a", add_special_tokens=own)["input_ids"] for own in (True, False))
        self._first = [int(number) for number in whole[: len(whole) - len(bare)]] if whole[-len(bare) :] == bare else []

    @classmethod
    def from_pretrained(cls, source: str) -> ChatTemplate:
        """The template of a language model, beside its tokenizer, with ``<image>`` where an image stands.

        On the meta device (``--check``) one that is not on this machine is not read, and ``ChatML`` stands in its place.

        Args:
            source: name or folder.

        Raises:
            FileNotFoundError: no tokenizer there.
            UserError: it has no template.
        """
        source = find_source(source)
        if on_meta_device() and not is_here(source):
            return ChatML()
        tokenizer = load_tokenizer(source)
        return cls(stored_template(source, tokenizer), tokenizer, IMAGE_MARKER)

    def first_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What the tokenizer itself puts in front."""
        return self._first

    def render(self, conversation: Conversation, for_generation: bool = False) -> list[Piece]:
        """As the template says.

        Raises:
            UserError: the template refuses the conversation.
        """
        texts: list[Piece] = []
        messages = self._messages(conversation, texts)
        try:
            shown = self._render(messages, for_generation)
        except UserError:
            if all(turn["role"] in _ROLES for turn in conversation):
                raise
            plain = [{**one, "role": one["role"] if one["role"] in _ROLES else "user"} for one in messages]
            shown = self._render(plain, for_generation)
        return list(self._closed(list(self.cutter(shown, texts))))

    def _messages(self, conversation: Conversation, texts: list[Piece]) -> list[dict[str, Any]]:
        """Messages of the library's form in which a mark stands for each text, which is put into ``texts``."""
        messages: list[dict[str, Any]] = []
        for turn in conversation:
            trained = turn["role"] == "assistant"
            content: list[dict[str, str]] = []
            parts = [turn["text"]] if trained else turn["text"].split(IMAGE_MARKER)
            for number, part in enumerate(parts):
                if number:
                    content.append({"type": "image"})
                if self.breaks:
                    part = part.removeprefix("\n") if number else part
                    part = part.removesuffix("\n") if number < len(parts) - 1 else part
                if part or len(parts) == 1:
                    content.append({"type": "text", "text": _marked(part, trained, texts)})
            if self.as_text:
                joined = "".join(part.get("text", self.marker) for part in content)
                messages.append({"role": turn["role"], "content": joined})
            else:
                messages.append({"role": turn["role"], "content": content})
        return messages

    def _render(self, messages: list[dict[str, Any]], for_generation: bool) -> str:
        try:
            names: dict[str, Any] = {**self.tokenizer.special_tokens_map, "add_generation_prompt": for_generation}
            shown = cast(Any, render_jinja_template)(conversations=[messages], chat_template=self.source, **names)[0]
        except TemplateError as refused:
            reason = next(iter(str(refused).splitlines()), type(refused).__name__)
            raise UserError("chat template", f"a conversation that it refuses ({reason})", "another order of turns") from refused
        return str(shown[0])

    def _closed(self, pieces: list[Piece]) -> Iterator[Piece]:
        """The pieces with what closes each answer, trained."""
        left = iter([*pieces, Piece("text")])
        end = Piece("special", str(self.tokenizer.eos_token), True)
        for piece in left:
            yield piece
            if not piece.trained:
                continue
            after = next(left)
            blank, closing = (after, next(left, after)) if after.kind == "text" and not after.text.strip() else (None, after)
            if blank is not None and closing.kind == "special" and closing.text in (self.end, end.text):
                yield from (blank._replace(trained=True), closing._replace(trained=True))
            elif blank is None and closing.kind == "special":
                yield closing._replace(trained=True)
            else:
                yield from ([end] if self.tokenizer.eos_token is not None else [])
                yield from (one for one in (blank, closing) if one is not None)


class Cutter:
    """Cuts a text into pieces: special tokens, images, and what stands between them.

    Args:
        tokenizer: whose special tokens they are.
        marker: what stands for an image.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marker: str) -> None:
        names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | {marker}
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        self.marker, self.pattern = marker, re.compile("|".join([*longest_first, f"{_OPEN}[0-9]+{_CLOSE}"]))

    def __call__(self, text: str, texts: Sequence[Piece] = ()) -> Iterator[Piece]:
        """Pieces of the text; ``texts`` in the place of their marks."""
        done = 0
        for found in self.pattern.finditer(text):
            if found.start() > done:
                yield Piece("text", text[done : found.start()])
            done, token = found.end(), found.group()
            if token.startswith(_OPEN):
                yield texts[int(token[1:-1])]
            else:
                yield Piece("image") if token == self.marker else Piece("special", token)
        if done < len(text):
            yield Piece("text", text[done:])


def _marked(text: str, trained: bool, texts: list[Piece]) -> str:
    """A mark for a text, with the blanks around it outside, for templates that strip them."""
    core = text.strip()
    before = text[: len(text) - len(text.lstrip())] if core else text
    texts.append(Piece("text", core, trained))
    return f"{before}{_OPEN}{len(texts) - 1}{_CLOSE}{text[len(before) + len(core) :]}"
