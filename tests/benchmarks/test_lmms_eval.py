"""lmms-eval's own classes over a finished run; skipped where it is not installed (``umm_zoo/benchmarks/lmms_eval.py`` says how)."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from finished_runs import write_run
from PIL import Image
from toy_parts import OneWeight

from umm_zoo.batch import Batch
from umm_zoo.benchmarks.mmvp import letter_of

evaluator = pytest.importorskip("lmms_eval.evaluator")
tasks = pytest.importorskip("lmms_eval.tasks")
models = pytest.importorskip("lmms_eval.models")
NAME = Path(__file__).stem

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_visual: !function {name}_rules.images
doc_to_text: !function {name}_rules.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 7, until: ["|"], do_sample: false}}
process_results: !function {name}_rules.results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
ONE_ROUND = """
from PIL import Image

def images(doc):
    return [Image.open(path) for path in doc["images"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""
TWO_ROUNDS = """
from PIL import Image

def images(doc):
    return [Image.open(path) for path in doc["images"]]

def text(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    return images(doc), "and " + previous_output[-1], round_idx > 1, previous_output, None

def results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


class Looks(OneWeight):
    """Says what was asked, how bright each image is, how many tokens it may use, and what nobody should read."""

    def answer(self, batch: Batch, max_new_tokens: int = 64, temperature: float = 0.0) -> list[str]:
        said = []
        for row, turns in enumerate(batch.conversations):
            levels = [round(float(image.mean() + 1) * 127.5) for image in batch.images_of(row)]
            text = " / ".join(turn["text"].replace("\n", " ") for turn in turns)
            said.append(f"{text} {levels} {max_new_tokens} {temperature}|rest")
        return said


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    sys.modules.setdefault(NAME, sys.modules[__name__])
    for level in (10, 20):
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / f"{level}.png")
    return write_run(tmp_path / "run", {"_target_": f"{NAME}.Looks"})


def score(folder: Path, run: Path, kind: str, rules: str, docs: list[dict[str, Any]]) -> float:
    name = f"tiny_{kind}"
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / f"{name}_rules.py").write_text(rules)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, file=folder / "docs.jsonl", cache=folder / "cache"))
    found = evaluator.simple_evaluate(
        model="umm_zoo",
        model_args=f"run={run},trust={NAME}",
        tasks=[name],
        batch_size=2,
        task_manager=tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return float(found["results"][name]["right,none"])


def test_a_task_s_questions_are_answered_with_their_images(run: Path, tmp_path: Path) -> None:
    one, two = str(tmp_path / "10.png"), str(tmp_path / "20.png")
    docs = [
        {"images": [one], "question": "What <image>?", "answer": "<image> What ? [10] 7 0.0"},
        {"images": [one, two], "question": "Both?", "answer": "<image> <image> Both? [10, 20] 7 0.0"},
        {"images": [two], "question": "Wrong?", "answer": "?"},
    ]
    assert score(tmp_path, run, "generate_until", ONE_ROUND, docs) == pytest.approx(2 / 3)


def test_a_task_of_rounds_goes_on_with_what_was_said(run: Path, tmp_path: Path) -> None:
    doc = {"images": [str(tmp_path / "20.png")], "question": "Q", "answer": ["<image> Q [20] 7 0.0"]}
    doc["answer"].append(f"<image> and {doc['answer'][0]} [20] 7 0.0".replace("and <image>", "and "))  # type: ignore[attr-defined]
    assert score(tmp_path, run, "generate_until_multi_round", TWO_ROUNDS, [doc]) == 1


def test_the_package_s_entry_point_names_it() -> None:
    assert models.get_model_manifest("umm_zoo").chat_class_path == "umm_zoo.benchmarks.lmms_eval.FinishedRun"
    assert not models.get_model("umm_zoo").is_simple


def test_letters_are_found_where_lmms_eval_finds_them() -> None:
    own = pytest.importorskip("lmms_eval.tasks.mmvp.utils")._extract_answer_letter
    parts = ["", "a", "(B)", "B.", " ", "\n", "answer is", "option", "the", "cab", "A,"]
    for words in itertools.product(parts, repeat=3):
        for joint in ("", " "):
            text = joint.join(words)
            assert letter_of(text) == own(text).lower(), repr(text)
