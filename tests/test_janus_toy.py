"""Janus's toy through the real command: shared out over processes, killed, and from codes that were stored."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from nursery import ROOT, Nursery
from PIL import Image
from test_exact_fits import Run, check

from data_pipelines.precompute import main as precompute
from data_pipelines.shapes import main as make_shapes
from umm_zoo.backbones.patch_codebook import PatchCodebook
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.fit import main as fit
from umm_zoo.generate import main as generate
from umm_zoo.shapes import World
from umm_zoo.shapes.patches import ShapesCodebook

SHARDED = "{_target_: umm_zoo.training.sharding.FullyShardedStrategy}"
TASKS = "captions,questions,text_to_image"
PLAIN = ["--detail", "none", "--max-jitter", "0", "--plain", "--tasks", TASKS]


def codebook() -> ShapesCodebook:
    return ShapesCodebook(World(striped=False, max_jitter=0, detail="none"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("janus")
    assert make_shapes([str(folder / "data"), "--train", "12", "--val", "4", "--test", "0", *PLAIN]) == 0
    return folder


def options(folder: Path) -> list[str]:
    small = ["data.batch_size=8", "data.val_batch_size=4", "callbacks.validation.max_new_tokens=2", "callbacks.throughput=null"]
    steps = ["trainer.accelerator=cpu", "trainer.max_steps=6", "trainer.val_check_interval=6", "trainer.log_every_n_steps=1"]
    all_parts = "[projector,image_embeddings,image_projector,image_head,language_model,vision_tower]"
    even = ["data.train.images.weight=1", "method.dropout=0.0", "training.optimizer.eps=1e-3"]
    file = str(ROOT / "experiments/janus/toy/stage1.yaml")
    return [file, f"vars.data={folder / 'data'}", f"training.trained={all_parts}", *small, *steps, *even]


def result(folder: Path, name: str) -> Run:
    with (folder / "runs" / name / "logs" / "metrics.csv").open() as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]
    return load_checkpoint(folder / "runs" / name)["state_dict"], losses


@pytest.fixture(scope="module")
def whole(nursery: Nursery, folder: Path) -> Run:
    code, said = nursery.run(folder, *options(folder), "name=whole")
    assert code == 0, said
    return result(folder, "whole")


@pytest.mark.processes
@pytest.mark.parametrize("ranks, accumulation, strategy", [(1, 8, "auto"), (2, 1, "ddp"), (2, 4, "ddp"), (2, 2, SHARDED)])
def test_steps_shared_out_over_ranks_and_micro_batches_are_those_of_one(
    ranks: int, accumulation: int, strategy: str, whole: Run, nursery: Nursery, folder: Path
) -> None:
    """With one row in a micro-batch each of them is of one kind."""
    name = f"shared-{ranks}-{accumulation}"
    more = [f"trainer.accumulate_grad_batches={accumulation}", f"trainer.strategy={strategy}"]
    argv = [*options(folder), f"name={name}", *more]
    code, said = nursery.run_ranks(folder, ranks, *argv) if ranks > 1 else nursery.run(folder, *argv)
    assert code == 0 and "counts alike" not in said, said
    check(result(folder, name), whole)


@pytest.mark.processes
def test_a_run_that_is_killed_and_goes_on_is_the_one_that_was_not(nursery: Nursery, folder: Path) -> None:
    die, argv = (
        f"callbacks.die={json.dumps({'_target_': 'rollout_parts.DieAt', 'step': 3})}",
        [*options(folder), "method.dropout=0.5", "trainer.val_check_interval=3"],
    )
    for name, code, more in (("straight", 0, []), ("killed", -signal.SIGKILL, [die]), ("killed", 0, ["ckpt=last"])):
        found, said = nursery.run(folder, *argv, f"name={name}", *more)
        assert found == code, said
    (straight, losses), (weights, again) = (result(folder, name) for name in ("straight", "killed"))
    assert again == losses and len(losses) == 6
    assert weights.keys() == straight.keys() and all(weights[name].equal(value) for name, value in straight.items())


def losses_of(folder: Path, name: str) -> list[float]:
    steps = ["trainer.max_steps=3", "trainer.val_check_interval=3"]
    assert fit([*options(folder), *steps, f"name={name}", "--runs", str(folder / "runs")]) == 0
    return result(folder, name)[1]


@pytest.fixture(scope="module")
def computed(folder: Path) -> list[float]:
    return losses_of(folder, "computed")


def test_training_reads_codes_that_were_stored(computed: list[float], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precompute([*options(folder), "--measure", "0"]) == 0
    [stored] = (folder / "data/train/precomputed").glob("codes-*")
    assert {path.name.split("-")[0] for path in stored.glob("*.tar")} == {"captions", "text_to_image"}
    monkeypatch.setattr(PatchCodebook, "codes", lambda *given: pytest.fail("codes were made again"))
    assert losses_of(folder, "stored") == computed and len(computed) == 3


@pytest.mark.usefixtures("computed")
def test_a_finished_run_generates_and_answers_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(folder / "runs/computed"), folder / "out"
    prompts = ["top left: a small red circle; background: grey", "background: slate"]
    assert generate([run, "text-to-image", *prompts, "--num", "2", "--seed", "5", "--out", str(out)]) == 0
    images = [np.array(Image.open(path)) for path in sorted(out.glob("*.png")) if path.name != "grid.png"]
    assert [image.shape for image in images] == [(32, 32, 3)] * 4
    levels = {
        tuple(patch.flatten().tolist()) for patch in ((codebook().patches + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8)
    }
    quarters = images[0].reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, -1)
    assert {tuple(quarter.tolist()) for quarter in quarters} <= levels  # whatever it draws, it draws in patches of the world
    Image.fromarray(images[0]).save(folder / "one.png")
    for words in (["ask", str(folder / "one.png"), "How many circles are there?"], ["caption", str(folder / "one.png")]):
        assert generate([run, *words, "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    for words, said in (
        (["--steps", "5"], "num_steps: found 5, expected none"),
        (["--size", "64"], "size: found 64 x 64 px, expected 32 x 32"),
    ):
        assert generate([run, "text-to-image", "a red circle", "--out", str(out / "no"), *words]) == 2
        assert said in capsys.readouterr().err
