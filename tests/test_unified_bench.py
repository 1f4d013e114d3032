"""Unified-Bench as a command on a finished run: scores, what is kept beside them, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from finished_runs import write_run
from PIL import Image
from torch import Tensor, nn
from toy_parts import OneWeight

from umm_zoo.backbones.features import DINOv3Features
from umm_zoo.evaluate import main as evaluate
from umm_zoo.generation.tensors import from_pil
from umm_zoo.metrics.unified_score import UnifiedScore

DINO3 = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_register_tokens": 2,
}

TRUSTED = ["--trust", Path(__file__).stem]


class Painter(OneWeight):
    """Says which of two colours an image has, and paints it; its one weight is the brightness."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.layer.weight, 0.5)

    def reconstruct_from_captions(self, images: Tensor, seeds: list[int]) -> tuple[list[str], Tensor]:
        assert seeds == [42] * len(images)
        red = images[:, 0].mean(dim=(1, 2)) > 0
        painted = torch.zeros_like(images)
        painted[:, 0] = self.layer.weight.item() * red[:, None, None]
        painted[:, 1] = self.layer.weight.item() * ~red[:, None, None]
        return ["red" if found else "other" for found in red], painted


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.setdefault(Path(__file__).stem, sys.modules[__name__])
    write_run(tmp_path / "runs" / "painter", {"_target_": f"{Path(__file__).stem}.Painter"})
    images = tmp_path / "images"
    images.mkdir()
    for name, colour in (("one", (255, 0, 0)), ("two", (0, 255, 0))):
        Image.new("RGB", (12, 8), colour).save(images / f"{name}.png")
    sizes = {"hidden_size": 12, "image_size": 8, "patch_size": 4}
    config = {**sizes, "num_hidden_layers": 1, "num_attention_heads": 2}
    node = {"_target_": "umm_zoo.backbones.features.DINOv2Features.from_config", "config": config}
    (tmp_path / "encoders.yaml").write_text(yaml.safe_dump({"encoders": {"a": node, "b": node}}))
    return tmp_path / "runs" / "painter"


WORDS = ["--benchmark", "unified-bench", "images=images", "encoders.yaml"]


def rows_of(run: Path) -> list[dict[str, str]]:
    [file] = (run / "benchmarks" / "unified-bench").glob("scored-*/verdicts.csv")
    return list(csv.DictReader(file.open(encoding="utf-8")))


def image_of(run: Path, name: str) -> Image.Image:
    [file] = (run / "benchmarks" / "unified-bench").glob(f"made-*/{name}-42-*.png")
    return Image.open(file)


def test_scores_captions_and_images_are_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([str(run), *TRUSTED, *WORDS]) == 0, capsys.readouterr().err
    report = json.loads((run / "evaluation-1.json").read_text())
    scores = report["metrics"]
    assert set(scores) == {"a", "b", "unified"}
    assert scores["unified"] == pytest.approx((scores["a"] + scores["b"]) / 2)
    rows = rows_of(run)
    assert [(row["key"], row["answer"]) for row in rows] == [("one", "red"), ("two", "other")]
    assert scores["a"] == pytest.approx(50 * (float(rows[0]["a"]) + float(rows[1]["a"])), abs=1e-2)
    assert image_of(run, "one").getpixel((0, 0)) == (191, 128, 128)  # the stored weight of a half


def test_files_are_described_and_scored_in_their_own_shapes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that squeezes sees the ends that a square would have lost; pairs are scored as they are kept, in 8 bits."""
    seen: list[tuple[int, ...]] = []
    plain = Painter.reconstruct_from_captions
    noted = lambda self, images, seeds: (seen.append(tuple(images.shape)), plain(self, images, seeds))[1]  # noqa: E731
    monkeypatch.setattr(Painter, "reconstruct_from_captions", noted)
    torch.manual_seed(0)
    encoder = DINOv3Features.from_config(DINO3).eval()
    encoder.save("dino3")
    node = {"_target_": "umm_zoo.backbones.features.DINOv3Features.from_pretrained", "source": "dino3"}
    Path("encoders.yaml").write_text(yaml.safe_dump({"encoders": {"a": node}}))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("images/wide.png")
    assert evaluate([str(run), *TRUSTED, *WORDS]) == 0
    assert seen == [(2, 3, 7, 10), (1, 3, 4, 18)]  # the run's images are 8 px squares, so at most 64 pixels are seen
    kept = from_pil(image_of(run, "wide"))[None]
    expected = UnifiedScore({"a": encoder}).cosines(kept, from_pil(Image.fromarray(pixels))[None])
    assert rows_of(run)[-1]["key"] == "wide" and float(rows_of(run)[-1]["a"]) == pytest.approx(expected.item(), abs=1e-5)


def test_every_file_is_looked_at_first_and_those_that_cannot_be_read_are_named_in_one_line(run, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Painter, "reconstruct_from_captions", lambda *_: pytest.fail("described before all were looked at"))
    whole = Path("images/one.png").read_bytes()
    for name, content in (("a.png", b""), ("cut.png", whole[:-30]), ("z.jpg", b"<html>")):
        Path("images", name).write_bytes(content)
    assert evaluate([str(run), *TRUSTED, *WORDS]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "found 3 of 5 images that cannot be read: a.png (no readable image" in line
    assert "cut.png (" in line and "z.jpg (" in line and not (run / "benchmarks").exists()


def test_other_files_are_named_and_animations_are_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (12, 8), (255, 0, 0)).save("images/moves.gif", save_all=True, append_images=[Image.new("RGB", (12, 8))])
    for name in ("notes.txt", "x.heic", ".DS_Store"):
        Path("images", name).write_text("x")
    assert evaluate([str(run), *TRUSTED, *WORDS]) == 0
    printed = capsys.readouterr()
    assert "note: images: 3 of 6 are no images by their suffix and are left out: .DS_Store, notes.txt, x.heic" in printed.err
    assert [row["key"] for row in rows_of(run)] == ["moves", "one", "two"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["encoders.yaml"], "images: found no images in '', expected images=FOLDER with"),
        (["encoders.yaml", "images=nowhere"], "images: found no images in 'nowhere'"),
        (["images=images"], "encoders: "),
        (["images=images", "nothing.yaml"], "nothing.yaml: found no readable map"),
        (["images=images", "list.yaml"], "list.yaml: found no map of settings"),
        (["images=images", "latin.yaml"], "latin.yaml: found no readable map (UnicodeDecodeError)"),
        (["images=images", "deep.yaml"], "deep.yaml: found no readable map (RecursionError)"),
        (["images=images", "encoders.yaml", "stepz=3"], "found a setting that UnifiedBench does not have"),
        (["images=images", "encoders.yaml", "guidance=3"], "guidance: found a setting that this benchmark does not have"),
    ],
)
def test_what_is_refused(run: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.yaml").write_text("[1, 2]")
    Path("latin.yaml").write_bytes(b"a: caf\xe9")
    Path("deep.yaml").write_text("[" * 3000)
    assert evaluate([str(run), *TRUSTED, "--benchmark", "unified-bench", *words]) == 2
    assert expected in capsys.readouterr().err
