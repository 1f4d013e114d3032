"""Language metrics against values worked out by hand."""

import math
from typing import Any

import pytest
import torch
from values_over_ranks import scored

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics import (
    BLEU,
    POPE,
    AnswerAccuracy,
    CIDEr,
    LanguagePrior,
    PairedAccuracy,
    Perplexity,
    Retrieval,
    YesNo,
    normalise,
)
from umm_zoo.outputs import Outputs


def batch(rows: list[tuple[str, str, dict]], source: str = "toy") -> Batch:
    """Rows of (question, truth, meta)."""
    return Batch(
        keys=[f"{source}/0:{i}" for i in range(len(rows))],
        conversations=[[{"role": "user", "text": question}, {"role": "assistant", "text": truth}] for question, truth, _ in rows],
        meta=[meta for _, _, meta in rows],
    )


@pytest.mark.parametrize(
    ("found", "truth", "same"),
    [
        ("Red.", "red", True),
        ("  TOP-left\n", "top left", True),
        ("It's 3.5!", "it s 3.5", True),
        ("3.5", "35", False),
        ("-1", "1", False),
        ("Größe", "GRÖSSE", True),
        ("?", "", False),
        ("blue circle", "blue", False),
    ],
)
def test_normalise_drops_only_case_punctuation_and_space(found: str, truth: str, same: bool) -> None:
    assert (normalise(found) == normalise(truth)) is same


def test_answer_accuracy_by_kind_and_overall() -> None:
    rows = [("?", "red", {"kind": "colour"}), ("?", "blue", {"kind": "colour"}), ("?", "3", {"kind": "count"}), ("p", "", {})]
    values = scored(
        AnswerAccuracy(),
        (Outputs(answers=["Red.", "red", "3", "anything"]), batch(rows)),
        (Outputs(answers=["three"]), batch([("?", "3", {"kind": "count"})])),
        (Outputs(answers=["yes"]), batch([("?", "yes", {"task": "vqa"})])),
    )
    assert values == pytest.approx({"overall": 3 / 5, "colour": 1 / 2, "count": 1 / 2, "vqa": 1.0})


def test_answer_accuracy_of_chosen_tasks() -> None:
    rows = [("?", "a", {"task": "vqa", "kind": "k"}), ("?", "long text", {"task": "caption", "kind": "short"})]
    outputs = Outputs(answers=["a", "other"])
    assert scored(AnswerAccuracy(tasks=["vqa"]), (outputs, batch(rows))) == {"overall": 1.0, "k": 1.0}


def test_a_missing_output_is_named() -> None:
    with pytest.raises(ValueError, match=r"AnswerAccuracy: found the outputs \['loss'\], expected 'answers'"):
        AnswerAccuracy().update(Outputs({"loss": torch.tensor(1.0)}), batch([("?", "a", {})]))


READERS = [AnswerAccuracy, BLEU, CIDEr, LanguagePrior, PairedAccuracy, Perplexity, Retrieval, YesNo]


@pytest.mark.parametrize("kind", READERS)
def test_a_batch_of_other_tasks_need_not_have_what_a_metric_reads(kind: Any) -> None:
    kind(tasks=["questions"]).update(Outputs(), batch([("Is it?", "yes", {"task": "text_to_image"})]))
    if kind is not LanguagePrior:  # reads no outputs
        with pytest.raises(UserError, match="found the outputs"):
            kind(tasks=["questions"]).update(Outputs(), batch([("Is it?", "yes", {"task": "questions", "kind": "exists"})]))


def test_yes_no_five_numbers_by_hand() -> None:
    # truth yes: 2 right, 1 said no, 1 unparsed; truth no: 3 right, 1 said yes
    truths = ["yes"] * 4 + ["no"] * 4
    answers = ["Yes.", "yes, it is", "no", "maybe", "No", "no!", "NO", "yes"]
    negatives = [None] * 4 + ["random", "random", "adversarial", "adversarial"]
    rows = [("?", t, {"kind": "exists", "negative": n}) for t, n in zip(truths, negatives, strict=True)]
    rows.append(("?", "red", {"kind": "colour"}))
    assert scored(YesNo(), (Outputs(answers=[*answers, "red"]), batch(rows))) == pytest.approx(
        {
            "accuracy": 5 / 8,
            "precision": 2 / 3,
            "recall": 2 / 4,
            "f1": 4 / 7,  # 2 * 2/3 * 1/2 / (2/3 + 1/2)
            "yes_ratio": 3 / 8,
            "unparsed": 1.0,
            "accuracy_random": 1.0,
            "accuracy_adversarial": 0.5,
        }
    )


@pytest.mark.parametrize(
    ("answer", "said", "unparsed"),
    [
        ("Yes, there is a dog in the image.", "yes", 0),
        ("yes", "yes", 0),
        ("No", "no", 0),
        ("No, there is no dog.", "no", 0),
        ("There is no dog in the image.", "no", 0),
        ("The image does not show a dog, it is a cat", "no", 0),
        ("not sure", "no", 0),
        ("Yes. But there is no cat.", "yes", 0),  # the first sentence alone
        ("There is a dog. No cat", "yes", 1),
        ("There isn't a dog.", "yes", 1),
        ("Not that I can see.", "yes", 1),  # to the letter
        ("no!", "yes", 1),
        ("NO", "yes", 1),
        ("no\nyes", "yes", 0),
        ("Nothing", "yes", 1),
        ("", "yes", 1),
        (".", "yes", 1),
    ],
)
def test_pope_reads_sentences_as_its_released_script_does(answer: str, said: str, unparsed: int) -> None:
    values = scored(
        POPE(kinds=["q"]), (Outputs(answers=[answer] * 2), batch([("?", "yes", {"kind": "q"}), ("?", "no", {"kind": "q"})]))
    )
    assert values["yes_ratio"] == (said == "yes") and values["accuracy"] == 0.5
    assert (values["recall"], values["unparsed"]) == (said == "yes", 2 * unparsed)


def test_yes_no_without_a_yes_is_zero_not_nan() -> None:
    values = scored(YesNo(kinds=["q"]), (Outputs(answers=["no"]), batch([("?", "yes", {"kind": "q"})])))
    assert (values["precision"], values["recall"], values["f1"]) == (0, 0, 0)


def test_paired_needs_both_rows_right_whatever_batch_they_come_in() -> None:
    first = [("?", "yes", {"pair": 1}), ("?", "yes", {"pair": 2}), ("?", "yes", {"pair": 3}), ("?", "yes", {})]
    second = [("?", "no", {"pair": 1}), ("?", "no", {"pair": 2})]
    steps = (Outputs(answers=["yes", "yes", "yes", "no"]), batch(first)), (Outputs(answers=["yes", "no"]), batch(second))
    assert scored(PairedAccuracy(), *steps) == {"incomplete": 1.0, "paired": 0.5, "single": 0.75}


def test_paired_keeps_sources_apart_and_refuses_triples() -> None:
    metric = PairedAccuracy()
    steps = [(Outputs(answers=["x", "x"]), batch([("?", "x", {"pair": 0})] * 2, source)) for source in ("a", "b")]
    assert scored(metric, *steps)["paired"] == 1.0
    with pytest.raises(ValueError, match="found 1 pairs of more than two rows, expected two"):
        scored(metric, (Outputs(answers=["x"]), batch([("?", "x", {"pair": 0})], "a")))


def test_perplexity_weighs_tokens_not_batches() -> None:
    first = Outputs(nll=torch.tensor([2.0, 4.0]), num_tokens=torch.tensor([1, 9])), batch([("?", "a", {})] * 2)
    second = Outputs(nll=torch.tensor([1.5]), num_tokens=torch.tensor([5])), batch([("?", "a", {})])
    assert scored(Perplexity(), first, second)[""] == pytest.approx(math.exp(7.5 / 15))


def test_bound_of_the_language_prior_is_the_best_constant_answer_per_question() -> None:
    rows = [("<image>\nColour?", answer, {"kind": "colour"}) for answer in ("red", "Red.", "blue")]
    rows += [("<image>\nHow many?", answer, {"kind": "count"}) for answer in ("1", "2", "3", "3")]
    values = scored(LanguagePrior(), (Outputs(), batch(rows)))
    assert values["in_set_bound"] == pytest.approx(4 / 7)
    assert list(values) == ["held_out", "colour", "count", "in_set_bound"]  # what is to be quoted stands first in every table
    assert values["held_out"] == pytest.approx((3 * values["colour"] + 4 * values["count"]) / 7)


def test_held_out_prior_is_not_fooled_by_questions_asked_once() -> None:
    # every question text is new, four answers in equal numbers: the bound is 1, what can be known is the kind's answers only
    rows = [(f"question {i}", "abcd"[i % 4], {"kind": "k"}) for i in range(400)]
    values = scored(LanguagePrior(), (Outputs(), batch(rows)))
    assert values["in_set_bound"] == 1.0
    assert 0.1 < values["held_out"] < 0.3


def test_held_out_prior_finds_what_the_text_gives_away() -> None:
    rows = [(f"question {i % 5}", f"answer {i % 5}", {"kind": "k"}) for i in range(200)]
    assert scored(LanguagePrior(), (Outputs(), batch(rows)))["held_out"] == 1.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric", [AnswerAccuracy(), YesNo(), POPE(), PairedAccuracy(), LanguagePrior()])
def test_without_rows_there_is_no_value(metric: AnswerAccuracy) -> None:
    assert scored(metric, (Outputs(answers=[]), batch([]))) == {}
