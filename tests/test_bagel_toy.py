"""Bagel's toy through the real command: killed and resumed, from latents that were stored, and what a finished run can do."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from nursery import ROOT, Nursery
from PIL import Image

from data_pipelines.precompute import main as precompute
from data_pipelines.shapes import main as make_shapes
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.fit import main as fit
from umm_zoo.generate import main as generate

WRITER = {"_target_": "umm_zoo.methods.reasoning.Reasoner", "marker": "", "keep": "turn", "max_new_tokens": 4}
REASONING = {"_target_": "umm_zoo.methods.trajectories.Interleaving", "reasoner": WRITER, "reflector": WRITER}
PLAIN = ["--detail", "none", "--max-jitter", "0", "--plain", "--tasks", "captions,questions,text_to_image"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bagel")
    assert make_shapes([str(folder / "data"), "--train", "12", "--val", "4", "--test", "0", *PLAIN]) == 0
    return folder


def options(folder: Path, steps: int) -> list[str]:
    small = ["data.batch_size=8", "data.val_batch_size=4", "callbacks.throughput=null", "vars.objective.num_steps=2"]
    ends = [
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
    ]
    return [str(ROOT / "experiments/bagel/toy/joint.yaml"), f"vars.data={folder / 'data'}", *small, *ends]


def losses(folder: Path, name: str) -> list[float]:
    with (folder / "runs" / name / "logs" / "metrics.csv").open() as stream:
        return [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]


@pytest.mark.processes
def test_a_run_that_is_killed_and_goes_on_is_the_one_that_was_not(nursery: Nursery, folder: Path) -> None:
    die = f"callbacks.die={json.dumps({'_target_': 'rollout_parts.DieAt', 'step': 2})}"
    for name, code, more in (("straight", 0, []), ("killed", -signal.SIGKILL, [die]), ("killed", 0, ["ckpt=last"])):
        found, said = nursery.run(folder, *options(folder, 4), "trainer.val_check_interval=2", f"name={name}", *more)
        assert found == code, said
    straight, weights = (load_checkpoint(folder / "runs" / name)["state_dict"] for name in ("straight", "killed"))
    assert losses(folder, "killed") == losses(folder, "straight") and len(losses(folder, "straight")) == 4
    assert weights.keys() == straight.keys() and all(weights[name].equal(value) for name, value in straight.items())


@pytest.fixture(scope="module")
def computed(folder: Path) -> list[float]:
    reasoning = f"method.reasoning={json.dumps(REASONING)}"
    assert fit([*options(folder, 2), reasoning, "name=computed", "--runs", str(folder / "runs")]) == 0
    return losses(folder, "computed")


def test_training_reads_latents_that_were_stored(computed: list[float], folder: Path) -> None:
    assert precompute([*options(folder, 2), "--measure", "0"]) == 0
    assert fit([*options(folder, 2), "name=stored", "--runs", str(folder / "runs")]) == 0
    [stored] = (folder / "data/train/precomputed").glob("latents-*")
    assert list(stored.glob("*.tar"))
    assert losses(folder, "stored") == pytest.approx(computed, abs=1e-5)


@pytest.mark.usefixtures("computed")
def test_a_finished_run_answers_generates_and_edits_from_the_command_line(folder: Path) -> None:
    run, out = str(folder / "runs/computed"), folder / "out"
    assert generate([run, "text-to-image", "background: slate", "--num", "2", "--steps", "2", "--out", str(out)]) == 0
    images = [path for path in sorted(out.glob("*.png")) if path.name != "grid.png"]
    assert [np.array(Image.open(path)).shape for path in images] == [(32, 32, 3)] * 2
    one, two = map(str, images)
    for words in (["ask", one, "How many circles are there?"], ["caption", one]):
        assert generate([run, *words, "--max-new-tokens", "4"]) == 0
    for words in (["edit", one, "Make it red."], ["compose", one, two, "Put one into the other."], ["reconstruct", one]):
        assert generate([run, *words, "--out", str(folder / words[0])]) == 0


@pytest.mark.usefixtures("computed")
def test_a_finished_run_thinks_before_it_generates_and_refines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out, prompt = str(folder / "runs/computed"), folder / "thought", "background: slate"
    assert generate([run, "text-to-image", "--think", prompt, "--steps", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    (row,) = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["think"] is True and row["answer"] and row["answer"].split("\n")[0] in said and "remark" not in row
    one = str(out / "000-generated.png")
    assert generate([run, "refine", one, prompt, "--rounds", "2", "--steps", "2", "--out", str(folder / "refined")]) == 0
    assert {path.name for path in (folder / "refined").glob("*round*.png")} == {"000-round-1.png", "000-round-2.png"}
    capsys.readouterr()
    assert generate([run, "refine", prompt]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_run_that_writes_nothing_says_so_in_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit([*options(folder, 1), "name=silent", "--runs", str(folder / "runs")]) == 0
    run = str(folder / "runs/silent")
    Image.new("RGB", (32, 32)).save(folder / "grey.png")
    capsys.readouterr()
    asked = {"reasoner": ["text-to-image", "--think", "a circle"], "reflector": ["refine", str(folder / "grey.png"), "a circle"]}
    for name, words in asked.items():
        assert generate([run, *words]) == 2
        assert f"method.reasoning.{name}: found none" in capsys.readouterr().err.strip().split("\n")[-1]
