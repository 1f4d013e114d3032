"""A server as a process of its own: pieces that come one by one, signals, and what keeps it from starting."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from finished_runs import write_run
from PIL import Image
from test_generate import METHOD

from umm_zoo.serve.__main__ import main

sys.path.insert(0, str(Path(__file__).parent))
from served import question

pytestmark = pytest.mark.processes


class Started:
    """A server on a free port, up to its being ready."""

    def __init__(self, run: Path, *options: str) -> None:
        words = [sys.executable, "-m", "umm_zoo.serve", str(run), "--port", "0", "--name", "toy", *options]
        outputs: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(words, **outputs, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+/v1)", line):
                self.url = found[1]
            if line.startswith("ready: toy can caption, ask"):
                break

    def end(self) -> tuple[int, str]:
        """Its code and what it said last."""
        rest, _ = self.process.communicate(timeout=120)
        return self.process.returncode, rest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("llava"), METHOD)


@pytest.fixture
def started(run: Path) -> Iterator[Started]:
    found = Started(run, "--max-body", "1")
    yield found
    if found.process.poll() is None:
        found.process.kill()
        found.process.communicate()


def test_pieces_come_one_by_one_and_a_signal_lets_them_be_finished(started: Started) -> None:
    """Of an answer of many tokens the first piece is there long before the last; new requests are refused then."""
    body = question("What colour?", Image.new("RGB", (8, 8), "red"), max_tokens=1500, temperature=0.9, seed=1, stream=True)
    with httpx.Client(base_url=started.url, timeout=300) as http:
        large = http.post("/chat/completions", content=bytes(2**20 + 1))
        assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"
        with http.stream("POST", "/chat/completions", json=body) as reply:
            lines = (line for line in reply.iter_lines() if line)
            first = [next(lines) for _ in range(4)]
            started.process.send_signal(signal.SIGTERM)
            refused = http.get("/models")
            while refused.status_code == 200:
                refused = http.get("/models")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            told = [*first, *lines]
    assert told[-1] == "data: [DONE]" and len(told) > 100
    assert json.loads(told[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
    code, rest = started.end()
    assert code == 0 and "stopping: what was asked for is finished" in rest and "Traceback" not in rest


def test_a_second_signal_ends_at_once(started: Started) -> None:
    body = question("What colour?", max_tokens=4096, temperature=0.9, seed=1)

    def ask() -> None:
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{started.url}/chat/completions", json=body, timeout=300)

    asked = threading.Thread(target=ask)
    asked.start()
    health = f"{started.url.removesuffix('/v1')}/health"
    while httpx.get(health).json()["open"] == 0:
        pass
    started.process.send_signal(signal.SIGINT)
    started.process.send_signal(signal.SIGINT)  # as some programs send it: to the process, and to its group
    while httpx.get(health).json()["status"] != "stopping":
        pass
    while started.process.poll() is None:
        time.sleep(0.1)
        started.process.send_signal(signal.SIGINT)
    code, rest = started.end()
    asked.join()
    assert code == 128 + signal.SIGINT and "stopped at once" in rest


def said(capsys: Any, *words: str) -> str:
    assert main(list(words)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return str(line)


def test_what_keeps_it_from_starting_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Address already in use" in said(capsys, str(run), "--port", port)
    assert "--port: found 99999" in said(capsys, str(run), "--port", "99999")
    assert "--host and --port: found no.such.host.invalid" in said(capsys, str(run), "--host", "no.such.host.invalid")
    assert "--max-n: found 'many'" in said(capsys, str(run), "--max-n", "many")
    assert "--api-key: found a key that is empty" in said(capsys, str(run), "--api-key", "")
