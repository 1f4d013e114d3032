"""Base class of judges: models that answer questions about images in words."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

from PIL import Image

from umm_zoo.checkpoints.plain_files import write_json, writing
from umm_zoo.errors import UserError

#: Where answers are kept where nothing else is said.
CACHE = "~/.cache/umm_zoo/judge"
#: Failed calls before the first answer after which no further one is made.
HOPELESS = 10
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """Question to a judge.

    Args:
        content: texts and images, in the order in which the judge sees them.
        system: what a system's turn says before it; empty for none.
        image_type: of the files that images are sent as.
    """

    content: Sequence[str | Image.Image]
    system: str = ""
    image_type: Literal["PNG", "JPEG"] = "PNG"


class NoAnswerError(Exception):
    """A call that failed: the judge gave no answer to one question."""


class Reply(NamedTuple, Generic[T]):
    """What became of a question."""

    value: T | None  #: what was read in the answer; None where the call failed, or the answer could not be read
    text: str = ""  #: the answer
    failure: str = ""  #: why there is no value

    @property
    def unreached(self) -> bool:
        """Whether the call failed, so that another one may not."""
        return self.value is None and not self.text


class Judge(ABC):
    """Model that answers questions about images in words.

    Answers are kept by content: a question is asked once by all processes that share the folder, and a run that was interrupted
    goes on where it was. A failed call is not kept.

    Attributes:
        tries: how often a question is asked whose answer cannot be read.
        parallel: questions at a time.
        cache: folder of kept answers; None keeps none.
    """

    tries: int = 1
    parallel: int = 1
    cache: str | None = None
    _answered, _failures = False, 0

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What its answers depend on beside the question, for cards and the cache: the model, its settings; plain values."""

    @abstractmethod
    def answer(self, question: Question) -> str:
        """The answer.

        Raises:
            NoAnswerError: the call failed, and another question may be answered.
            UserError: no question will be answered.
        """

    @contextmanager
    def session(self) -> Iterator[Callable[[Question], str]]:
        """What gives answers, for as many questions as are asked at once."""
        yield self.answer

    def ask(self, question: Question) -> str:
        """The answer to one question, kept or new; ``NoAnswerError`` and ``UserError`` as ``answer`` raises them."""
        reply = self.ask_all([question])[0]
        if reply.value is None:
            raise NoAnswerError(reply.failure)
        return reply.value

    def ask_all(self, questions: Sequence[Question], read: Callable[[str], Any] = str) -> list[Reply[Any]]:
        """Replies to questions, in their order; equal ones are asked once.

        Args:
            questions: any number.
            read: what makes a value of an answer; its ``ValueError`` says why it cannot.

        Raises:
            UserError: no question will be answered, or the cache's folder cannot be written.
        """
        if not questions:
            return []
        keys = [self._key(question) for question in questions]
        different = dict(zip(keys, questions, strict=True))
        workers = min(self.parallel, len(different))
        with ThreadPoolExecutor(workers) if workers > 1 else nullcontext() as pool, self.session() as call:
            arguments = (different, different.values(), [call] * len(different), [read] * len(different))
            replies = dict(zip(different, (pool.map if pool else map)(self._reply, *arguments), strict=True))
        return [replies[key] for key in keys]

    def _reply(self, key: str, question: Question, call: Callable[[Question], str], read: Callable[[str], Any]) -> Reply[Any]:
        kept = self._kept(key)
        text, failure = kept or "", ""
        for _ in range(self.tries if kept is None else 1):
            try:
                text = call(question) if kept is None else kept
            except NoAnswerError as error:
                self._failures += 1
                if not self._answered and self._failures >= HOPELESS:
                    found = f"{HOPELESS} failed calls and no answer ({error})"
                    raise UserError("judge", found, "a judge that answers") from error
                return Reply(None, "", str(error))
            self._answered |= kept is None
            try:
                value = read(text)
            except ValueError as error:
                failure = f"an answer that cannot be read ({error})"
                continue
            self._keep(key, text, kept)
            return Reply(value, text)
        self._keep(key, text, kept)
        return Reply(None, text, failure)

    def _key(self, question: Question) -> str:
        """What stands for a question to this judge."""
        content = [part if isinstance(part, str) else _pixels(part) for part in question.content]
        asked = {**self.identity, "system": question.system, "content": content, "image_type": question.image_type}
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    def _kept(self, key: str) -> str | None:
        """The kept answer; None where there is none, or no whole one."""
        if not self.cache:
            return None
        try:
            found = json.loads(_file(self.cache, key).read_bytes())["answer"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return found if isinstance(found, str) else None

    def _keep(self, key: str, text: str, kept: str | None) -> None:
        if self.cache and kept is None:
            with writing(self.cache, "a folder that can be written (the judge's 'cache'; null keeps nothing)"):
                write_json(_file(self.cache, key), {"answer": text, "judge": dict(self.identity)})

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: copies of a metric share the judge."""
        return self


def _file(folder: str, key: str) -> Path:
    return Path(folder).expanduser() / key[:2] / f"{key}.json"


def _pixels(image: Image.Image) -> list[Any]:
    """Size and digest of what the image shows."""
    return ["image", *image.size, hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()]


def image_file(image: Image.Image, image_type: str, max_size: int | None = None) -> bytes:
    """An image as a file, shrunk where its long side is larger than ``max_size``."""
    image = image.convert("RGB")
    if max_size is not None and max(image.size) > max_size:
        scale = max_size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    image.save(stored, image_type)
    return stored.getvalue()
