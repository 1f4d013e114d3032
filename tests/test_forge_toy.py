"""Forge-and-Quench's toy through the real command: the model that stays as it is goes from stage to stage; killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from nursery import ROOT, Nursery
from PIL import Image

from data_pipelines.shapes import main as make_shapes
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.fit import main as fit
from umm_zoo.generate import main as generate

WORLD = ["--detail", "none", "--max-jitter", "0", "--plain", "--tasks", "text_to_image"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forge")
    assert make_shapes([str(folder / "data"), "--train", "12", "--val", "4", "--test", "0", *WORLD]) == 0
    return folder


def options(folder: Path, file: str, *more: str) -> list[str]:
    small = ["data.batch_size=8", "data.val_batch_size=4", "trainer.accelerator=cpu"]
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "vars.objective.num_steps=2"]
    return [str(ROOT / f"experiments/forge/toy/{file}.yaml"), f"vars.data={folder / 'data'}", *small, *steps, *more]


@pytest.mark.processes
def test_a_run_that_is_killed_and_goes_on_is_the_one_that_was_not(nursery: Nursery, folder: Path) -> None:
    die = f"callbacks.die={json.dumps({'_target_': 'rollout_parts.DieAt', 'step': 3})}"
    both = options(folder, "forge", "after=null", "training.trained=[forge,injection]")
    for name, code, more in (("straight", 0, []), ("killed", -signal.SIGKILL, [die]), ("killed", 0, ["ckpt=last"])):
        found, said = nursery.run(folder, *both, f"name={name}", *more)
        assert found == code, said
    straight, again = (load_checkpoint(folder / "runs" / name)["state_dict"] for name in ("straight", "killed"))
    assert {key.split(".")[0] for key in straight} == {"forge", "injection"}
    assert again.keys() == straight.keys() and all(again[name].equal(value) for name, value in straight.items())


def test_the_text_encoder_that_the_first_stage_trained_is_kept_and_images_are_generated(folder: Path) -> None:
    runs = folder / "runs"
    for name, file, after in (("first", "drawing", "null"), ("second", "forge", str(runs / "first"))):
        own = [*options(folder, file), f"after={after}", f"name={name}", "trainer.max_steps=1", "trainer.val_check_interval=1"]
        assert fit([*own, "--runs", str(runs)]) == 0
    first, second = (load_checkpoint(runs / name)["state_dict"] for name in ("first", "second"))
    assert {key.split(".")[0] for key in first} == {"text_encoder", "decoder"}
    assert {key.split(".")[0] for key in second} == {"text_encoder", "decoder", "forge"}
    assert all(second[name].equal(value) for name, value in first.items())
    out = folder / "out"
    assert generate([str(runs / "second"), "text-to-image", "background: slate", "--num", "2", "--out", str(out)]) == 0
    images = [np.array(Image.open(path)) for path in sorted(out.glob("*.png")) if path.name != "grid.png"]
    assert [image.shape for image in images] == [(32, 32, 3)] * 2 and not np.array_equal(*images)
