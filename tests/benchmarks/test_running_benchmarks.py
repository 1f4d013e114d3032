"""Benchmarks put to a finished run: what is made once, gone on with, dealt out, summed up, and shown."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from finished_runs import write_run
from PIL import Image
from torch import Tensor, nn
from toy_parts import OneWeight

from umm_zoo.backbones.devices import own_device
from umm_zoo.batch import Batch
from umm_zoo.benchmarks.base import Benchmark, Item, Verdict
from umm_zoo.benchmarks.interval import interval
from umm_zoo.benchmarks.running import run_benchmark
from umm_zoo.errors import UserError
from umm_zoo.evaluate import main as evaluate
from umm_zoo.generation.answering import Ask
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import TextToImage
from umm_zoo.metrics.rows import required
from umm_zoo.outputs import Outputs, Sampling
from umm_zoo.training.finished_run import load_run

TRUSTED = ["--trust", Path(__file__).stem]


class Greys(OneWeight):
    """Paints the number that a prompt begins with, one level darker per seed; answers questions with their last word."""

    painted: ClassVar[list[tuple[str, int]]] = []

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.layer.weight)
        self.guidance = 4.5

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        prompts = [turns[0]["text"] for turns in batch.conversations]
        self.painted.extend(zip(prompts, seeds, strict=True))
        levels = [int(prompt.split()[0]) - seed for prompt, seed in zip(prompts, seeds, strict=True)]
        return [torch.full((3, 4, 4), level / 127.5 - 1) for level in levels]

    def answer(self, batch: Batch, max_new_tokens: int = 64, temperature: float = 0.0) -> list[str]:
        return [turns[0]["text"].split()[-1] for turns in batch.conversations]


class Levels(Benchmark):
    """Right where the image is brighter than the item says; the kind is the prompt's second word."""

    name = "levels"
    per_item = 2
    reads = ("generated",)

    def __init__(self, above: int = 100, prompts: list[str] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.above, self.prompts = above, prompts or ["103 dark", "50 dark", "101 <b>light</b>"]

    def items(self) -> list[Item]:
        return [Item(f"{place}", prompt, meta={"kind": prompt.split()[1]}) for place, prompt in enumerate(self.prompts)]

    def command(self, item: Item) -> Command:
        return TextToImage()

    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        for row, image in enumerate(required(outputs, "generated", self)):
            level = round(float(image[0, 0, 0] + 1) * 127.5)
            right = level > self.above
            reason = "" if right else f"{level} <= {self.above}"
            yield row, Verdict([int(right), level], float(right), batch.meta[row]["kind"], reason, {"level": level})

    def protocol(self) -> dict[str, Any]:
        return {"above": self.above}

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        return {"overall": records[:, 0].double().mean(), "level": records[:, 1].double().mean()}


class Repeats(Levels):
    """Right where the answer is the true one."""

    name = "repeats"
    per_item = 1
    reads = ("answers",)

    def items(self) -> list[Item]:
        return [Item("a", "say yes", answer="yes"), Item("b", "say no", answer="yes")]

    def command(self, item: Item) -> Command:
        return Ask()

    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        for row, (answer, truth) in enumerate(zip(required(outputs, "answers", self), batch.answers(), strict=True)):
            yield row, Verdict([int(answer == truth), 0], float(answer == truth), "")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.setdefault(Path(__file__).stem, sys.modules[__name__])
    Greys.painted.clear()
    return write_run(tmp_path / "run", {"_target_": f"{Path(__file__).stem}.Greys"})


def put(run: Path, benchmark: Benchmark, **given: Any) -> dict[str, Any]:
    return run_benchmark(load_run(run, trust=[Path(__file__).stem]), benchmark, given)


def test_a_command_scores_every_seed_of_every_item(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{Path(__file__).stem}.Levels"
    words = ["above=101", "num=3", "seed=0"]  # the seed is that of generation, though the class has one too
    assert evaluate([str(run), "--benchmark", path, *words, *TRUSTED]) == 0, capsys.readouterr().err
    report = json.loads((run / "evaluation-1.json").read_text())
    assert report["metrics"]["overall"] == pytest.approx(2 / 9)  # 103 and 102 of the first item
    assert report["metrics"]["level"] == pytest.approx((103 + 50 + 101) / 3 - 1)
    rows = list(csv.DictReader((Path(report["folder"]) / "verdicts.csv").open()))
    assert [(row["key"], row["seed"], row["score"]) for row in rows[:3]] == [("0", "0", "1"), ("0", "1", "1"), ("0", "2", "0")]
    assert rows[2]["reason"] == "101 <= 101" and rows[2]["level"] == "101"
    assert Image.open(Path(report["folder"]) / rows[2]["image"]).getpixel((0, 0)) == (101, 101, 101)


def test_nothing_is_made_twice_and_another_rule_takes_the_same_images(run: Path) -> None:
    first, count = put(run, Levels()), len(Greys.painted)
    assert count == 6 and first["scores"]["overall"] == pytest.approx(3 / 6)
    assert put(run, Levels())["scores"] == first["scores"]
    assert put(run, Levels(above=40))["scores"]["overall"] == 1
    assert len(Greys.painted) == count
    put(run, Levels(), guidance="3")  # other images
    assert len(Greys.painted) == 2 * count


def test_a_killed_evaluation_goes_on(run: Path) -> None:
    whole = put(run, Levels())
    [made], [judged] = ((run / "benchmarks").rglob(f"{name}-*.jsonl") for name in ("made", "verdicts"))
    made.write_text("".join(made.read_text().splitlines(keepends=True)[:4]) + '{"id": "2-0-')
    judged.write_text("".join(judged.read_text().splitlines(keepends=True)[:3]) + '{"id"')
    next((run / "benchmarks").rglob("1-0-*.png")).unlink()
    Greys.painted.clear()
    assert put(run, Levels())["scores"] == whole["scores"]
    assert Greys.painted == [("50 dark", 0), ("101 <b>light</b>", 0), ("101 <b>light</b>", 1)]


def test_the_card_says_how_images_were_generated(run: Path) -> None:
    card = put(run, Levels())
    assert card["generation"] == {"guidance": 4.5} and card["image_sizes"] == {"4 x 4": 6}  # the method's own
    assert put(run, Levels(above=1))["generation"] == {"guidance": 4.5}  # with no model loaded
    assert put(run, Levels(), guidance="3", steps="2")["generation"] == {"guidance": 3.0, "steps": 2}


def test_a_changed_prompt_is_put_again(run: Path) -> None:
    put(run, Levels(prompts=["103 dark"]))
    Greys.painted.clear()
    assert put(run, Levels(prompts=["104 dark"]))["scores"]["level"] == 103.5
    assert Greys.painted == [("104 dark", 0), ("104 dark", 1)]
    assert put(run, Levels(above=5, prompts=["103 dark"]))["scores"]["level"] == 102.5  # its own images are still there


def test_two_processes_give_the_score_of_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = put(run, Levels(), seed="5")["scores"]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", {}), ("0", alone)):  # the first one sums up, and waits for the others
        monkeypatch.setenv("RANK", rank)
        Greys.painted.clear()
        assert put(run, Levels(), seed="5", steps="2").get("scores", {}) == expected
        assert len(Greys.painted) == 3


def test_networks_of_a_benchmark_run_on_the_device_of_the_process(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    monkeypatch.setattr("umm_zoo.benchmarks.running.own_device", lambda: "cpu")
    monkeypatch.setattr(Levels, "to", lambda self, device: moved.append(device))
    put(run, Levels())
    assert moved == ["cpu"]


@pytest.mark.parametrize(("told", "gpus", "expected"), [("LOCAL_RANK", 4, 3), ("SLURM_LOCALID", 4, 3), ("SLURM_LOCALID", 1, 0)])
def test_each_process_of_a_node_has_its_own_device(monkeypatch: pytest.MonkeyPatch, told: str, gpus: int, expected: int) -> None:
    current = [0]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(told, "3")
    assert own_device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: current.insert(0, place))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    assert own_device() == f"cuda:{expected}"


def test_an_image_that_is_not_finite_is_no_black_image(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = lambda self, batch, seeds, sampling: [torch.full((3, 4, 4), [0.0, torch.inf][row % 2]) for row in range(len(seeds))]  # noqa: E731
    monkeypatch.setattr(Greys, "generate", seen)
    with pytest.raises(UserError, match="levels 0: found a generated image with NaN or an infinity, expected finite numbers"):
        put(run, Levels())


def test_answers_are_compared_with_the_true_ones(run: Path) -> None:
    card = put(run, Repeats())
    assert card["scores"]["overall"] == 0.5
    assert put(run, Repeats(), max_new_tokens="3")["generation"]["max_new_tokens"] == 3


def test_a_part_of_a_benchmark_says_so(run: Path) -> None:
    card = put(run, Levels(), limit="2")
    assert card["items"] == 2 and "2 of 3 items: not the benchmark's score" in card["warnings"]


def test_the_page_shows_right_and_wrong_with_reasons(run: Path) -> None:
    page = (Path(put(run, Levels())["folder"]) / "benchmark.html").read_text()
    assert page.count("<figure") == 6 and page.count('<figure class="wrong"') == 3
    assert "50 &lt;= 100" in page and "101 &lt;b&gt;light&lt;/b&gt;" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched


def test_training_texts_that_hold_a_prompt_are_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data_pipelines.shards.writing import write_shards

    texts = ["103 dark", "a cat", "103, DARK", "50 dark and 101 <b>light</b>"]
    samples = [{"__key__": f"{place}", "txt": text, "json": {}} for place, text in enumerate(texts)]
    write_shards(iter(samples), tmp_path / "shards", "texts")
    source = {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "shards/*.tar", "tasks": None}
    write_run(tmp_path / "other", {"_target_": f"{Path(__file__).stem}.Greys"})
    other = load_run(tmp_path / "other", trust=[Path(__file__).stem])
    other.experiment.data["train"] = {"texts": source}
    card = run_benchmark(other, Levels(), {})
    assert card["overlap"]["samples_with_overlap"] == {"equal": 2, "contained": 0, "ngram": 0}
    assert "2 of 4 samples (2 equal) hold 1 of 3 prompts" in capsys.readouterr().err
    assert "1 prompts stand in training texts of the run" in card["warnings"]
    assert card["scores_without_overlap"]["overall"] == pytest.approx(1 / 4)


def test_two_items_of_one_key_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Levels, "items", lambda self: [Item("a", "1 x"), Item("a", "2 x")])
    with pytest.raises(Exception, match="found the key 'a' of two items, expected different keys"):
        put(run, Levels())


def test_an_interval_draws_items_with_all_their_rows_within_their_kinds() -> None:
    hits = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1])[:, None]
    values_of = lambda records: {"overall": records.double().mean()}  # noqa: E731
    units, kinds = list("aabbccdd"), list("xxxxyyyy")
    low, high = interval(values_of, hits, units, kinds, "overall")
    # of x both items, one or none of "a": 1/4 each end; of y the same: means are sums of two of {0, 1/4, 1/2} and {1/4, 3/8, 1/2}
    sums = [a + b for a in (0, 0.25, 0.25, 0.5) for b in (0.25, 0.375, 0.375, 0.5)]
    assert (low, high) == (min(sums), max(sums))
    assert interval(values_of, torch.ones(8, 1), units, kinds, "overall") == (1, 1)
    many = torch.from_numpy(np.random.default_rng(1).random(400) < 0.3)[:, None]
    low, high = interval(values_of, many, [str(row) for row in range(400)], ["x"] * 400, "overall")
    mean = float(many.double().mean())
    assert high - low == pytest.approx(2 * 1.96 * (mean * (1 - mean) / 400) ** 0.5, rel=0.1)
