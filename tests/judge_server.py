"""A server of OpenAI's chat protocol in this process, and judges that answer as they are told."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from umm_zoo.benchmarks.judging.judge import Judge, NoAnswerError, Question

#: What the server says to a request: a text, or a status with a body and headers.
Said = str | tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Server:
    """What was asked, and where."""

    def __init__(self, say: Callable[[dict[str, Any]], Said]) -> None:
        self.say, self.asked, self.url = say, list[dict[str, Any]](), ""
        self.at_once = self.most_at_once = 0


@contextmanager
def serving(say: Callable[[dict[str, Any]], Said]) -> Iterator[Server]:
    """A server that answers each request's body as ``say`` does."""
    server, lock = Server(say), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            said = server.say(body)
            status, reply, headers = 200, {"choices": [{"message": {"content": said}}]}, dict[str, str]()
            if isinstance(said, tuple):
                status, reply, headers = (*said, {})[:3]  # type: ignore[misc]
            sent = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            with lock:
                server.at_once -= 1
            self.send_response(status)
            for name, value in {"Content-Length": str(len(sent)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *_: None  # type: ignore[method-assign]  # of those who wait no longer
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def text_of(body: Mapping[str, Any]) -> str:
    """All texts of a request."""
    parts = [part for message in body["messages"] for part in _parts(message["content"])]
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def images_of(body: Mapping[str, Any]) -> list[Image.Image]:
    """The images of a request, in their order."""
    urls = [part["image_url"]["url"] for part in _parts(body["messages"][-1]["content"]) if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) for url in urls]


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Told(Judge):
    """Judge that answers as a function does; None is a failed call."""

    def __init__(self, say: Callable[[Question], str | None], tries: int = 1) -> None:
        self.say, self.tries, self.asked = say, tries, list[Question]()

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": "told"}

    def answer(self, question: Question) -> str:
        self.asked.append(question)
        if (said := self.say(question)) is None:
            raise NoAnswerError("told so")
        return said


def slowly(seconds: float, said: str) -> str:
    time.sleep(seconds)
    return said
