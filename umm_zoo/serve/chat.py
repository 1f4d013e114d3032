"""Requests of ``/v1/chat/completions``, and what is said to them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from umm_zoo.conversation import IMAGE_MARKER, Conversation, Turn
from umm_zoo.errors import UserError
from umm_zoo.generation import COMMANDS
from umm_zoo.generation.options import checked_text, shown, whole
from umm_zoo.generation.requests import Request, Result
from umm_zoo.serve.image_data import Images
from umm_zoo.serve.limits import Limits
from umm_zoo.serve.parameters import check_names, flag_in, option_in, rows_of, seed_in

if TYPE_CHECKING:
    from umm_zoo.backbones.answers import Answer

ASK = COMMANDS["ask"]
KNOWN = frozenset(
    {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"}
    | {"n", "reasoning_effort", "verbosity"}
)
#: Texts at which an answer may be told to end, and their length.
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass
class Chat:
    """A request for ``n`` answers.

    Args:
        rows: a request of the run for each.
        stops: texts at which an answer ends.
        stream: whether it is told as it comes.
        include_usage: whether a stream ends with the numbers of tokens.
        num_bytes: memory that its images take.
        ignored: names of parameters that were passed over.
    """

    rows: list[Request]
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    num_bytes: int
    ignored: list[str]


def read_chat(body: Mapping[str, Any], limits: Limits) -> Chat:
    """The request that a body is; a ``UserError`` where it cannot be one."""
    ignored = check_names(body, KNOWN)
    temperature = option_in(body, "temperature", ASK.options["temperature"])
    count = option_in(body, "n", whole("", 1, limits.max_n, 1))
    if count > 1 and temperature == 0:
        raise UserError("n", f"{count} at temperature 0", "1, since all would be the same", "a temperature above 0")
    names = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    longest = min([limits.max_tokens, *(option_in(body, name, whole("", 1, 2**31)) for name in names)])
    seed, top_p = seed_in(body), option_in(body, "top_p", ASK.options["top_p"])
    settings = {"max_new_tokens": longest, "temperature": temperature, "top_p": 1.0, "seed": 0}
    if temperature > 0:
        settings |= {"top_p": top_p, "seed": seed}
    stream, images = flag_in(body, "stream"), Images(limits)
    turns = _turns(body.get("messages"), images, limits)
    request = Request(images.opened, turns[-1]["text"], {**settings, "num": count}, earlier=turns[:-1])
    rows = rows_of(request, "messages")
    return Chat(rows, _stops(body.get("stop")), stream, _with_usage(body, stream), images.num_bytes, ignored)


def _with_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise UserError("stream_options", shown(options), '{"include_usage": true}')
    if not stream:
        raise UserError("stream_options", "options of a stream", "none where stream is not true")
    return flag_in(options, "include_usage")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and 0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise UserError("stop", shown(value), "a text, or a list of texts")
    if len(stops) > _MOST_STOPS:
        raise UserError("stop", f"{len(stops)} texts", f"at most {_MOST_STOPS}")
    return tuple(stops)


def _turns(messages: Any, images: Images, limits: Limits) -> Conversation:
    """The conversation, its images opened on the way; it ends with a question."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages", shown(messages), 'a list such as [{"role": "user", "content": "..."}]')
    turns: Conversation = []
    left = limits.max_prompt
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict) or message.get("role") not in [*_ROLES]:
            found = shown(message.get("role")) if isinstance(message, dict) else shown(message)
            raise UserError(f"{where}.role", found, ", ".join(_ROLES))
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name):
                raise UserError(f"{where}.{name}", "a call", "none: this server calls no tools")
        role: Any = _ROLES[message["role"]]
        turn = Turn(role=role, text=_text(message.get("content"), role, f"{where}.content", images))
        left -= len(turn["text"])
        if left < 0:
            raise UserError(where, f"more than {limits.max_prompt} characters", "a shorter conversation (--max-prompt)")
        if role == "system" and turns:
            raise UserError(f"{where}.role", "a system message behind others", "one at the start of the conversation")
        turns.append(turn)
    if turns[-1]["role"] != "user" or not turns[-1]["text"].strip():
        raise UserError("messages", f"an end without a question (role {turns[-1]['role']})", "a user's message at the end")
    return turns


def _text(content: Any, role: str, where: str, images: Images) -> str:
    """The text of a message, with a marker for each of its images.

    A message of one text has its images before it, as data for training has; between several texts images stand where they are.
    """
    if content is None and role == "assistant":
        return ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise UserError(where, shown(content), "a text, or a list of parts")
    pieces: list[str | None] = []  # None stands for an image
    count = len(images.opened)
    for place, part in enumerate(parts):
        at = f"{where}[{place}]" if parts is content else where
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            pieces.append(checked_text(part.get("text"), f"{at}.text" if parts is content else at, "a text"))
        elif kind == "image_url" and role == "user":
            url = part.get("image_url")
            images.from_url(url.get("url") if isinstance(url, dict) else url, f"{at}.image_url")
            pieces.append(None)
        else:
            expected = "text or image_url" if role == "user" else "text"
            raise UserError(f"{at}.type", shown(kind) if isinstance(part, dict) else shown(part), expected)
    texts, count = [piece for piece in pieces if piece], len(images.opened) - count
    own = sum(text.count(IMAGE_MARKER) for text in texts) if role == "user" else 0
    if own and own != count:
        raise UserError(where, f"{own} {IMAGE_MARKER} markers in its text", f"{count}, one for each image of the message, or none")
    if own:  # the places of the images are in the words
        return "\n".join(texts)
    if len(texts) <= 1:
        return "\n".join([IMAGE_MARKER] * count + texts)
    return "\n".join(IMAGE_MARKER if piece is None else piece for piece in pieces if piece != "")


class Speaker:
    """Text of one answer while it comes: what may be told of it already, and where it ends.

    Args:
        stops: texts at which it ends; they are not part of it.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.told, self.text, self.stopped = stops, "", "", False

    def more(self, said: str, ended: bool) -> str:
        """What is new in the answer so far; nothing that a later word could still change, unless it has ended."""
        cut = min((place for stop in self.stops if (place := said.find(stop)) >= 0), default=-1)
        self.stopped = cut >= 0
        text = said[:cut] if self.stopped else said
        if not (ended or self.stopped):
            text = text.rstrip("\ufffd")  # bytes of a letter that is not there yet
            begun = [length for stop in self.stops for length in range(1, len(stop)) if text.endswith(stop[:length])]
            text = text[: len(text) - max(begun, default=0)]
        self.text = text = text.strip()
        if not text.startswith(self.told):  # a tokenizer that changes what it has said: the end tells
            return ""
        new, self.told = text[len(self.told) :], text
        return new


def finish_reason(tokens: Answer | None, stopped: bool) -> str:
    """Why an answer has ended."""
    return "stop" if tokens is None or tokens.ended or stopped else "length"


def usage_of(results: list[Result]) -> dict[str, int] | None:
    """Numbers of tokens; None where the method does not tell."""
    tokens = [result.tokens for result in results]
    if any(one is None for one in tokens):
        return None
    prompt, made = tokens[0].num_prompt_tokens if tokens[0] else 0, sum(len(one.ids) for one in tokens if one)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
