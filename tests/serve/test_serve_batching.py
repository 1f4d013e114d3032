"""The thread that holds the model: what goes together, and whose fault is whose."""

from __future__ import annotations

import queue
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from umm_zoo.errors import UserError
from umm_zoo.generation.answering import Ask
from umm_zoo.generation.requests import Request, Result
from umm_zoo.serve.batching import Job, ModelThread

sys.path.insert(0, str(Path(__file__).parent))


class Echo(Ask):
    """Says the question; waits at the first until it is let on."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def run(self, model: Any, requests: list[Request]) -> list[Result]:
        self.batches.append([request.question for request in requests])
        self.begun.set()
        self.go_on.wait()
        if "bad" in self.batches[-1]:
            raise RuntimeError("a bug") if len(requests) > 1 else UserError("bad", "nothing", "something")
        return [Result(request, request.question) for request in requests]


@pytest.fixture
def thread() -> Any:
    found = ModelThread(lambda: SimpleNamespace(), 3, 0.0, lambda: None)  # type: ignore[arg-type, return-value]
    found.thread.start()
    yield found
    found.end()
    found.thread.join()


def jobs(command: Ask, found: queue.Queue[Any], *texts: str, **settings: Any) -> list[Job]:
    own = {"temperature": 0.0, **settings}
    return [Job(command, Request([], text, {**own, "seed": place}), found.put) for place, text in enumerate(texts)]


def test_what_waits_together_goes_together_with_its_kind(thread: ModelThread) -> None:
    echo, found = Echo(), queue.Queue[Any]()
    thread.put(jobs(echo, found, "first"))
    echo.begun.wait()
    thread.put(jobs(echo, found, "a", "b"))
    thread.put(jobs(echo, found, "hot", temperature=1.0))
    thread.put(jobs(echo, found, "c", "d"))
    echo.go_on.set()
    answers = [found.get().answer for _ in range(6)]
    assert echo.batches == [["first"], ["a", "b", "c"], ["hot"], ["d"]] and answers == ["first", "a", "b", "c", "hot", "d"]
    while not thread.idle:
        pass


def test_a_fault_is_that_of_one_job_and_others_get_their_answers(thread: ModelThread) -> None:
    echo, found = Echo(), queue.Queue[Any]()
    echo.go_on.set()
    with thread._change:  # so that they come at once
        thread.put(jobs(echo, found, "a", "bad", "b"))
    results = [found.get() for _ in range(3)]
    assert [getattr(result, "answer", str(result)) for result in results] == ["a", "bad: found nothing, expected something", "b"]


def test_what_nobody_waits_for_is_not_made(thread: ModelThread) -> None:
    echo, found = Echo(), queue.Queue[Any]()
    thread.put(jobs(echo, found, "first"))
    echo.begun.wait()
    gone = jobs(echo, found, "gone")
    thread.put(gone)
    thread.put(jobs(echo, found, "last"))
    thread.drop(gone)
    assert thread.num_waiting == 1
    echo.go_on.set()
    assert [found.get().answer for _ in range(2)] == ["first", "last"] and echo.batches == [["first"], ["last"]]


def test_the_oldest_waits_for_others_but_not_for_long() -> None:
    echo, found = Echo(), queue.Queue[Any]()
    echo.go_on.set()
    thread = ModelThread(lambda: SimpleNamespace(), 2, 60.0, lambda: None)  # type: ignore[arg-type, return-value]
    thread.thread.start()
    thread.put(jobs(echo, found, "a"))
    thread.put(jobs(echo, found, "b"))  # and now the batch is full
    assert [found.get().answer for _ in range(2)] == ["a", "b"] and echo.batches == [["a", "b"]]
    thread.window = 0.01
    thread.put(jobs(echo, found, "alone"))
    assert found.get().answer == "alone"
    thread.end()
    thread.thread.join()


def test_a_model_that_cannot_be_loaded_is_said() -> None:
    def load() -> Any:
        raise UserError("run", "nothing", "a run")

    said = threading.Event()
    thread = ModelThread(load, 1, 0.0, said.set)
    thread.thread.start()
    assert said.wait(60) and isinstance(thread.failure, UserError)
    thread.thread.join()
