"""The example on one's own photographs: every stage runs on unequal sizes, and presets of parts fit what they are called."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shards.writing import write_shards
from umm_zoo.fit import main as fit
from umm_zoo.release.exporting import Export

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("codec", "clip", "captioner", "bridge", "ross", "uae")
SIZES = [(64, 50), (48, 80), (100, 48), (49, 49), (160, 90)]


def photographs(folder: Path) -> Path:
    """Noise of unequal sizes with two captions each, as converters write them."""
    for split, count in (("train", 10), ("val", 5)):
        samples = []
        for number in range(count):
            width, height = SIZES[number % len(SIZES)]
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            said = [f"a dog runs past {number} trees", f"{number} trees and a dog"]
            turns = [{"role": "user", "text": "<image>\nDescribe the image."}, {"role": "assistant", "text": said[number % 2]}]
            row = {"task": "caption", "kind": "caption", "conversations": turns, "captions": said}
            samples.append({"__key__": f"{split}{number}", "json": row, "0.jpg": file.getvalue()})
        write_shards(samples, folder / split, "captions", samples_per_shard=6)
    return folder


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = photographs(tmp_path / "data")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)

    # of all stages at once, for what is overridden in vars holds for the stages that a file comes after
    small = [f"vars.{stage}_stage.{key}=2" for stage in STAGES for key in ("steps", "batch")]

    def train(name: str, *more: str) -> dict[str, float]:
        file = f"experiments/photos/{name}.yaml"
        assert fit([file, f"vars.data={data}", "vars.size=48", "vars.objective.num_steps=2", *small, *more]) == 0
        return json.loads((tmp_path / f"runs/photos/{name}/metrics.json").read_text())["metrics"]

    return train


def test_every_stage_runs_on_photographs_of_unequal_sizes(train) -> None:
    for name, score in (("codec", "val/psnr"), ("clip", "val/retrieval5/text_to_image")):
        assert score in train(name)
        Export(f"runs/photos/{name}").write(f"runs/photos/{name}/part")
    bridge = train("bridge")  # runs the captioner first
    captioner = json.loads(Path("runs/photos/captioner/metrics.json").read_text())["metrics"]
    assert {"val/bleu", "val/cider", "val/perplexity", "val/retrieval/image_to_text"} <= set(captioner)
    assert {"val/flow/flow", "val/retrieval5/text_to_image"} <= set(bridge)
    assert {"val/psnr", "val/cider"} <= set(train("ross", "method.objective.sampling_steps=2"))
    reward = train("uae", "method.rollouts.group=2", "method.num_steps=2", "method.captions.max_new_tokens=6")
    assert {"val/reward/reward", "val/bleu"} <= set(reward)
    assert len(list(Path("runs/photos").glob("*/samples/*.png"))) == 5  # of all but the CLIP


@pytest.mark.parametrize(
    ("sizes", "stage", "trained"),
    [
        ("24gb", "bridge", 413_299_456),
        ("24gb", "ross", 98_954_528),
        ("80gb", "bridge", 2_420_501_408),
        ("80gb", "captioner", 3_122_647_296),
    ],
)
def test_presets_of_published_parts_fit_what_they_are_called(
    sizes: str, stage: str, trained: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert fit([f"experiments/photos/{stage}.yaml", f"vars.sizes={sizes}", "--check"]) == 0
    said = capsys.readouterr().out
    about = re.search(r"memory, about: ([\d.]+) GiB", said)
    assert f"{trained:,}" in said and about and float(about[1]) < 0.9 * int(sizes[:2])
