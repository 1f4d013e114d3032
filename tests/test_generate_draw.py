"""``generate`` draws: prompts, edits and compositions, alone and from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from umm_zoo import generate
from umm_zoo.experiment.build import build

sys.path.insert(0, str(Path(__file__).parent / "methods"))
from bridge_parts import CODEC, SANA, VLM

METHOD = {
    "_target_": "umm_zoo.methods.wemmu.WeMMU",
    "vlm": {"_target_": "umm_zoo.backbones.qwen2_5_vl.Qwen25VL.from_config", "config": VLM},
    "queries": {"_target_": "umm_zoo.blocks.queries.NoisyQueries", "width": 32},
    "pathway": {"_target_": "umm_zoo.blocks.pathways.ExpertPathway"},
    "connector": {"_target_": "umm_zoo.blocks.connectors.PositionMLP", "in_dim": 32, "out_dim": 12},
    "decoder": {"_target_": "umm_zoo.backbones.sana.Sana.from_config", "config": SANA},
    "codec": {"_target_": "umm_zoo.backbones.codecs.KLCodec.from_config", "config": CODEC},
    "objective": {"_target_": "umm_zoo.objectives.flow_matching.FlowMatching", "num_steps": 2},
    "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 1e-3},
    "trained": ["pathway", "connector"],
    "image_size": 8,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    method = build(METHOD)
    data = {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 32}
    experiment = {"name": "toy", "seed": 0, "method": METHOD, "data": data, "trainer": {"max_steps": 1}}
    (folder / "checkpoints").mkdir()
    state = {"state_dict": method.state_dict(), "experiment": experiment, "global_step": 1}
    torch.save(state, folder / "checkpoints" / "last.ckpt")
    for name in ("one", "two"):
        Image.new("RGB", (40, 32), "red" if name == "one" else "blue").save(folder / f"{name}.png")
    return folder


def test_every_request_and_seed_gives_a_image(run, tmp_path):
    out = tmp_path / "drawn"
    assert generate.main([str(run), "text-to-image", "a circle", "a star", "--num", "2", "--size", "8x12", "--out", str(out)]) == 0
    images = [Image.open(out / f"{i:03d}-drawn.png") for i in range(4)]
    assert {image.size for image in images} == {(12, 8)} and (out / "grid.png").is_file()
    assert ImageChops.difference(images[0], images[1]).getbbox()  # another seed
    alone = tmp_path / "alone"
    words = ["text-to-image", "a star", "--seed", "1", "--size", "8x12", "--out", str(alone)]
    assert generate.main([str(run), *words]) == 0
    difference = ImageChops.difference(Image.open(alone / "000-drawn.png"), images[3])
    assert max(high for _, high in difference.getextrema()) <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["edit", "one.png", "Make it green.", "--guidance", "1", "--image-guidance", "1", "--steps", "1"],
        ["compose", "one.png", "two.png", "Both."],
        ["reconstruct", "one.png"],
    ],
)
def test_images_in_image_out(run, tmp_path, words):
    words = [str(run / word) if word.endswith(".png") else word for word in words]
    assert generate.main([str(run), *words, "--out", str(tmp_path / "o")]) == 0
    assert list((tmp_path / "o").glob("000-*.png"))


def test_prompts_from_a_file(run, tmp_path):
    (tmp_path / "p.txt").write_text("a circle\n\na star\n")
    assert generate.main([str(run), "text-to-image", "--batch", str(tmp_path / "p.txt"), "--out", str(tmp_path / "o")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["a circle", "a star"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["text-to-image"], "no prompt"),
        (["edit", "x"], "found 1 words"),
        (["compose", "a", "b"], "found 2 words"),
        (["text-to-image", "x", "--size", "9"], "multiples of 2 px, found 9 x 9"),
        (["text-to-image", "x", "--size", "big"], "expected 512 or 512x768"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, expected):
    assert generate.main([str(run), *words, "--out", str(tmp_path / "o")]) == 2
    assert expected in capsys.readouterr().err
