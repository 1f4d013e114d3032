"""Judges: a server of OpenAI's protocol that is faked here, the cache, a model of this package."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.finished_runs import write_run
from tests.judge_server import Told, images_of, serving, slowly, text_of
from tests.test_generate import METHOD
from umm_zoo.benchmarks.base import Benchmark
from umm_zoo.benchmarks.judging.endpoint import EndpointJudge
from umm_zoo.benchmarks.judging.judge import HOPELESS, Judge, NoAnswerError, Question
from umm_zoo.benchmarks.judging.local import LocalJudge
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build
from umm_zoo.experiment.check import check_node
from umm_zoo.experiment.trust import Trust

RED, BLUE = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (3, 5), "blue")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge_of(url: str, **more: Any) -> EndpointJudge:
    return EndpointJudge(url, **{"model": "some-model", "wait": 0.001, "cache": None, **more})


def test_request_has_texts_and_images_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", " secret\n")
    with serving(lambda body: "fine") as server:
        judge = judge_of(f"{server.url}/chat/completions/", key_variable="JUDGE_KEY", extra={"seed": 7, "max_tokens": None})
        assert judge.ask(Question(("before", RED, "between", BLUE), system="Be strict.")) == "fine"
    [asked] = server.asked
    assert (asked["path"], asked["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert (asked["model"], asked["temperature"], asked["seed"], "max_tokens" in asked) == ("some-model", 0, 7, False)
    assert asked["messages"][0] == {"role": "system", "content": "Be strict."}
    assert [part["type"] for part in asked["messages"][1]["content"]] == ["text", "image_url", "text", "image_url"]
    assert [image.size for image in images_of(asked)] == [(6, 4), (3, 5)]
    assert images_of(asked)[0].getpixel((0, 0)) == (255, 0, 0)


def test_images_are_shrunk_and_sent_in_the_type_of_the_question() -> None:
    with serving(lambda body: "fine") as server:
        judge_of(server.url, max_image_size=10).ask(Question([Image.new("RGB", (40, 12))], image_type="JPEG"))
    [image] = images_of(server.asked[0])
    assert (image.format, image.size) == ("JPEG", (10, 3))


def test_busy_and_failing_servers_are_asked_again() -> None:
    replies = iter([(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}), (503, "down"), "at last"])
    with serving(lambda body: next(replies)) as server:
        assert judge_of(server.url, retries=2).ask(Question(["?"])) == "at last"
    assert len(server.asked) == 3


def test_silent_server_is_asked_again() -> None:
    waits = iter([4.0, 0.0])
    with serving(lambda body: slowly(next(waits), "fine")) as server:
        assert judge_of(server.url, timeout=2, retries=1).ask(Question(["?"])) == "fine"


def test_call_fails_after_its_retries() -> None:
    with (
        serving(lambda body: (500, {"error": "broken"})) as server,
        pytest.raises(NoAnswerError, match="500: broken after 3 tries"),
    ):
        judge_of(server.url, retries=2).ask(Question(["?"]))
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            401,
            {"error": {"message": "bad key"}},
            r"a refusal \(401: bad key\), expected a key .* \$OPENAI_API_KEY",
        ),
        (404, {"detail": "what"}, "no such model or address .*the model 'some-model'"),
        (429, {"error": {"code": "insufficient_quota", "message": "pay"}}, "an account without means"),
    ],
)
def test_what_no_request_will_mend_ends_in_one_line(status: int, body: Any, said: str) -> None:
    with serving(lambda _: (status, body)) as server, pytest.raises(UserError, match=said):
        judge_of(server.url).ask(Question(["?"]))
    assert len(server.asked) == 1


def test_no_server_and_no_address_end_in_one_line() -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1: found no server"):
        judge_of("http://127.0.0.1:9/v1").ask(Question(["?"]))
    with pytest.raises(UserError, match="url: found 'localhost:80'"):
        judge_of("localhost:80")


@pytest.mark.parametrize("said", ["", (200, {"error": "no such model"}), (200, "<html>"), (400, {"message": "too large"})])
def test_reply_without_an_answer_is_a_failed_call(said: Any) -> None:
    with serving(lambda _: said) as server, pytest.raises(NoAnswerError):
        judge_of(server.url).ask(Question(["?"]))
    assert len(server.asked) == 1


def test_judge_that_fails_from_the_first_call_on_ends_the_command() -> None:
    judge = Told(lambda question: None)
    with pytest.raises(UserError, match="10 failed calls and no answer"):
        judge.ask_all([Question([str(number)]) for number in range(HOPELESS + 5)])
    assert len(judge.asked) == HOPELESS


def test_parallel_answers_come_in_the_order_of_their_questions() -> None:
    gate = threading.Barrier(3)

    def say(body: Any) -> str:
        gate.wait(2)  # three are there at once, or this fails
        return slowly(0.02 if "0" in text_of(body) else 0.0, text_of(body).upper())

    with serving(say) as server:
        replies = judge_of(server.url, parallel=3).ask_all([Question([f"q{number}"]) for number in range(6)])
    assert [reply.value for reply in replies] == ["Q0", "Q1", "Q2", "Q3", "Q4", "Q5"]
    assert server.most_at_once == 3


def test_second_run_sends_no_request(tmp_path: Path) -> None:
    questions = [Question(["?", RED]), Question(["?", BLUE]), Question(["?", RED])]
    with serving(lambda body: f"{images_of(body)[0].size}") as server:
        found = [judge_of(server.url, cache=str(tmp_path)).ask_all(questions) for _ in range(2)]
        assert len(server.asked) == 2
        judge_of(server.url, cache=str(tmp_path), max_tokens=5).ask_all(questions[:1])
        assert len(server.asked) == 3
    assert found[0] == found[1]
    assert [reply.value for reply in found[0]] == ["(6, 4)", "(3, 5)", "(6, 4)"]


@pytest.mark.parametrize("damage", [b"", b'{"answer": ', b'{"answer": 3}', b"[]"])
def test_torn_file_of_the_cache_is_asked_again(tmp_path: Path, damage: bytes) -> None:
    judge = Told(lambda question: "fine")
    judge.cache = str(tmp_path)
    judge.ask(Question(["?"]))
    [file] = tmp_path.rglob("*.json")
    file.write_bytes(damage)
    assert judge.ask(Question(["?"])) == "fine"
    assert len(judge.asked) == 2


def test_answers_that_cannot_be_read_are_asked_for_again_and_failed_calls_are_not_kept(tmp_path: Path) -> None:
    times: Counter[str] = Counter()

    def say(question: Question) -> str | None:
        times[name := str(question.content[0])] += 1
        return {"number": "7", "late": "8" if times[name] == 2 else "eight", "never": "nine", "fails": None}[name]

    judge = Told(say, tries=3)
    judge.cache = str(tmp_path)
    questions = [Question([name]) for name in ("number", "late", "never", "fails")]
    first = judge.ask_all(questions, int)
    assert [reply.value for reply in first] == [7, 8, None, None]
    assert [reply.text for reply in first] == ["7", "8", "nine", ""]
    assert times == {"number": 1, "late": 2, "never": 3, "fails": 1}
    assert [reply.value for reply in judge.ask_all(questions, int)] == [7, 8, None, None]
    assert times == {"number": 1, "late": 2, "never": 3, "fails": 2}


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    judge = Told(lambda question: "fine")
    judge.cache = str(tmp_path / "file")
    with pytest.raises(UserError, match=r"file: found a place that cannot be written .*the judge's 'cache'"):
        judge.ask(Question(["?"]))


def test_thinking_is_no_part_of_an_answer() -> None:
    with serving(lambda _: "<think>No, wait.</think>\n\nyes") as server:
        assert judge_of(server.url).ask(Question(["?"])) == "yes"


@pytest.fixture(scope="module")
def vlm() -> Any:
    torch.manual_seed(0)
    return build(METHOD["vlm"])  # type: ignore[arg-type]


def test_run_and_its_backbone_judge_alike(vlm: Any, tmp_path: Path) -> None:
    question = Question(("Which is", RED, "redder?", BLUE), system="Judge.")
    run = write_run(tmp_path / "run", METHOD, image_size=vlm.image_size)
    judges: list[Judge] = [LocalJudge(vlm, max_new_tokens=4, cache=""), LocalJudge(run=str(run), max_new_tokens=4, cache="")]
    first, second = (judge.ask(question) for judge in judges)
    assert first == second != ""
    assert judges[0].identity["weights"] != judges[1].identity["weights"]  # of a backbone, and of the method around it
    assert first != judges[0].ask(Question(("Which is", BLUE, "redder?", RED), system="Judge."))


def test_local_judge_needs_one_model(vlm: Any) -> None:
    for models in ({}, {"vlm": vlm, "run": "runs/x"}):
        with pytest.raises(UserError, match=r"(neither|both) 'vlm'"):
            LocalJudge(**models)


def test_setting_of_a_judge_that_does_not_fit_is_named_by_its_word() -> None:
    node = {"_target_": "umm_zoo.benchmarks.judging.wise.Wise", "judge": {"_target_": f"{EndpointJudge.__module__}.EndpointJudge"}}
    with pytest.raises(UserError) as raised:
        check_node(node, Benchmark, "", Trust())
    assert {problem.where for problem in raised.value.problems} == {"judge.url", "judge.model"}
