"""Benchmarks that a judge scores, from answers made up here; every score is worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.judge_server import Told
from umm_zoo.batch import Batch, Turn
from umm_zoo.benchmarks.base import Benchmark, Item, Verdict
from umm_zoo.benchmarks.interval import interval
from umm_zoo.benchmarks.judging.dpg import DPGBench
from umm_zoo.benchmarks.judging.gedit import GEdit
from umm_zoo.benchmarks.judging.geneval_pp import GenEvalPlusPlus, checklist
from umm_zoo.benchmarks.judging.imgedit import ImgEdit
from umm_zoo.benchmarks.judging.judge import Judge, Question
from umm_zoo.benchmarks.judging.wise import Wise, WiseLegacy
from umm_zoo.errors import UserError
from umm_zoo.generation.images import open_image
from umm_zoo.generation.tensors import from_pil
from umm_zoo.outputs import Outputs


def said(answers: Sequence[str | None]) -> Told:
    """A judge with these answers, one after the other."""
    left = iter(answers)
    return Told(lambda question: next(left))


def step(items: Sequence[Item], size: tuple[int, int] = (8, 6)) -> tuple[Outputs, Batch]:
    """Rows of items, with an image made of each that tells its place by its colour."""
    images = [[from_pil(open_image(path)) for path in item.images] for item in items]
    batch = Batch(
        keys=[item.key for item in items],
        conversations=[[Turn(role="user", text=item.text)] for item in items],
        images=[image for own in images for image in own],
        image_counts=[len(own) for own in images],
        meta=[dict(item.meta) for item in items],
    )
    made = [from_pil(Image.new("RGB", size, (place + 1, 0, 0))) for place in range(len(items))]
    return Outputs(generated=made), batch


def judged(benchmark: Benchmark, items: Sequence[Item] | None = None) -> tuple[dict[str, float], list[Verdict]]:
    """Scores and verdicts over items, all by default."""
    found = list(benchmark.verdicts(*step(benchmark.items() if items is None else items)))
    verdicts = [verdict for _, verdict in found]
    assert [row for row, _ in found] == list(range(len(verdicts)))
    records = torch.tensor([list(verdict.record) for verdict in verdicts], dtype=benchmark.record_dtype)
    return {name: float(value) for name, value in benchmark.values_of(records).items()}, verdicts


def jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


# GenEval++

COUNTING = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "prompt": "A photo of three cups"}
SIZES = {"tag": "size", "include": [{"class": "bench", "count": 1, "size": "larger", "region": "above"}], "prompt": "A bench"}


def test_checklist_of_the_metadata() -> None:
    include = [
        {"class": "bus", "count": 1, "color": "brown"},
        {"class": "clock", "count": 3, "region": "left"},
        {"class": "bench", "count": 2, "color": "red", "size": "larger", "region": "above"},
        {"class": "cat"},
    ]
    assert checklist({"include": include, "exclude": [{"class": "clock", "count": 4}]}) == (
        "This image should contain:\n"
        "- brown-colored 1 bus present in the image.\n"
        "- 3 clocks located in the left part of the image.\n"
        "- red-colored larger 2 benchs located in the above part of the image.\n"
        "- 1 cat present in the image.\n"
        "- No more than 3 clocks should appear."
    )


def test_geneval_pp_is_the_mean_of_kinds_and_a_failed_call_is_wrong(tmp_path: Path) -> None:
    judge = said(['{"correct": 1, "reason": "three"}', None, '{"correct": 1}', "no JSON", '```json\n{"correct": 0}```'])
    file = jsonl(tmp_path / "g.jsonl", [COUNTING, COUNTING, COUNTING, SIZES, SIZES])
    scores, verdicts = judged(GenEvalPlusPlus(judge, file))
    assert scores == {"counting": 2 / 3, "size": 0, "overall": 1 / 3, "mean": 2 / 5, "failed": 2}
    assert [verdict.score for verdict in verdicts] == [1, 0, 1, 0, 0]
    assert (verdicts[0].reason, verdicts[1].reason) == ("three", "told so")


def test_geneval_pp_ships_with_its_own_words() -> None:
    judge = Told(lambda question: '{"correct": 0}')
    benchmark = GenEvalPlusPlus(judge)
    items = benchmark.items()
    assert len(items) == 280 and {sum(item.meta["kind"] == kind for item in items) for kind in {i.meta["kind"] for i in items}} == {
        40
    }
    judged(benchmark, items[:1])
    [question] = judge.asked
    assert question.content[0] == (
        "Instruction:\nA photo of a brown bus, a green truck, and a red skateboard\n\nExpectation checklist:\n"
        "This image should contain:\n- brown-colored 1 bus present in the image.\n- green-colored 1 truck present in the image.\n"
        "- red-colored 1 skateboard present in the image."
    )
    assert question.system.startswith("You are an expert image evaluator.") and question.image_type == "JPEG"


# WISE

CULTURE = {"Prompt": "round pastry", "Explanation": "mooncakes", "Category": "Cultural knowledge", "prompt_id": 1}


def wise_row(number: int, category: str) -> dict[str, Any]:
    return {**CULTURE, "prompt_id": number, "Category": category}


def test_wise_weighs_its_groups(tmp_path: Path) -> None:
    names = ("Cultural knowledge", "Cultural knowledge", "time", "Space", "Biology", "Physical Knowledge", "Chemistry", "Chemistry")
    rows = [wise_row(number, name) for number, name in zip((1, 400, 401, 640, 641, 761, 881, 1000), names, strict=True)]
    (tmp_path / "merge.json").write_text(json.dumps(rows))
    judge = said(["Score: 1", "Score: 0", "1", "Score: 0", "**Score**: 1", "Score: 1", "Score: 1", "I cannot say"])
    scores, verdicts = judged(Wise(judge, str(tmp_path / "merge.json")))
    assert scores["overall"] == pytest.approx(0.4 * 0.5 + 0.12 * (1 + 0 + 1 + 1 + 1))
    assert (scores["culture"], scores["space"], scores["chemistry"], scores["failed"]) == (0.5, 0, 1, 1)
    assert math.isnan(verdicts[-1].score)
    assert judge.asked[0].content[0].count("mooncakes") == 1  # type: ignore[union-attr]


def test_first_wise_has_three_scores_and_other_weights(tmp_path: Path) -> None:
    rows = [wise_row(1, "Cultural knowledge"), wise_row(567, "time"), wise_row(700, "Space"), wise_row(701, "Biology")]
    files = []
    for row in rows:
        files.append(str(tmp_path / f"{row['prompt_id']}.json"))
        Path(files[-1]).write_text(json.dumps([row]))
    answer = "Consistency: {}\nRealism: {}\nAesthetic Quality: {}"
    judge = said([answer.format(*values) for values in ((2, 1, 0), (0, 2, 2), (1, 1, 1), (2, 2, 2))])
    scores, _ = judged(WiseLegacy(judge, files))
    assert [scores[name] for name in ("culture", "time", "space", "biology")] == pytest.approx([0.8, 0.3, 0.5, 1.0])
    expected = (0.4 * 0.8 + 0.167 * 0.3 + 0.133 * 0.5 + 0.1 * 1.0) / (0.4 + 0.167 + 0.133 + 0.1)
    assert scores["overall"] == pytest.approx(expected)  # of the groups that are there


@pytest.mark.parametrize(("kind", "number"), [(Wise, 700), (WiseLegacy, 640)])
def test_versions_of_wise_are_told_apart(tmp_path: Path, kind: type[Wise], number: int) -> None:
    category = {700: "Space", 640: "Biology"}[number]
    (tmp_path / "w.json").write_text(json.dumps([wise_row(number, category)]))
    with pytest.raises(UserError, match=f"prompt {number}: found '{category}' under this number"):
        kind(said([]), str(tmp_path / "w.json")).items()


# ImgEdit


def edits(folder: Path, rows: dict[str, tuple[str, str]]) -> dict[str, str]:
    """The settings of an ImgEdit of these: instruction and type by key."""
    for place, key in enumerate(rows):
        (folder / "animal").mkdir(exist_ok=True)
        Image.new("RGB", (12, 9), (0, 0, place + 1)).save(folder / "animal" / f"{key}.png")
    data = {key: {"id": f"animal/{key}.png", "prompt": text, "edit_type": kind} for key, (text, kind) in rows.items()}
    (folder / "edit.json").write_text(json.dumps(data))
    return {"prompts": str(folder / "edit.json"), "images": str(folder)}


def test_imgedit_is_the_mean_of_types_of_means_to_two_decimals(tmp_path: Path) -> None:
    settings = edits(
        tmp_path, {"7": ("Add a hat.", "add"), "3": ("Add a cat.", "add"), "5": ("Paint it.", "style"), "9": ("Go.", "add")}
    )
    answer = "Brief reasoning: fine.\nOne: {}\nTwo: {}\nThree: {}"
    judge = said([*(answer.format(*values) for values in ((5, 5, 4), (1, 2, 1), (3, 3, 3))), "Five of five"])
    scores, verdicts = judged(ImgEdit(judge, **settings))
    assert scores["add"] == pytest.approx((4.67 + 1.33) / 2)
    assert scores["overall"] == pytest.approx((3.0 + 3.0) / 2) and scores["failed"] == 1
    assert [verdict.score for verdict in verdicts[:3]] == pytest.approx([0.934, 0.266, 0.6])
    text, before, after = judge.asked[1].content
    assert "Instruction: Add a cat.\n" in str(text)
    assert (before.getpixel((0, 0)), after.getpixel((0, 0))) == ((0, 0, 2), (2, 0, 0))  # type: ignore[union-attr]


def test_imgedit_takes_the_texts_of_its_release(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"add": "Rate it: <edit_prompt>."}))
    judge = said(["A: 5\nB: 5\nC: 5"])
    benchmark = ImgEdit(judge, **edits(tmp_path, {"1": ("Add a hat.", "add")}), judge_prompt=str(tmp_path / "prompts.json"))
    judged(benchmark)
    assert judge.asked[0].content[0] == "Rate it: Add a hat.."
    edits(tmp_path, {"1": ("Paint it.", "style")})
    with pytest.raises(UserError, match="found the type 'style', expected add"):
        ImgEdit(judge, str(tmp_path / "edit.json"), str(tmp_path), str(tmp_path / "prompts.json")).items()


def test_missing_images_are_counted(tmp_path: Path) -> None:
    settings = edits(tmp_path, {"1": ("a", "add"), "2": ("b", "add"), "3": ("c", "add")})
    (tmp_path / "animal" / "2.png").unlink()
    (tmp_path / "animal" / "3.png").unlink()
    with pytest.raises(UserError, match=r"found no image animal/2.png; 2 of 3 are missing"):
        ImgEdit(said([]), **settings).items()


# GEdit


def gedit(folder: Path, judge: Judge, rows: Sequence[tuple[str, str, bool]], **more: Any) -> GEdit:
    """A GEdit of rows (group, language, intersection)."""
    for key in range(len(rows)):
        Image.new("RGB", (12, 9), (0, 0, key + 1)).save(folder / f"k{key}.png")
    names = ("task_type", "instruction_language", "Intersection_exist")
    data = [{"key": f"k{key}", "instruction": f"do {key}", **dict(zip(names, row, strict=True))} for key, row in enumerate(rows)]
    return GEdit(judge, jsonl(folder / "rows.jsonl", data), str(folder), **more)


def vie(*scores: float) -> str:
    return json.dumps({"score": scores, "reasoning": "so"})


def test_gedit_is_the_mean_of_groups_of_roots(tmp_path: Path) -> None:
    rows = [("color_alter", "en", True), ("color_alter", "en", False), ("ps_human", "cn", True), ("ps_human", "en", True)]
    judge = said([vie(8, 9), vie(2, 5), vie(10, 9), "[4, 6]", vie(1, 10), "7"])
    scores, _ = judged(gedit(tmp_path, judge, rows))
    first, second, third = math.sqrt(8 * 2), math.sqrt(9 * 4), math.sqrt(1 * 7)
    assert scores["color_alter"] == pytest.approx((first + second) / 2)
    assert scores["overall"] == pytest.approx(((first + second) / 2 + third) / 2)
    assert scores["semantics"] == pytest.approx((8.5 + 1) / 2) and scores["quality"] == pytest.approx((3 + 7) / 2)
    assert scores["overall_intersection"] == pytest.approx((first + third) / 2)
    assert scores["color_alter/quality"] == pytest.approx(3)


def test_gedit_shows_the_edit_at_the_size_of_its_source_alone_and_beside_it(tmp_path: Path) -> None:
    judge = said([vie(5, 5), vie(5, 5)])
    judged(gedit(tmp_path, judge, [("ps_human", "cn", True)], language="cn"))
    both, alone = judge.asked
    assert [image.size for image in (*both.content[1:], *alone.content[1:])] == [(12, 9)] * 3  # type: ignore[union-attr]
    assert both.content[1].getpixel((0, 0)) == (0, 0, 1)  # type: ignore[union-attr]
    assert str(both.content[0]).endswith("Editing instruction: do 0\n") and both.image_type == "JPEG"


def test_gedit_leaves_out_what_the_judge_did_not_score(tmp_path: Path) -> None:
    judge = said([vie(5, 5), None, vie(4, 4), vie(9, 9)])
    scores, verdicts = judged(gedit(tmp_path, judge, [("ps_human", "en", True)] * 2))
    assert scores["overall"] == pytest.approx(6) and scores["failed"] == 1
    assert math.isnan(verdicts[0].score) and verdicts[0].reason == "told so"


def test_gedit_reads_the_files_of_its_data_set(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    Image.new("RGB", (5, 4), "red").save(tmp_path / "red.png")
    image = {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}
    row = {"task_type": "ps_human", "key": "a1", "instruction": "do", "instruction_language": "en", "input_image": image}
    table = pyarrow.Table.from_pylist([{**row, "Intersection_exist": True}])
    parquet.write_table(table, tmp_path / "train-0.parquet")
    [item] = GEdit(said([]), str(tmp_path), str(tmp_path / "images")).items()
    assert open_image(item.images[0]).size == (5, 4) and item.meta["intersection"] is True


# DPG-Bench

HEAD = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
QUESTIONS = [
    'b2,"A red truck, parked",,1,0,entity,whole,"entity - whole (truck)",Is there a truck?',
    'b2,"A red truck, parked",,2,1,attribute,color,"attribute - color (truck, red)",Is the truck red?',
    'b2,"A red truck, parked",,3,"1, 2",relation,spatial,"relation - spatial (truck, road)",Is it on a road?',
    'a1,"A cat",,1,0,entity,whole,"entity - whole (cat)",Is there a cat?',
    'a1,"A cat",,2,1,attribute,color,"attribute - color (cat, grey)",Is the cat grey?',
]


def dpg(folder: Path, judge: Judge, **more: Any) -> DPGBench:
    (folder / "dpg.csv").write_text("\n".join([HEAD, *QUESTIONS]) + "\n", encoding="utf-8-sig")
    return DPGBench(judge, str(folder / "dpg.csv"), **more)


def by_question(answers: dict[str, Sequence[str | None]]) -> Callable[[Question], str | None]:
    """What is said to a question about one image after the other."""
    left = {question: iter(own) for question, own in answers.items()}
    return lambda asked: next(next(own for question, own in left.items() if str(asked.content[0]).startswith(question)))


def test_dpg_counts_a_child_wrong_where_a_parent_is(tmp_path: Path) -> None:
    judge = Told(
        by_question(
            {
                "Is there a truck?": ["no", "yes"],
                "Is the truck red?": ["yes", "no"],
                "Is it on a road?": ["yes", "Yes."],
                "Is there a cat?": ["yes", "yes"],
                "Is the cat grey?": ["yes", None],
            }
        )
    )
    benchmark = dpg(tmp_path, judge)
    truck, cat = benchmark.items()
    assert (truck.text, truck.key, benchmark.per_item) == ("A red truck, parked", "b2", 4)
    scores, verdicts = judged(benchmark, [truck, truck, cat, cat])
    assert [verdict.score for verdict in verdicts] == pytest.approx([0, 1 / 3, 1, 1 / 2])
    assert scores["overall"] == pytest.approx(((0 + 1 / 3) / 2 + (1 + 1 / 2) / 2) / 2)
    assert scores["entity"] == scores["entity - whole"] == pytest.approx(3 / 4)  # as answered, whatever their parents
    assert scores["attribute - color"] == pytest.approx(2 / 4) and scores["relation"] == 1 and scores["failed"] == 1
    assert len(judge.asked) == 10
    doubled = torch.tensor([list(verdicts[row].record) for row in (0, 1, 0, 1, 2, 3)])  # as an interval draws prompts
    assert float(benchmark.values_of(doubled)["overall"]) == pytest.approx((2 * (0 + 1 / 3) / 2 + (1 + 1 / 2) / 2) / 3)


def test_dpg_as_released_lacks_its_first_question_and_prompts_that_failed(tmp_path: Path) -> None:
    answers = {
        "Is the truck red?": ["yes"],
        "Is it on a road?": ["yes"],
        "Is there a cat?": ["yes", "yes"],
        "Is the cat": ["no", "yes"],
    }
    benchmark = dpg(tmp_path, Told(by_question(answers)), as_released=True)
    truck, cat = benchmark.items()
    assert list(truck.meta["questions"]) == ["2", "3"]
    scores, verdicts = judged(benchmark, [truck, cat, cat])
    assert math.isnan(verdicts[0].score)  # the first question is a parent
    assert scores["overall"] == pytest.approx(3 / 4) and "relation" not in scores
    failing = dpg(tmp_path, Told(by_question({"Is there a cat?": ["yes", "yes"], "Is the cat": [None, "yes"]})), as_released=True)
    scores, _ = judged(failing, [cat, cat])
    assert math.isnan(scores["overall"]) and scores["failed"] == 1


# all


def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    rows = [COUNTING, SIZES, COUNTING, SIZES, SIZES]

    def right(question: Question) -> str:
        place = question.content[1].getpixel((0, 0))[0]  # type: ignore[union-attr]
        return json.dumps({"correct": int(place in (1, 2))})

    make = lambda: GenEvalPlusPlus(Told(right), jsonl(tmp_path / "g.jsonl", rows))  # noqa: E731
    one, first, second = make(), make(), make()
    outputs, batch = step(one.items())
    one.update(outputs, batch)
    for metric, own in ((first, [0, 3]), (second, [1, 2, 4])):
        metric.update(Outputs(generated=[outputs.generated[row] for row in own]), batch.select(own))  # type: ignore[index]
    joined = first.values_of(torch.cat([first.records(), second.records()]))
    assert {name: float(value) for name, value in joined.items()} == {name: float(value) for name, value in one.compute().items()}
    assert float(joined["overall"]) == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_rows_of_others_are_not_judged(tmp_path: Path) -> None:
    benchmark = GenEvalPlusPlus(said([]), jsonl(tmp_path / "g.jsonl", [COUNTING]))
    outputs, batch = step(benchmark.items())
    assert list(benchmark.verdicts(Outputs(), batch)) == []
    batch.meta[0]["benchmark"] = "wise"
    assert list(benchmark.verdicts(outputs, batch)) == []


@pytest.mark.parametrize("kind", [GenEvalPlusPlus, Wise, WiseLegacy, ImgEdit, GEdit, DPGBench])
def test_benchmark_says_in_one_line_that_it_needs_a_judge(kind: Any) -> None:
    with pytest.raises(UserError, match=r"judge: found no judge for .*judge\.url="):
        kind()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda judge: Wise(judge).items(), "prompts: found nothing, expected prompts=PATH, WISE's data_verified/merge.json"),
        (lambda judge: ImgEdit(judge).items(), "prompts: found nothing, expected prompts=PATH, ImgEdit's .*basic_edit.json"),
        (lambda judge: GEdit(judge).items(), "prompts: found nothing, expected prompts=PATH, the rows of stepfun-ai/GEdit-Bench"),
        (lambda judge: DPGBench(judge), "questions: found nothing, expected questions=PATH, ELLA's dpg_bench/dpg_bench.csv"),
        (lambda judge: Wise(judge, "no.json").items(), "prompts: found 'no.json', which is not there"),
    ],
)
def test_benchmark_says_in_one_line_which_file_it_needs(make: Callable[[Judge], Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        make(said([]))


def test_card_says_whose_words_the_judge_was_told() -> None:
    about = GenEvalPlusPlus(said([])).protocol()
    assert about["judge"] == {"model": "told"}
    assert "Apache-2.0" in about["judge_prompt"]["text"] and len(about["judge_prompt"]["digest"]) == 8


def test_score_of_nothing_has_no_interval(recwarn: pytest.WarningsRecorder) -> None:
    ends = interval(lambda rows: {"overall": torch.tensor(math.nan)}, torch.zeros(2, 1), ["a", "b"], ["", ""], "overall")
    assert all(map(math.isnan, ends)) and not recwarn.list
