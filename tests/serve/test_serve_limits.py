"""What a server refuses, and what becomes of requests that wait, hang or are left: errors are OpenAI's."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("python_multipart")

from PIL import Image
from test_generate import METHOD
from test_generate_images import PRETRAINING

from umm_zoo.generation.answering import Ask
from umm_zoo.serve.app import make_app
from umm_zoo.serve.failures import ApiError
from umm_zoo.serve.serving import Exchange, Serving

sys.path.insert(0, str(Path(__file__).parent))
from served import data_url, exchange, model_of, png, question, serving

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (20, 12), "blue")
CHAT, MADE, EDITS = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"


def test_images_are_let_go_at_once(llava: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    own = Exchange.__init__

    def init(self: Exchange, *arguments: Any) -> None:
        own(self, *arguments)
        seen.extend(weakref.ref(image) for job in self.jobs for image in job.request.images)

    monkeypatch.setattr(Exchange, "__init__", init)
    gc.disable()
    try:
        for stream in (False, True):
            exchange(make_app(llava), {"url": CHAT, "json": question("What?", RED, BLUE, max_tokens=2, stream=stream)})
        while not llava.thread.idle:
            pass
        assert len(seen) == 4 and not any(image() for image in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "request_, status, said",
    [
        ({"url": CHAT, "json": {**question("What?"), "model": "other"}}, 404, "The model 'other' does not exist."),
        ({"url": CHAT, "content": b"{"}, 400, "body: found no JSON"),
        ({"url": CHAT, "json": question("a " * 3000)}, 400, "messages: found 3009 tokens"),
        ({"url": CHAT, "json": {"messages": []}, "headers": {"Origin": "https://evil.example"}}, 403, "--allow-origin"),
        ({"url": CHAT, "method": "GET"}, 405, "Method Not Allowed"),
        ({"url": "/v1/completions", "json": {}}, 404, "this server has"),
        ({"url": MADE, "json": {"prompt": "a star"}}, 404, "a LLaVA, which cannot generate images"),
        ({"url": EDITS, "json": {"prompt": "a star"}}, 400, "Content-Type: found 'application/json'"),
        ({"url": EDITS, "data": {"prompt": "x"}, "files": {"mask": b"x", "image": png(RED)}}, 400, "mask: found a file"),
        (
            {"url": EDITS, "content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=y"}},
            400,
            "body: found no form",
        ),
        ({"url": CHAT, "content": bytes(2**20 + 1)}, 413, "more than 1 MiB"),
    ],
)
def test_errors_are_openais(llava: Serving, request_: dict[str, Any], status: int, said: str) -> None:
    smaller = Serving(llava.thread, type(llava.limits)(max_body=1), "toy")
    [reply] = exchange(make_app(smaller), request_)
    error = reply.json()["error"]
    assert reply.status_code == status and said in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and smaller.held == 0 and not smaller.open


def test_a_method_that_makes_images_of_words_alone_is_asked_for_no_edit() -> None:
    with serving(lambda: model_of(PRETRAINING)) as found:
        [reply] = exchange(make_app(found), {"url": EDITS, "data": {"prompt": "x"}, "files": {"image": png(RED)}})
        assert reply.status_code == 404 and "makes images of words alone" in reply.json()["error"]["message"]


def test_a_key_is_asked_of_all_but_health(llava: Serving) -> None:
    get = {"method": "GET", "url": "/v1/models"}
    wrong, bare, right, health = exchange(
        make_app(llava, "secret"),
        {**get, "headers": {"Authorization": "Bearer secre"}},
        get,
        {**get, "headers": {"Authorization": "Bearer secret"}},
        {"method": "GET", "url": "/health"},
    )
    assert [reply.status_code for reply in (wrong, bare, right, health)] == [401, 401, 200, 200]
    assert wrong.json()["error"]["code"] == "invalid_api_key" and wrong.headers["www-authenticate"] == "Bearer"


def test_pages_are_let_in_by_their_origin_alone(llava: Serving) -> None:
    page = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    ask = {"url": CHAT, "json": question("What?", max_tokens=1), "headers": {"Origin": "https://chat.example"}}
    preflight, asked = exchange(
        make_app(llava, "k", ["https://chat.example"]), {"method": "OPTIONS", "url": CHAT, "headers": page}, ask
    )
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "https://chat.example"
    assert asked.status_code == 401
    [asked] = exchange(make_app(llava, None, ["https://chat.example"]), ask)
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://chat.example"


@pytest.fixture
def slow(llava: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Serving, threading.Event, threading.Event]]:
    """The model waits before each batch until it is let on."""
    begun, go_on, own = threading.Event(), threading.Event(), Ask.run

    def run(self: Ask, *arguments: Any) -> Any:
        begun.set()
        go_on.wait()
        return own(self, *arguments)

    monkeypatch.setattr(Ask, "run", run)
    yield Serving(llava.thread, type(llava.limits)(max_queue=2, timeout=30.0), "toy"), begun, go_on
    go_on.set()


def test_more_than_may_wait_are_told_when_to_come_again(slow: Any) -> None:
    found, begun, go_on = slow
    app, body = make_app(found), question("What?", max_tokens=1)

    async def crowd() -> list[Any]:
        import httpx2 as httpx

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://toy") as client:
            first = asyncio.create_task(client.post(CHAT, json=body))
            await asyncio.to_thread(begun.wait)
            waiting = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(2)]
            while found.thread.num_waiting < 2:
                await asyncio.sleep(0.01)
            refused = await client.post(CHAT, json=body)
            found.stopping = True
            stopping, health = await client.post(CHAT, json=body), await client.get("/health")
            go_on.set()
            return [refused, stopping, health, *await asyncio.gather(first, *waiting)]

    refused, stopping, health, *answered = asyncio.run(crowd())
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert stopping.status_code == health.status_code == 503 and health.json()["status"] == "stopping"
    assert [reply.status_code for reply in answered] == [200] * 3
    assert found.held == 0 and not found.open


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_is_forgotten(slow: Any, stream: bool) -> None:
    found, begun, go_on = slow
    app = make_app(found)

    async def ask(body: dict[str, Any], gone: asyncio.Event) -> None:
        sent = asyncio.Queue[Any]()
        sent.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})

        async def receive() -> Any:
            if not sent.empty():
                return sent.get_nowait()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "headers": [],
            "query_string": b"",
            "asgi": {"spec_version": "2.3"},
        }
        await app(scope, receive, send)

    async def both() -> int:
        gone, never = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(ask(question("What?", max_tokens=1), never))
        await asyncio.to_thread(begun.wait)
        second = asyncio.create_task(ask(question("Never told?", max_tokens=1, stream=stream), gone))
        while found.thread.num_waiting < 1:
            await asyncio.sleep(0.01)
        gone.set()
        await second
        left = found.thread.num_waiting
        go_on.set()
        await first
        return left

    assert asyncio.run(both()) == 0
    assert found.held == 0 and not found.open


def test_a_short_answer_does_not_wait_for_the_long_ones_of_its_batch(llava: Serving, full: Any) -> None:
    body = question("What colour?", RED, max_tokens=300)
    [whole] = exchange(make_app(llava), {"url": CHAT, "json": body})
    full(2)
    stop = whole.json()["choices"][0]["message"]["content"][1]

    async def both() -> bool:
        import httpx2 as httpx

        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(llava)), base_url="http://toy") as client:
            long = asyncio.create_task(client.post(CHAT, json=body))
            await client.post(CHAT, json={**body, "stop": stop})
            early = not long.done() and not llava.thread.idle
            await long
            return early

    assert asyncio.run(both())


def test_an_answer_that_nobody_reads_any_more_ends_soon(llava: Serving) -> None:
    sent = [{"type": "http.request", "body": json.dumps(question("What?", max_tokens=1500, stream=True)).encode()}]
    pieces: list[bytes] = []
    tokens: list[None] = []
    hook = llava.model.method.vlm.lm_head.register_forward_hook(lambda *_: tokens.append(None))

    async def read_three_pieces() -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            if not sent:
                await gone.wait()
            return sent.pop() if sent else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pieces.append(message.get("body", b""))
            if len(pieces) == 4:
                gone.set()
                await asyncio.sleep(3600)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
        await make_app(llava)({**scope, "asgi": {"spec_version": "2.3"}}, receive, send)

    asyncio.run(read_three_pieces())
    while not llava.thread.idle:
        pass
    hook.remove()
    assert len(pieces) == 4 and 2 < len(tokens) < 1000 and llava.held == 0 and not llava.open


def test_a_bug_is_a_line_in_the_reply_and_a_traceback_in_the_log(
    llava: Serving, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(self: Ask, *arguments: Any) -> Any:
        raise KeyError("/home/me/secret")

    monkeypatch.setattr(Ask, "run", bug)
    [reply] = exchange(make_app(llava), {"url": CHAT, "json": question("What?")})
    assert reply.status_code == 500 and "secret" not in reply.text and reply.json()["error"]["code"] == "internal_error"
    assert "KeyError: '/home/me/secret'" in capsys.readouterr().err
    [reply] = exchange(make_app(llava), {"url": CHAT, "json": question("What?", stream=True)})
    assert reply.status_code == 500


def test_time_runs_out(slow: Any) -> None:
    found, _, go_on = slow
    hasty = Serving(found.thread, type(found.limits)(timeout=0.1), "toy")
    [reply] = exchange(make_app(hasty), {"url": CHAT, "json": question("What?")})
    go_on.set()
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"


def test_while_a_model_is_loaded_everybody_is_told() -> None:
    go_on = threading.Event()

    def load() -> Any:
        go_on.wait()
        raise RuntimeError

    from umm_zoo.serve.batching import ModelThread
    from umm_zoo.serve.limits import Limits

    thread = ModelThread(load, 1, 0.0, lambda: None)
    thread.thread.start()
    app = make_app(Serving(thread, Limits()))
    health, asked = exchange(app, {"url": "/health", "method": "GET"}, {"url": CHAT, "json": question("What?")})
    go_on.set()
    assert health.status_code == asked.status_code == 503 and health.json()["status"] == "loading"
    assert asked.json()["error"]["code"] == "loading" and asked.headers["retry-after"]


def test_conversations_are_refused_by_a_template_that_leaves_turns_out() -> None:
    plain = {**METHOD, "vlm": {**METHOD["vlm"], "template": {"_target_": "umm_zoo.backbones.templates.Plain"}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": data_url(RED)}]},
    ]
    with serving(lambda: model_of(plain)) as found:
        [reply] = exchange(make_app(found), {"url": CHAT, "json": {"messages": turns}})
    assert (
        reply.status_code == 400 and "messages[0]: found a system turn, which Plain leaves out" in reply.json()["error"]["message"]
    )


def test_requests_may_hold_so_much_together_and_one_alone_what_it_is_allowed(llava: Serving) -> None:
    found = Serving(llava.thread, type(llava.limits)(max_memory=2), "toy")
    with found.holding() as one:
        one(3 * 2**20)
        with pytest.raises(ApiError) as error, found.holding() as other:
            other(1)
        assert error.value.status == 429 and int(error.value.headers["Retry-After"]) >= 1
    assert found.held == 0
