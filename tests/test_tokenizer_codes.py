"""A tokenizer trained, exported, and used by Janus through the real commands, on codes that were stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nursery import ROOT
from PIL import Image

from data_pipelines.precompute import main as precompute
from data_pipelines.shapes import main as make_shapes
from umm_zoo.backbones.visual_tokenizer import VisualTokenizer
from umm_zoo.export import main as export
from umm_zoo.fit import main as fit
from umm_zoo.generate import main as generate
from umm_zoo.method import Method

STEPS = [
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.accelerator=cpu",
    "data.batch_size=4",
    "data.val_batch_size=4",
]
PLAIN = ["--detail", "none", "--max-jitter", "0", "--plain", "--tasks", "captions,text_to_image,geneval", "--seed", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, a tokenizer of two groups of six bits trained on it for two steps, and its export."""
    folder = tmp_path_factory.mktemp("codes")
    assert make_shapes([str(folder / "data"), "--train", "8", "--val", "4", "--test", "0", *PLAIN]) == 0
    pixel = "method.tokenizer.branches.pixel.bottleneck.quantizer.code_bits=6"
    words = [f"vars.data={folder}/data", "name=tokenizer", "metrics.codes=null", *STEPS, pixel, "--runs", f"{folder}/runs"]
    assert fit([str(ROOT / "experiments/tokenizers/toy/small.yaml"), *words]) == 0
    assert export([f"{folder}/runs/tokenizer", f"{folder}/released"]) == 0
    return folder


def janus(folder: Path) -> list[str]:
    head = "vars.unified.head={_target_: umm_zoo.blocks.code_heads.GroupHead, dim: 96, bits: 12, group_bits: 6}"
    file = str(ROOT / "experiments/tokenizers/toy/janus.yaml")
    return [file, f"vars.data={folder}/data", f"vars.tokenizer={folder}/released", head, *STEPS]


def test_janus_trains_on_stored_codes_of_an_export_and_generates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precompute([*janus(folder), "--measure", "0"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(VisualTokenizer, "tokenize", lambda *given: pytest.fail("codes were made again"))
        assert fit([*janus(folder), "name=janus", "--runs", f"{folder}/runs"]) == 0
    run, out = folder / "runs/janus", folder / "out"
    assert generate([str(run), "text-to-image", "a small red circle", "--num", "2", "--seed", "5", "--out", str(out)]) == 0
    found = [np.array(Image.open(path)) for path in sorted(out.glob("*.png")) if path.name != "grid.png"]
    assert [image.shape for image in found] == [(32, 32, 3)] * 2
    loaded = Method.load(run)
    assert loaded.vlm.codec.code_sizes == (64, 64) and loaded.vlm.codec.encoder.image_size == 32  # type: ignore[attr-defined, union-attr]


def test_another_folder_is_one_line_in_the_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, said in ((f"{folder}/data", "found no checkpoint there"), (f"{folder}/runs/nothing", "found no checkpoint there")):
        assert fit([*janus(folder), f"vars.tokenizer={source}", "--check"]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
