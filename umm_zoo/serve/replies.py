"""Replies: whole ones, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from umm_zoo.serve.chat import Chat, finish_reason, usage_of
from umm_zoo.serve.failures import ApiError
from umm_zoo.serve.serving import End, Exchange

Event = tuple[int, str | End]


async def next_event(exchange: Exchange) -> Event:
    """The next event of a request.

    Raises:
        ApiError: its time has run out.
        Exception: what a job has ended in, or that the client has gone.
    """
    left = exchange.jobs[0].since + exchange.serving.limits.timeout - time.monotonic()
    try:
        async with asyncio.timeout(max(0.0, left)):
            place, event = await exchange.events.get()
    except TimeoutError:
        raise ApiError(504, f"no answer within {exchange.serving.limits.timeout:g} s (--timeout)", code="timeout") from None
    if isinstance(event, Exception):
        raise event
    return place, event


@contextlib.asynccontextmanager
async def listening(exchange: Exchange, request: Request) -> AsyncIterator[None]:
    """Let an event say that the client has gone."""

    async def listen() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        exchange.send(-1, ClientDisconnect())

    task = asyncio.create_task(listen())
    try:
        yield
    finally:
        task.cancel()


async def ends(exchange: Exchange, request: Request) -> list[End]:
    """The ends of all jobs, in their order."""
    found: dict[int, End] = {}
    async with listening(exchange, request):
        while len(found) < len(exchange.jobs):
            place, event = await next_event(exchange)
            if isinstance(event, End):
                found[place] = event
    return [found[place] for place in range(len(found))]


class Stream(StreamingResponse):
    """Server-sent events; what the request holds is given back at the end, however that comes."""

    def __init__(self, pieces: AsyncIterator[str], held: contextlib.ExitStack, headers: dict[str, str]) -> None:
        super().__init__(pieces, headers={**headers, "Cache-Control": "no-cache"}, media_type="text/event-stream")
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with self.held:
            await super().__call__(scope, receive, send)


class ChatReply:
    """Reply to a request for answers.

    Args:
        exchange: its jobs.
        model: name of the model.
        asked: the request.
    """

    def __init__(self, exchange: Exchange, model: str, asked: Chat) -> None:
        self.exchange, self.asked = exchange, asked
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, request: Request) -> dict[str, Any]:
        """All answers."""
        found = await ends(self.exchange, request)
        choices = [
            {
                "index": place,
                "message": {"role": "assistant", "content": end.text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish_reason(end.result.tokens, end.stopped),
            }
            for place, end in enumerate(found)
        ]
        usage = usage_of([end.result for end in found])
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def first(self, request: Request) -> Event:
        """The first event, before which an error is still a status of its own."""
        async with listening(self.exchange, request):
            return await next_event(self.exchange)

    async def pieces(self, first: Event) -> AsyncIterator[str]:
        """Server-sent events from a first one on, up to ``[DONE]``."""
        for place in range(len(self.exchange.jobs)):
            yield self._chunk(place, {"role": "assistant", "content": ""})
        found: list[End] = []
        event: Event | None = first
        try:
            while event is not None:
                place, said = event
                if isinstance(said, str):
                    yield self._chunk(place, {"content": said})
                else:
                    found.append(said)
                    yield self._chunk(place, {}, finish_reason(said.result.tokens, said.stopped))
                event = await next_event(self.exchange) if len(found) < len(self.exchange.jobs) else None
        except Exception as error:
            yield _event(ApiError.of(error).body)
        else:
            if self.asked.include_usage:
                usage = usage_of([end.result for end in found])
                yield _event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _chunk(self, place: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": place, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.asked.include_usage else {}
        return _event({**self.head, "object": "chat.completion.chunk", "choices": [choice], **usage})


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
