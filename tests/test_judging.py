"""Judges: both orders, ties, habits, and a server of OpenAI's protocol that is faked here."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from PIL import Image

from tests.test_generate import METHOD
from umm_zoo.benchmarks.judge import EndpointJudge, Judge, LocalJudge, compare_captions, verdict
from umm_zoo.experiment.build import build


class Longer(Judge):
    """Prefers the longer caption."""

    def ask(self, image: Image.Image, question: str) -> str:
        first, second = question.split("A: ", 1)[1].split("\n\nB: ")
        letter = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "T"
        return f"A has {len(first)} letters.\n{letter}"


class Always(Judge):
    """Says the same whatever it is shown."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def ask(self, image: Image.Image, question: str) -> str:
        return self.answer


IMAGES = torch.zeros(3, 3, 8, 8)


def test_a_choice_that_survives_the_swap_counts():
    found = compare_captions(Longer(), IMAGES, ["a long one", "short", "same"], ["short", "a long one", "size"])
    assert (found.wins, found.ties, found.losses, found.invalid) == (1, 1, 1, 0)
    assert found.win_rate == 0.5 and found.first_share == 0.5


def test_a_judge_that_always_takes_the_first_decides_nothing():
    found = compare_captions(Always("Final answer: **A**"), IMAGES, ["x"] * 3, ["y"] * 3)
    assert (found.wins, found.ties, found.losses, found.first_share) == (0, 3, 0, 1.0)


def test_answers_without_a_verdict_are_counted_apart():
    found = compare_captions(Always("I cannot tell."), IMAGES, ["x"] * 3, ["y"] * 3)
    assert found.invalid == 3 and found.win_rate != found.win_rate
    with pytest.raises(ValueError, match="2 and 3 captions"):
        compare_captions(Longer(), IMAGES, ["x"] * 2, ["y"] * 3)


def test_any_model_of_this_package_judges():
    found = compare_captions(LocalJudge(build(METHOD["vlm"]), max_new_tokens=2), IMAGES[:1], ["x"], ["y"])  # untrained: no verdict
    assert (found.wins, found.ties, found.losses, found.invalid) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("answer", "found"),
    [("scores\nA", "first"), ("B.\n\n", "second"), ("Winner: T", "tie"), ("[[B]]", "second"), ("A good caption", None), ("", None)],
)
def test_verdict_is_the_last_line(answer: str, found: str | None):
    assert verdict(answer) == found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []

    class Fake(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            question = body["messages"][0]["content"][0]["text"]
            reply: Any = {"choices": [{"message": {"content": Longer().ask(None, question)}}]}  # type: ignore[arg-type]
            if body["model"] == "broken":
                reply = {"error": "no such model"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_: Any) -> None:
            pass

    fake = HTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"http://127.0.0.1:{fake.server_port}/v1", asked
    fake.shutdown()


def test_endpoint(server: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch):
    url, asked = server
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = EndpointJudge(f"{url}/", "some-model", "JUDGE_KEY")
    found = compare_captions(judge, IMAGES[:1] + 1, ["a long caption"], ["short"])
    assert found.wins == 1 and len(asked) == 2
    assert asked[0]["path"] == "/v1/chat/completions" and asked[0]["key"] == "Bearer secret" and asked[0]["temperature"] == 0
    sent = asked[0]["messages"][0]["content"][1]["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(sent))).getpixel((0, 0)) == (255, 255, 255)


def test_endpoint_that_does_not_answer_is_named(server: tuple[str, list[dict[str, Any]]]):
    with pytest.raises(ConnectionError, match="KeyError"):
        EndpointJudge(server[0], "broken").ask(Image.new("RGB", (4, 4)), "A: x\n\nB: y")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        EndpointJudge("http://127.0.0.1:9/v1", "x", timeout=2).ask(Image.new("RGB", (4, 4)), "A: x\n\nB: y")
