"""The app of a server, in this process: answers and images are those of the command line."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("python_multipart")

from PIL import Image

from umm_zoo import generate
from umm_zoo.generation.model import Model
from umm_zoo.generation.run_data import RunData
from umm_zoo.methods.llava import LLaVA
from umm_zoo.serve.app import make_app
from umm_zoo.serve.serving import Serving

sys.path.insert(0, str(Path(__file__).parent))
from served import exchange, png, question, serving

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (20, 12), "blue")
CHAT, MADE, EDITS = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"


def words_of(run: Path, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    assert generate.main([str(run), *words, "--out", str(out)]) == 0
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def made_by(run: Path, tmp_path: Path, *words: str) -> list[bytes]:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    assert generate.main([str(run), *words, "--out", str(out)]) == 0
    return [file.read_bytes() for file in sorted(out.glob("0*.png"))]


def test_answers_are_those_of_the_command_line_and_go_in_one_batch(llava: Serving, full: Any, run: Path, tmp_path: Path) -> None:
    drawn = {"temperature": 0.9, "top_p": 0.8, "max_tokens": 8}
    bodies = [question("What colour?", RED, seed=3, **drawn), question("Which?", RED, BLUE, seed=4, **drawn)]
    bodies.append(question("What colour?", RED, seed=5, **drawn))
    full(3)
    before = llava.thread.batches
    replies = exchange(make_app(llava), *({"url": CHAT, "json": body} for body in bodies))
    told = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    while not llava.thread.idle:
        pass
    assert llava.thread.batches == before + 1
    rows = [
        {"images": ["red.png"], "question": "What colour?", "seed": 3},
        {"images": ["red.png", "blue.png"], "question": "Which?", "seed": 4},
        {"images": ["red.png"], "question": "What colour?", "seed": 5},
    ]
    (run / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--temperature", "0.9", "--top-p", "0.8", "--max-new-tokens", "8", "--batch-size", "1")
    assert told == [row["answer"] for row in words_of(run, tmp_path, "ask", "--batch", str(run / "rows.jsonl"), *options)]
    assert len(set(told)) == 3


def test_tokens_are_counted_and_an_answer_says_why_it_ends(llava: Serving) -> None:
    body = question("What colour?", RED, max_tokens=5)
    [reply] = exchange(make_app(llava), {"url": CHAT, "json": body})
    whole = reply.json()
    vlm = llava.model.method.vlm
    layouts = vlm.image_layouts(llava.model.load_images(RED), [1])
    [row] = vlm.encode_rows([[{"role": "user", "text": "<image>\nWhat colour?"}]], layouts, True)
    assert whole["usage"] == {"prompt_tokens": len(row.ids), "completion_tokens": 5, "total_tokens": len(row.ids) + 5}
    text = whole["choices"][0]["message"]["content"]
    assert whole["choices"][0]["finish_reason"] == "length" and len(text) > 3
    [cut] = exchange(make_app(llava), {"url": CHAT, "json": {**body, "stop": [text[2:4]]}})
    choice = cut.json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == text[: text.index(text[2:4])].strip()


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_is_the_whole_answer_in_pieces(llava: Serving) -> None:
    body = question("What colour?", RED, max_tokens=7, temperature=0.8, seed=2, n=2)
    app = make_app(llava)
    [whole] = exchange(app, {"url": CHAT, "json": body})
    [reply] = exchange(app, {"url": CHAT, "json": {**body, "stream": True, "stream_options": {"include_usage": True}}})
    events = events_of(reply.text)
    assert reply.headers["content-type"].startswith("text/event-stream")
    for choice in whole.json()["choices"]:
        own = [one for event in events for one in event["choices"] if one["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["finish_reason"] == choice["finish_reason"]
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole.json()["usage"]
    assert sum("content" in one["delta"] for event in events for one in event["choices"]) > 4


def test_a_method_that_answers_as_a_whole_is_told_in_one_piece(llava: Serving) -> None:
    class Own(LLaVA):
        def answer(self, batch: Any, max_new_tokens: int = 64, temperature: float = 0.0) -> list[str]:
            return ["one and two"] * len(batch)

    body, method = question("What?", stop=" and"), Own(llava.model.method.vlm).eval()
    with serving(lambda: Model.of(method, RunData({"image_size": 8}), "cpu")) as found:
        app = make_app(found)
        whole, stream, top_p = exchange(
            app, *({"url": CHAT, "json": {**body, **more}} for more in ({}, {"stream": True}, {"top_p": 0.5, "temperature": 1}))
        )
    assert whole.json()["usage"] is None and whole.json()["choices"][0]["finish_reason"] == "stop"
    assert whole.json()["choices"][0]["message"]["content"] == "one"
    deltas = [choice["delta"].get("content") for event in events_of(stream.text) for choice in event["choices"]]
    assert deltas == ["", "one", None]
    assert top_p.status_code == 400 and "gives its answers as a whole" in top_p.json()["error"]["message"]


def test_images_have_the_bytes_of_the_command_line(painter: tuple[Path, Serving], tmp_path: Path) -> None:
    run, found = painter
    form = {"prompt": "Make it green.", "seed": "5", "guidance": "2", "image_guidance": "1.5"}
    one, several = [("image", ("a.png", png(RED)))], [("image[]", ("a.png", png(RED))), ("image[]", ("b.png", png(BLUE)))]
    replies = exchange(
        make_app(found),
        {"url": MADE, "json": {"prompt": "a star", "n": 1, "seed": 3, "size": "12x8", "steps": 1}},
        {"url": EDITS, "data": form, "files": one},
        {"url": EDITS, "data": {"prompt": "Both.", "seed": "1"}, "files": several},
    )
    made = [[base64.b64decode(entry["b64_json"]) for entry in reply.json()["data"]] for reply in replies]
    red, blue = str(run / "red.png"), str(run / "blue.png")
    words = ["text-to-image", "a star", "--seed", "3", "--size", "8x12", "--steps", "1", "--batch-size", "1"]
    assert made[0] == made_by(run, tmp_path, *words)
    words = ["edit", red, "Make it green.", "--seed", "5", "--guidance", "2", "--image-guidance", "1.5"]
    assert made[1] == made_by(run, tmp_path, *words)
    assert made[2] == made_by(run, tmp_path, "compose", red, blue, "Both.", "--seed", "1")
    assert replies[0].json()["size"] == "12x8" and [entry["seed"] for entry in replies[0].json()["data"]] == [3]


def test_other_formats_are_what_they_are_called(painter: tuple[Path, Serving]) -> None:
    body = {"prompt": "a star", "steps": 1, "output_format": "webp", "output_compression": 50}
    [reply] = exchange(make_app(painter[1]), {"url": MADE, "json": body})
    assert Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))).format == "WEBP"


def test_a_run_is_listed_with_what_it_can_do(llava: Serving, painter: tuple[Path, Serving]) -> None:
    models, one, none, health = exchange(
        make_app(llava),
        *({"url": url, "method": "GET"} for url in ("/v1/models", "/v1/models/toy", "/v1/models/other/toy", "/health")),
    )
    assert models.json()["data"] == [one.json()] and one.json()["id"] == "toy"
    assert one.json()["abilities"] == ["caption", "ask"] and one.json()["method"] == "LLaVA"
    assert none.status_code == 404 and none.json()["error"]["code"] == "model_not_found"
    assert health.status_code == 200 and health.json()["status"] == "ready"
    [card] = exchange(make_app(painter[1]), {"url": "/v1/models/toy", "method": "GET"})
    assert {"text-to-image", "edit", "compose"} <= {*card.json()["abilities"]}


def test_the_official_client_understands_it(llava: Serving, painter: tuple[Path, Serving]) -> None:
    openai = pytest.importorskip("openai")
    import httpx2 as httpx

    def client(found: Serving) -> Any:
        transport = httpx.ASGITransport(make_app(found, "k"))
        return openai.AsyncOpenAI(
            api_key="k", base_url="http://toy/v1", http_client=httpx.AsyncClient(transport=transport), max_retries=0
        )

    async def use() -> None:
        async with client(llava) as one:
            assert [model.id async for model in one.models.list()] == ["toy"]
            messages = question("What colour?", RED)["messages"]
            whole = await one.chat.completions.create(model="toy", messages=messages, max_tokens=6)
            stream = await one.chat.completions.create(model="toy", messages=messages, max_tokens=6, stream=True)
            told = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert told == whole.choices[0].message.content and whole.usage.completion_tokens == 6
            with pytest.raises(openai.NotFoundError, match="cannot generate images"):
                await one.images.generate(model="toy", prompt="a star")
            with pytest.raises(openai.BadRequestError, match="found an address"):
                part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
                await one.chat.completions.create(model="toy", messages=[{"role": "user", "content": [part]}])
        async with client(painter[1]) as two:
            more = {"seed": 3, "steps": 1}
            made = await two.images.generate(model="toy", prompt="a star", n=2, response_format="b64_json", extra_body=more)
            assert len(made.data) == 2 and made.data[0].b64_json != made.data[1].b64_json
            edited = await two.images.edit(model="toy", image=[png(RED), png(BLUE)], prompt="Both.", extra_body=more)
            assert Image.open(io.BytesIO(base64.b64decode(edited.data[0].b64_json))).size[0] > 0

    asyncio.run(use())
