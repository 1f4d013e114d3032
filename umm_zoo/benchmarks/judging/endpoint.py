"""Judge behind a server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import httpx2 as httpx

from umm_zoo.benchmarks.judging.judge import CACHE, Judge, NoAnswerError, Question, image_file
from umm_zoo.errors import Count, Natural, Positive, UserError

#: Statuses after which a request may do better later, as those of 500 and more.
_LATER = (408, 409, 425, 429)
_LONGEST_WAIT = 60.0  # seconds between two tries of a request
_CONNECTING = 10.0  # seconds until a server takes a connection
_THINKING = re.compile(r"\A.*?</think>\s*", re.DOTALL)


class EndpointJudge(Judge):
    """Server that speaks OpenAI's chat protocol as a judge; the images and texts of questions are sent to it.

    At temperature 0. A request that meets a server that is busy, failing or silent is sent again, later each time (``wait``, twice
    that, and so on with some chance in it, or what the server asks for); after ``retries`` the call has failed. What precedes
    ``</think>`` in an answer is not part of it.

    Args:
        url: base address, such as ``http://localhost:8000/v1``.
        model: name that the server knows.
        key_variable: environment variable that holds the key; unset or empty sends none.
        max_tokens, timeout: of one answer, the latter in seconds.
        retries: of a request.
        wait: seconds before the first.
        tries: how often a question is asked whose answer cannot be read.
        parallel: requests at a time.
        max_image_size: long side in pixels to which larger images are shrunk; None sends them as they are.
        extra: further keys of a request's body, such as ``{chat_template_kwargs: {enable_thinking: false}}``; a null takes one
            out, such as ``{max_tokens: null, max_completion_tokens: 1024}``.
        cache: folder of kept answers; null, or nothing behind ``cache=``, keeps none.

    Raises:
        UserError: the address is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        max_tokens: Count = 1024,
        timeout: Positive = 120.0,
        retries: Natural = 5,
        wait: Positive = 1.0,
        tries: Count = 3,
        parallel: Count = 8,
        max_image_size: Count | None = None,
        extra: dict[str, Any] | None = None,
        cache: str | None = CACHE,
    ) -> None:
        self.url = url.strip().rstrip("/").removesuffix("/chat/completions")
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UserError("url", f"'{url}'", "an address such as http://localhost:8000/v1")
        self.model, self.key_variable, self.max_image_size = model, key_variable, max_image_size
        self.timeout, self.retries, self.wait = timeout, retries, wait
        self.tries, self.parallel, self.cache = tries, parallel, cache
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens, **(extra or {})}
        self.body = {key: value for key, value in body.items() if value is not None}

    @property
    def identity(self) -> Mapping[str, Any]:
        """The server, the model, and what is asked of it."""
        return {"url": re.sub("//[^/@]*@", "//", self.url), **self.body, "max_image_size": self.max_image_size}

    def answer(self, question: Question) -> str:
        """The answer to one question."""
        with self.session() as call:
            return call(question)

    @contextmanager
    def session(self) -> Iterator[Callable[[Question], str]]:
        """Connections that are kept while questions are asked; leaving ends what still waits."""
        stop = threading.Event()
        try:
            timeout = httpx.Timeout(self.timeout, connect=min(_CONNECTING, self.timeout))
            with httpx.Client(headers=self._headers(), timeout=timeout, follow_redirects=True, verify=_context()) as client:
                yield partial(self._call, client, stop)
        finally:
            stop.set()

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"${self.key_variable}", "a key with letters that no header takes", "the key as the service gave it")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _call(self, client: httpx.Client, stop: threading.Event, question: Question) -> str:
        body = {**self.body, "messages": self._messages(question)}
        for attempt in range(self.retries + 1):
            response, failure, asked = None, "", 0.0
            try:
                response = client.post(f"{self.url}/chat/completions", json=body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if attempt == self.retries or not self._answered:  # one that is not there yet is no server that pauses
                    raise UserError(self.url, f"no server ({error})", "one that speaks OpenAI's chat protocol") from error
                failure = str(error)
            except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
                raise UserError(self.url, f"no address that can be reached ({error})", "http://localhost:8000/v1") from error
            except httpx.RequestError as error:
                failure = f"{type(error).__name__}: {error}".rstrip(": ")
            if response is not None:
                if response.status_code == 200:
                    return self._text(response)
                failure, asked = self._failure(response), _seconds(response.headers.get("Retry-After", ""))
            longest = min(_LONGEST_WAIT, self.wait * 2**attempt)
            if attempt == self.retries or stop.wait(min(_LONGEST_WAIT, max(asked, longest * random.uniform(0.5, 1)))):
                break
        raise NoAnswerError(f"{failure} after {self.retries + 1} tries")

    def _messages(self, question: Question) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for part in question.content:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                sent = base64.b64encode(image_file(part, question.image_type, self.max_image_size)).decode()
                url = f"data:image/{question.image_type.lower()};base64,{sent}"
                content.append({"type": "image_url", "image_url": {"url": url}})
        system = [{"role": "system", "content": question.system}] if question.system else []
        return [*system, {"role": "user", "content": content}]

    def _text(self, response: httpx.Response) -> str:
        try:
            found = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise NoAnswerError(f"no answer in '{_shortened(response.text)}'") from None
        if isinstance(found, list):  # some servers answer in parts
            found = "".join(str(part.get("text", "")) for part in found if isinstance(part, Mapping))
        if not isinstance(found, str) or not found.strip():
            raise NoAnswerError("an empty answer")
        return _THINKING.sub("", found)

    def _failure(self, response: httpx.Response) -> str:
        """What a status says, where a request may be sent again.

        Raises:
            UserError: no request will do better.
            NoAnswerError: this one will not.
        """
        said, status = _said(response), response.status_code
        if status in (401, 403):
            expected = f"a key that the server takes in ${self.key_variable}"
            raise UserError(self.url, f"a refusal ({status}: {said})", expected)
        if status in (404, 405):
            expected = f"a server that has the model '{self.model}' at this address"
            raise UserError(self.url, f"no such model or address ({status}: {said})", expected, "the address often ends in /v1")
        if "insufficient_quota" in response.text:
            raise UserError(self.url, f"an account without means ({status}: {said})", "one that can pay")
        if status not in _LATER and status < 500:
            raise NoAnswerError(f"{status}: {said}")
        return f"{status}: {said}"


@cache
def _context() -> ssl.SSLContext:
    """What servers are known by: it takes a third of a second to read."""
    return httpx.create_ssl_context()


def _said(response: httpx.Response) -> str:
    """A server's own words about a failure."""
    try:
        found = json.loads(response.text)
        error = found.get("error", found.get("message", found)) if isinstance(found, dict) else found
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = response.text
    return _shortened(str(text)) or response.reason_phrase


def _shortened(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}…"


def _seconds(text: str) -> float:
    """Of a header that says how long to wait; a date counts as none."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text.strip()) else 0.0
