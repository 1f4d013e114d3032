"""Answers token by token: from a seed of each row, watched, counted, and behind earlier turns."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from test_generate import METHOD

from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build_method
from umm_zoo.generation.answering import Ask
from umm_zoo.generation.model import Model
from umm_zoo.generation.requests import Request
from umm_zoo.generation.run_data import RunData
from umm_zoo.generation.running import run_batch
from umm_zoo.methods.llava import LLaVA

RED = Image.new("RGB", (8, 8), "red")


@pytest.fixture(scope="module")
def model() -> Model:
    method: Any = build_method({"method": METHOD})
    return Model.of(method.eval(), RunData({"image_size": 8}), "cpu")


def request(question: str, seed: int = 0, images: Any = (), **more: Any) -> Request:
    settings = {"max_new_tokens": 6, "temperature": 0.9, "top_p": 0.8, "seed": seed}
    return Request(list(images), question, settings, **more)


def test_drawn_rows_of_a_batch_are_those_that_each_gives_alone(model):
    rows = [request("What colour?", 3, [RED]), request("Which one of these?", 4), request("What colour?", 5, [RED])]
    together = [result.answer for result in run_batch(model, Ask(), rows)]
    assert together == [run_batch(model, Ask(), [row])[0].answer for row in rows]
    how = {"max_new_tokens": 6, "temperature": 0.9, "top_p": 0.8}
    model.method.run_data = RunData({"image_size": 8})
    assert together[0] == model.method.ask(RED, "What colour?", seed=3, **how)
    assert together[0] != together[2]


def test_answers_are_watched_as_they_grow_and_ended_one_by_one(model):
    seen: dict[str, list[Any]] = {"one": [], "two": []}
    rows = [
        request("One?", images=[RED], watch=lambda answer: not seen["one"].append(answer) and len(answer.ids) < 2),
        request("Two?", watch=lambda answer: not seen["two"].append(answer)),
    ]
    one, two = run_batch(model, Ask(), rows)
    assert [len(answer.ids) for answer in seen["one"]] == [1, 2] and one.tokens.ids == seen["one"][-1].ids
    assert [len(answer.ids) for answer in seen["two"]] == list(range(1, len(two.tokens.ids) + 1))
    assert two.answer == seen["two"][-1].text and not one.tokens.ended
    vlm = model.method.vlm
    [alone] = vlm.encode_rows(
        [[{"role": "user", "text": "<image>\nOne?"}]], vlm.image_layouts([model.load_images(RED)[0]], [1]), True
    )
    assert one.tokens.num_prompt_tokens == len(alone.ids)


def test_earlier_turns_stand_before_the_question_with_their_images(model):
    earlier = [
        {"role": "system", "text": "Be brief."},
        {"role": "user", "text": "<image>\nWhat is it?"},
        {"role": "assistant", "text": "red"},
    ]
    blue = Image.new("RGB", (8, 8), "blue")
    batch = model.batch_of([request("And this?", images=[RED, blue], earlier=earlier), request("Nothing?")])
    assert batch.conversations[0] == [*earlier, {"role": "user", "text": "<image>\nAnd this?"}]
    assert batch.image_counts == [2, 0] and batch.images[0][2].max() < 0 < batch.images[1][2].min()
    assert batch.conversations[1] == [{"role": "user", "text": "Nothing?"}]


def test_a_method_that_answers_in_its_own_way_is_asked_in_it(model):
    class Own(LLaVA):
        def answer(self, batch, max_new_tokens=64, temperature=0.0):
            return ["mine"] * len(batch)

    own = Model.of(Own(model.method.vlm).eval(), RunData({"image_size": 8}), "cpu")
    plain = request("What?")
    plain.settings["top_p"] = 1.0
    assert run_batch(own, Ask(), [plain])[0].answer == "mine"
    with pytest.raises(UserError, match=r"top_p: found 0.8, expected 1: a Own gives its answers as a whole"):
        run_batch(own, Ask(), [request("What?")])
