"""POPE and MMVP: files of questions, both readings of answers, both sets of labels."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import write_run
from PIL import Image
from toy_parts import OneWeight

from data_pipelines.command import run as command
from data_pipelines.converters import benchmark as shards
from umm_zoo.batch import Batch, Turn
from umm_zoo.benchmarks import running
from umm_zoo.benchmarks.base import Benchmark, Item
from umm_zoo.benchmarks.interval import interval
from umm_zoo.benchmarks.mmvp import MMVP, letter_of, strict_letter_of
from umm_zoo.benchmarks.pope import FILES, POPE
from umm_zoo.benchmarks.running import run_benchmark
from umm_zoo.errors import UserError
from umm_zoo.generation.generating import TextToImage
from umm_zoo.generation.images import open_image
from umm_zoo.outputs import Outputs
from umm_zoo.training.finished_run import load_run
from umm_zoo.training.validation import validate

NAME = Path(__file__).stem
#: (object, label, answer) of each file; the release's script takes what says neither for a yes.
ASKED = {
    "random": [("dog", "yes", "Yes."), ("cat", "no", "There is no cat, I think."), ("bus", "no", "Maybe")],
    "popular": [("dog", "yes", "It is not. Yes."), ("person", "no", "no")],
    "adversarial": [("dog", "yes", "a dog"), ("leash", "no", "Yes, there is not"), ("cup", "yes", "yes"), ("fork", "yes", "yes")],
}


class Parrot(OneWeight):
    """Answers a question with what stands in brackets in it."""

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        return Outputs(answers=self.answer(batch))

    def answer(self, batch: Batch, max_new_tokens: int = 64, temperature: float = 0.0) -> list[str]:
        return [turns[0]["text"].split("[")[1].split("]")[0] for turns in batch.conversations]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr("umm_zoo.benchmarks.interval.DRAWINGS", 9)
    sys.modules.setdefault(NAME, sys.modules[__name__])
    return write_run(tmp_path / "run", {"_target_": f"{NAME}.Parrot"})


def put(run: Path, benchmark: Benchmark) -> dict[str, Any]:
    return run_benchmark(load_run(run, trust=[NAME]), benchmark, {"overlap": "no"})


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    folder = tmp_path / "questions"
    folder.mkdir()
    (tmp_path / "val2014").mkdir()
    for name, rows in ASKED.items():
        lines = [
            {"question_id": number, "image": f"{number}.jpg", "text": f"<image>\nA {what}? [{answer}]", "label": label}
            for number, (what, label, answer) in enumerate(rows, 1)
        ]
        (folder / f"coco_pope_{name}.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for number in range(1, 5):
        Image.new("RGB", (9, 7), (number, 0, 0)).save(tmp_path / f"val2014/{number}.jpg")
    return folder


def pope(questions: Path, **more: Any) -> POPE:
    images = (questions if questions.is_dir() else questions.parent).parent / "val2014"
    return POPE(questions=str(questions), images=str(images), **more)


def test_pope_reads_sentences_as_its_release_and_words_beside_it(
    run: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(running, "open_image", lambda path: opened.append(path) or open_image(path))
    card = put(run, pope(questions))
    assert len(opened) == 4  # each image once before the start, and none for verdicts
    scores = card["scores"]
    # read by the release: yes no yes | no no | yes no yes yes
    f1 = {"random": 2 / 3, "popular": 0.0, "adversarial": 1.0}  # 1 of 2 said and 1 of 1 there; none of 1; 3 of 3
    assert {name: scores[f"{name}/f1"] for name in FILES} == pytest.approx(f1)
    assert scores["mean_f1"] == pytest.approx(5 / 9) and card["headline"] == "mean_f1"
    assert (scores["accuracy"], scores["f1"], scores["yes_ratio"]) == pytest.approx((7 / 9, 0.8, 5 / 9))
    assert scores["unparsed"] == 2  # "Maybe", "a dog"
    # by the first word: yes - - | - no | - yes yes yes
    assert (scores["strict/accuracy"], scores["strict/recall"], scores["strict/unparsed"]) == pytest.approx((4 / 9, 3 / 5, 4))
    assert scores["strict/adversarial/precision"] == pytest.approx(2 / 3)
    assert card["protocol"]["suffix"] == "Answer the question using a single word or phrase."
    rows = list(csv.DictReader((Path(card["folder"]) / "verdicts.csv").open()))
    assert rows[2]["reason"] == "read as yes, the truth is no" and rows[2]["strict"] == "neither"


def test_pope_draws_images_with_all_their_questions(questions: Path) -> None:
    benchmark = pope(questions)
    items = benchmark.items()
    assert [benchmark.unit(item) for item in items] == [f"{n}.jpg" for n in (1, 2, 3, 1, 2, 1, 2, 3, 4)]
    assert items[3].text == "<image>\nA dog? [It is not. Yes.]\nAnswer the question using a single word or phrase."
    assert pope(questions, suffix=None).items()[0].text == "<image>\nA dog? [Yes.]"


def test_pope_s_own_questions_ship() -> None:
    benchmark = POPE()
    with pytest.raises(UserError, match="images: found nothing, expected images=PATH, the folder of the images, such as COCO"):
        benchmark.items()
    with pytest.raises(UserError, match=r"no image COCO_val2014_000000310196.jpg; 500 of 500 are missing"):
        POPE(images=str(Path(__file__).parent)).items()
    assert list(benchmark.files) == list(FILES) and benchmark.warnings() == []


def test_pope_scores_what_is_there_and_says_what_is_not(questions: Path) -> None:
    (questions / "coco_pope_random.json").unlink()
    assert pope(questions).warnings() == ["without the questions of random: means are over the others"]
    assert len(pope(questions / "coco_pope_popular.json").items()) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"question_id": 1, "image": "1.jpg", "question": "A?", "label": "yes"}',
            "row 1: found none of text, expected",
        ),
        (
            '{"question_id": 1, "image": "1.jpg", "text": "A?", "label": "maybe"}',
            "found the label 'maybe', expected yes or no",
        ),
        ('{"question_id": 1, "image": 1, "text": "A?", "label": "yes"}', "row 1: found image, text or label that is no text"),
        ('{"question_id": 1, "image": "1.jpg"', "found no JSON"),
        ('{"question_id": 2, "image": "1.jpg", "text": "A?", "label": "yes"}\n{', "json: line 2: found no JSON"),
        ('{"question_id": 1, "image": "../1.jpg", "text": "A?", "label": "yes"}', "no image ../1.jpg"),
        ("", "found no JSON"),
    ],
)
def test_pope_s_odd_lines_are_one_line(questions: Path, line: str, said: str) -> None:
    good = '{"question_id": 2, "image": "1.jpg", "text": "A?", "label": "no"}\n'
    (questions / "coco_pope_random.json").write_text(f"{line}\n{good if line else ''}")
    with pytest.raises(UserError) as caught:
        pope(questions).items()
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_pope_wants_one_file_of_each_name(questions: Path) -> None:
    (questions / "gqa_pope_random.jsonl").write_text("")
    with pytest.raises(UserError, match=r"coco_pope_random.json and gqa_pope_random.jsonl"):
        pope(questions).items()
    with pytest.raises(UserError, match=r"NAME.json or .jsonl, with random, popular, adversarial in its name"):
        POPE(questions=str(questions.parent / "val2014"), images=str(questions)).items()


#: Rows that are swapped in lmms-eval are 99 and 100 here; what is answered, by number.
SAID = {1: "A", 2: "(b) shut", 3: "The answer is b", 4: "open", 99: "(a) Long", 100: "b"}


def mmvp(folder: Path, flipped: bool = False) -> Path:
    (folder / "MMVP Images").mkdir(parents=True)
    rows = []
    for number in range(1, 101):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"MMVP Images/{number}.jpg")
        said, label = SAID.get(number, "?"), "ba"[number % 2]
        question = f"Does the elephant have long or short tusks? [{said}]" if number > 98 else f"Open? [{said}]"
        if flipped and number > 98:
            label = "ab"[number % 2]
        rows.append([number, question, "(a) Long (b) Short" if number > 98 else "(a) Open (b) Shut", f"({label})"])
    with (folder / "Questions.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["Index", "Question", "Options", "Correct Answer"], *rows])
    return folder


@pytest.mark.parametrize("flipped", [False, True])
def test_mmvp_is_scored_by_both_sets_of_labels(run: Path, tmp_path: Path, flipped: bool) -> None:
    card = put(run, MMVP(str(mmvp(tmp_path / "mmvp", flipped))))
    scores = card["scores"]
    # right by the release's labels, whichever the file has: 1 and 2; of 3 and 4 neither; 99 and 100
    assert (scores["paired"], scores["single"]) == pytest.approx((2 / 50, 4 / 100))
    assert (scores["corrected/paired"], scores["corrected/single"]) == pytest.approx((1 / 50, 2 / 100))
    # strictly "The answer is b" is none, and "open" is the option of a, which is wrong
    assert (scores["strict/paired"], scores["strict/corrected/single"]) == pytest.approx((2 / 50, 2 / 100))
    assert (scores["unparsed"], scores["strict/unparsed"], scores["incomplete"]) == (95, 95, 0)
    assert "100 questions, of the release's 300" in card["warnings"]
    assert any("has corrected labels" in text for text in card["warnings"]) == flipped


def test_mmvp_asks_as_lmms_eval_or_as_the_release(tmp_path: Path) -> None:
    folder = str(mmvp(tmp_path))
    item = MMVP(folder).items()[0]
    assert item.text == "Open? [A]\nA. Open\nB. Shut\nAnswer with the option's letter from the given choices directly."
    assert item.answer == "A" and item.images == (tmp_path / "MMVP Images/1.jpg",)
    assert MMVP(folder, prompt="<question> <choices>").items()[1].text == "Open? [(b) shut] (a) Open (b) Shut"
    assert MMVP(folder, prompt=r"<question>\n<choices>").items()[0].text == "Open? [A]\n(a) Open (b) Shut"
    with pytest.raises(UserError, match=r"a text with <question>, and <options> or <choices>"):
        MMVP(folder, prompt="<question>")


@pytest.mark.parametrize(
    ("answer", "letter", "strictly"),
    [
        ("A", "a", "a"),
        ("(b).", "b", "b"),
        ("B. Shut", "b", "b"),
        (" open ", "", "a"),
        ("The answer is (A), since", "a", ""),
        ("I take option b", "b", ""),
        ("A door that is shut", "a", ""),
        ("Obama", "a", ""),  # to the letter
        ("absent", "a", ""),
        ("neither", "", ""),
        ("", "", ""),
    ],
)
def test_letters_of_answers(answer: str, letter: str, strictly: str) -> None:
    assert (letter_of(answer), strict_letter_of(answer, {"a": "Open", "b": "Shut"})) == (letter, strictly)


def test_mmvp_s_pairs_may_be_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = MMVP()
    records = torch.tensor([[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 1, 1, 0], [2, 1, 0, 0, 1, 0, 0], [2, 0, 0, 0, 0, 0, 0]])
    drawn = records[[0, 1, 0, 1, 2, 3]]
    assert float(benchmark.values_of(drawn)["paired"]) == pytest.approx(2 / 3)
    assert float(benchmark.values_of(drawn)["single"]) == pytest.approx(5 / 6)
    monkeypatch.setattr("umm_zoo.benchmarks.interval.DRAWINGS", 60)
    assert interval(benchmark.values_of, records, ["1", "1", "2", "2"], [""] * 4, "paired") == (0, 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("1,Open?,Open or shut,(a)", "row 1: found the options 'Open or shut' and the answer '(a)'"),
        ("1,Open?,(a) Open (b) Shut,(c)", "row 1: found the options '(a) Open (b) Shut' and the answer '(c)'"),
        ("2,Open?,(a) Open (b) Shut,(a)", "row 1: found the index 2, expected 1; images and pairs go by the order of the rows"),
        ("1,Open?,(a) Open (b) Shut,(a)", "no image 1; 1 of 1 are missing"),
    ],
)
def test_mmvp_s_odd_rows_are_one_line(tmp_path: Path, row: str, said: str) -> None:
    (tmp_path / "Questions.csv").write_text(f"Index,Question,Options,Correct Answer\n{row}\n")
    with pytest.raises(UserError) as caught:
        MMVP(str(tmp_path)).items()
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_in_an_experiment_both_count_their_own_rows_alone() -> None:
    options = {"options": {"a": "x", "b": "y"}, "released": "a", "corrected": "b"}
    rows = [
        (Item("a", "?", answer="no", meta={"kind": "exists", "negative": "popular"}), "no"),
        (Item("b", "?", answer="A", meta={"kind": "mmvp", "mmvp_pair": 1, **options}), "A"),
        (Item("c", "?"), "c"),
    ]
    batch = Batch(
        keys=[own.key for own, _ in rows],
        conversations=[[Turn(role="user", text="?"), Turn(role="assistant", text=own.answer)] for own, _ in rows],
        meta=[dict(own.meta) for own, _ in rows],
    )
    outputs = Outputs(answers=[said for _, said in rows])
    first, second = POPE(), MMVP()
    for metric in (first, second):
        metric.update(outputs, batch)
        assert len(metric.records()) == 1
    assert float(first.compute()["popular/accuracy"]) == 1 and float(second.compute()["incomplete"]) == 1


def test_items_as_shards_score_in_an_experiment_as_in_a_command(
    run: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = put(run, pope(questions))["scores"]
    words = [f"questions={questions}", f"images={tmp_path / 'val2014'}"]
    shards.main(shards.parser().parse_args(["pope", str(tmp_path / "shards"), *words]))
    assert "9 samples written" in capsys.readouterr().out
    source = {"_target_": "data_pipelines.shards.data.ShardSource", "shards": f"{tmp_path}/shards/pope-*.tar"}
    overrides = [f"data.val={json.dumps({'pope': source})}", 'metrics.pope={"_target_": "umm_zoo.benchmarks.pope.POPE"}']
    found = validate(load_run(run, overrides, trust=[NAME]))
    assert found == {f"val/pope/{name}": pytest.approx(value) for name, value in scores.items()}


def test_items_of_images_to_make_get_grey_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Item("a", "a dog", meta={"tag": "x"}), Item("b", "blue", (tmp_path / "one.png",))]
    Image.new("RGB", (20, 10)).save(tmp_path / "one.png")
    monkeypatch.setattr(MMVP, "command", lambda self, item: TextToImage())
    first, second = shards.samples_of(MMVP(), items, 10, 6)
    assert first["json"] == {"task": "text_to_image", "tag": "x", "conversations": [{"role": "user", "text": "a dog"}]}
    assert Image.open(io.BytesIO(first["target.png"])).size == (6, 6)
    assert second["json"]["conversations"][0]["text"] == "<image>\nblue" and second["json"]["task"] == "editing"
    assert Image.open(io.BytesIO(second["0.png"])).size == (10, 5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pope", "images=nowhere"], "images: found 'nowhere', which is not there, expected the folder of the images"),
        (["pop"], "--benchmark: found 'pop', expected"),
        (["pope", "temperature=1"], "temperature: found a setting of generation or of a run, expected settings of the benchmark"),
        (["mmvp", "folder=."], "folder: Questions.csv: found no readable file"),
    ],
)
def test_shards_of_nothing_are_one_line(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command(shards.main, shards.parser().parse_args([words[0], "out", *words[1:]])) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
