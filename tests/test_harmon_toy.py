"""Harmon's toy through the real command: killed, from latents that were stored, and used when finished."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from nursery import ROOT, Nursery
from PIL import Image
from test_exact_fits import Run

from data_pipelines.precompute import main as precompute
from data_pipelines.shapes import main as make_shapes
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.fit import main as fit
from umm_zoo.generate import main as generate

ONE = ["--max-objects", "1", "--detail", "none", "--max-jitter", "0", "--plain", "--tasks", "captions,questions,text_to_image"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harmon")
    assert make_shapes([str(folder / "data"), "--train", "12", "--val", "4", "--test", "0", *ONE]) == 0
    return folder


def options(folder: Path) -> list[str]:
    small = ["data.batch_size=8", "data.val_batch_size=4", "callbacks.validation.max_new_tokens=2", "callbacks.throughput=null"]
    steps = ["trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]
    few = ["method.unmasking.num_rounds=2", "method.objective.objective.num_steps=2"]
    return [str(ROOT / "experiments/harmon/toy/harmon.yaml"), f"vars.data={folder / 'data'}", *small, *steps, *few]


def result(folder: Path, name: str) -> Run:
    with (folder / "runs" / name / "logs" / "metrics.csv").open() as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]
    return load_checkpoint(folder / "runs" / name)["state_dict"], losses


@pytest.mark.processes
def test_a_run_that_is_killed_and_goes_on_is_the_one_that_was_not(nursery: Nursery, folder: Path) -> None:
    die = f"callbacks.die={json.dumps({'_target_': 'rollout_parts.DieAt', 'step': 3})}"
    for name, code, more in (("straight", 0, []), ("killed", -signal.SIGKILL, [die]), ("killed", 0, ["ckpt=last"])):
        found, said = nursery.run(folder, *options(folder), f"name={name}", *more)
        assert found == code, said
    (straight, losses), (weights, again) = (result(folder, name) for name in ("straight", "killed"))
    assert again == losses and len(losses) == 4
    assert weights.keys() == straight.keys() and all(weights[name].equal(value) for name, value in straight.items())


def losses_of(folder: Path, name: str) -> list[float]:
    assert fit([*options(folder), f"name={name}", "--runs", str(folder / "runs")]) == 0
    return result(folder, name)[1]


@pytest.fixture(scope="module")
def computed(folder: Path) -> list[float]:
    return losses_of(folder, "computed")


def test_a_finished_run_generates_reconstructs_and_answers_from_the_command_line(
    computed: list[float], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(folder / "runs/computed"), folder / "out"
    assert len(computed) == 4
    assert generate([run, "text-to-image", "top left: a red circle", "--num", "2", "--seed", "5", "--out", str(out)]) == 0
    images = [path for path in sorted(out.glob("*.png")) if path.name != "grid.png"]
    assert [np.array(Image.open(path)).shape for path in images] == [(32, 32, 3)] * 2
    assert generate([run, "caption", str(images[0]), "--out", str(folder / "said")]) == 0
    assert generate([run, "reconstruct", *map(str, images), "--out", str(folder / "again")]) == 0
    assert len(list((folder / "again").glob("*-reconstruction.png"))) == 2
    capsys.readouterr()
    assert generate([run, "text-to-image", "a red circle", "--steps", "3", "--out", str(out / "more")]) == 2
    assert "steps" in capsys.readouterr().err


def test_training_reads_latents_that_were_stored(computed: list[float], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precompute([*options(folder), "--measure", "0"]) == 0
    stored, given = [], LatentCodec.target_latents
    monkeypatch.setattr(
        LatentCodec, "target_latents", lambda own, batch: stored.append("latents" in batch.extras) or given(own, batch)
    )
    again = losses_of(folder, "stored")
    assert again == pytest.approx(computed, abs=1e-5) and sum(stored) >= 4
