"""Images from ``generate``: of every method that has the capability, alone and from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import write_run
from PIL import Image, ImageChops
from torch.nn.functional import cosine_similarity

from tests.tools.test_import_ross import EXPERIMENT
from umm_zoo.backbones.features import DINOv3Features
from umm_zoo.experiment.build import build_method
from umm_zoo.generate import main
from umm_zoo.generation import COMMANDS, abilities_of
from umm_zoo.generation.tensors import from_pil

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import uae_parts
from bridge_parts import CODEC, SANA, VLM

BLOCKS = {
    "decoder": {"_target_": "umm_zoo.backbones.sana.Sana.from_config", "config": SANA},
    "codec": {"_target_": "umm_zoo.backbones.codecs.KLCodec.from_config", "config": CODEC},
    "objective": {"_target_": "umm_zoo.objectives.flow_matching.FlowMatching", "num_steps": 2},
}
WEMMU = {
    "_target_": "umm_zoo.methods.wemmu.WeMMU",
    "vlm": {"_target_": "umm_zoo.backbones.qwen2_5_vl.Qwen25VL.from_config", "config": VLM},
    "queries": {"_target_": "umm_zoo.blocks.queries.NoisyQueries", "width": 32},
    "pathway": {"_target_": "umm_zoo.blocks.pathways.ExpertPathway"},
    "connector": {"_target_": "umm_zoo.blocks.connectors.PositionMLP", "in_dim": 32, "out_dim": 12},
    **BLOCKS,
    "image_size": 8,
}
T5 = {"d_model": 12, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1}
PRETRAINING = {
    "_target_": "umm_zoo.pretraining.text_to_image.TextToImage",
    "text_encoder": {"_target_": "umm_zoo.backbones.text_encoder.TextEncoder.from_config", "config": T5},
    **BLOCKS,
}
UAE = {
    "_target_": "umm_zoo.methods.uae.pretraining.UAE",
    "vlm": {"_target_": "umm_zoo.backbones.qwen2_5_vl.Qwen25VL.from_config", "config": uae_parts.VLM},
    "renderer": {
        "_target_": "umm_zoo.methods.uae.renderers.CaptionRenderer",
        "connector": {"_target_": "umm_zoo.blocks.connectors.MLPConnector", "in_dim": 24, "out_dim": 20, "hidden_dim": 28},
        "decoder": {"_target_": "umm_zoo.backbones.sd3.StableDiffusion3.from_config", "config": uae_parts.DECODER},
        "codec": {"_target_": "umm_zoo.backbones.codecs.KLCodec.from_config", "config": uae_parts.CODEC},
        "objective": {"_target_": "umm_zoo.objectives.flow_matching.FlowMatching", "num_steps": 2},
        "image_size": 8,
    },
}
DINO3 = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_register_tokens": 2,
}
STRANGER = '''
import torch
from umm_zoo.method import Method


class Lines(Method):
    """As many white rows as the prompt has letters."""

    def parts(self):
        return {}

    def training_losses(self, batch):
        return {"loss": torch.zeros(())}

    def validation_step(self, batch, batch_idx):
        pass

    def generate(self, batch, seeds, sampling=None):
        return [torch.ones(3, len(prompt[0]["text"]), 4) for prompt in batch.prompts()]
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "wemmu", WEMMU, image_size=32)
    for name, colour in (("one", "red"), ("two", "blue")):
        Image.new("RGB", (40, 32), colour).save(folder / f"{name}.png")
    return folder


def test_every_request_and_seed_gives_an_image(run, tmp_path):
    out = tmp_path / "all"
    assert main([str(run), "text-to-image", "a circle", "a star", "--num", "2", "--size", "8x12", "--out", str(out)]) == 0
    images = [Image.open(out / f"{i:03d}-generated.png") for i in range(4)]
    assert {image.size for image in images} == {(12, 8)} and (out / "grid.png").is_file()
    assert ImageChops.difference(images[0], images[1]).getbbox()  # another seed
    alone = tmp_path / "alone"
    assert main([str(run), "text-to-image", "a star", "--seed", "1", "--size", "8x12", "--out", str(alone)]) == 0
    difference = ImageChops.difference(Image.open(alone / "000-generated.png"), images[3])
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
    assert main([str(run), *words, "--out", str(tmp_path / "o")]) == 0
    assert list((tmp_path / "o").glob("000-*.png"))


def test_images_of_unequal_shapes_come_out_in_their_shapes_or_in_the_size_that_is_said(tmp_path):
    """Buckets of about 32 x 32 px, of which the codec can make each."""
    resize = {"_target_": "data_pipelines.transforms.shaped.Bucket", "multiple": 4}
    data = {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 32, "target_size": 8, "resize": resize}
    folder = write_run(tmp_path / "run", WEMMU, data=data)
    for name, size in (("wide", (48, 20)), ("tall", (30, 70)), ("even", (40, 40))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    lines = [json.dumps({"images": [f"{name}.png"], "question": "Make it green."}) for name in ("wide", "tall", "even", "wide")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for extra, expected in ((), [(12, 4), (4, 12), (8, 8), (12, 4)]), (("--size", "8x12"), [(12, 8)] * 4):
        out = tmp_path / f"out{len(extra)}"
        assert main([str(folder), "edit", "--batch", str(tmp_path / "rows.jsonl"), *extra, "--out", str(out)]) == 0
        assert [Image.open(out / f"{i:03d}-generated.png").size for i in range(4)] == expected
    assert main([str(folder), "edit", str(tmp_path / "tall.png"), "Make it green.", "--out", str(tmp_path / "alone")]) == 0
    pair = (Image.open(tmp_path / "out0" / "001-generated.png"), Image.open(tmp_path / "alone" / "000-generated.png"))
    assert max(high for _, high in ImageChops.difference(*pair).getextrema()) <= 1
    assert main([str(folder), "reconstruct", str(tmp_path / "wide.png"), "--out", str(tmp_path / "again")]) == 0
    made = Image.open(tmp_path / "again" / "000-reconstruction.png")
    assert made.width > 1.5 * made.height and (tmp_path / "again" / "grid.png").is_file()


def test_the_former_name_of_the_image_guidance_still_works(run, tmp_path):
    images = []
    for option in ("--image-guidance", "--picture-guidance"):
        words = ["edit", str(run / "one.png"), "Make it green.", "--steps", "1", option, "5", "--out", str(tmp_path / option)]
        assert main([str(run), *words]) == 0
        images.append((tmp_path / option / "000-generated.png").read_bytes())
    assert images[0] == images[1]


def test_prompts_from_a_file(run, tmp_path):
    (tmp_path / "p.txt").write_text("a circle\n\na star\n")
    assert main([str(run), "text-to-image", "--batch", str(tmp_path / "p.txt"), "--out", str(tmp_path / "o")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["a circle", "a star"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["text-to-image"], "no prompt"),
        (["edit", "x"], "found 1 words"),
        (["compose", "a", "b"], "found 2 words"),
        (["reconstruct"], "no image"),
        (["text-to-image", "x", "--size", "9"], "found 9 x 9 px, expected multiples of 2 px"),
        (["text-to-image", "x", "--size", "big"], "--size: found 'big', expected 512 or 512x768"),
    ],
)
def test_user_errors_are_one_line(run, tmp_path, capsys, words, expected):
    assert main([str(run), *words, "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("method", [PRETRAINING, UAE], ids=["pretraining", "UAE"])
def test_what_generates_from_text_does_so_under_the_command(tmp_path, method: dict[str, Any]):
    run, out = write_run(tmp_path / "run", method), tmp_path / "o"
    words = ["text-to-image", "a circle", "a star", "--size", "8", "--guidance", "2", "--steps", "1", "--num", "2"]
    assert main([str(run), *words, "--out", str(out)]) == 0
    images = [Image.open(out / f"{i:03d}-generated.png") for i in range(4)]
    assert {image.size for image in images} == {(8, 8)}
    assert ImageChops.difference(images[2], images[3]).getbbox()


def test_a_stranger_needs_generate_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "lines_of_a_stranger.py").write_text(STRANGER)
    method = {"_target_": "lines_of_a_stranger.Lines"}
    run, out = write_run(tmp_path / "run", method, folders=(str(tmp_path / "own"),)), tmp_path / "o"
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    trusted = ["--trust", "lines_of_a_stranger"]
    assert main([str(run), "text-to-image", "ab", "abcd", "--out", str(out), *trusted]) == 0, capsys.readouterr().err
    assert [Image.open(out / f"{i:03d}-generated.png").size for i in range(2)] == [(4, 2), (4, 4)]
    assert main([str(run), "ask", "What?", *trusted]) == 2
    assert "found a Lines, which cannot answer, expected a method that can (umm_zoo.outputs.Answers)" in capsys.readouterr().err


def test_the_vision_tower_decides_the_size_and_the_target_that_of_the_reconstruction(run, tmp_path):
    method = yaml.safe_load(EXPERIMENT)["method"]
    method["objective"] |= {"sampling_steps": 3, "first_index": 998}
    out = tmp_path / "o"
    images = [str(run / "one.png"), str(run / "two.png")]
    assert main([str(write_run(tmp_path / "run", method, 16)), "reconstruct", *images, "--out", str(out)]) == 0
    assert {path.name for path in out.glob("0*.png")} == {
        f"{number:03d}-{name}.png" for number in (0, 1) for name in ("round-trip", "reconstruction")
    }
    assert Image.open(out / "000-reconstruction.png").size == (6, 6) and (out / "grid.png").is_file()


WORDS = ["caption", "ask"]


@pytest.mark.parametrize(
    ("method", "abilities"),
    [
        (WEMMU, [*WORDS, "reconstruct", "text-to-image", "edit", "compose"]),
        (UAE, [*WORDS, "reconstruct", "caption-and-reconstruct", "text-to-image"]),
        (PRETRAINING, ["text-to-image"]),
    ],
    ids=["WeMMU", "UAE", "pretraining"],
)
def test_a_method_offers_the_commands_that_it_does_not_refuse(method: dict[str, Any], abilities: list[str]) -> None:
    built = build_method({"method": method})
    assert list(abilities_of(built)) == abilities
    assert ("image_guidance" in abilities_of(built).get("edit", COMMANDS["ask"]).options_of(built)) == ("edit" in abilities)


def test_an_image_made_of_its_caption_alone_says_how_alike_it_is(run, tmp_path, capsys):
    encoder = DINOv3Features.from_config(DINO3).eval()
    encoder.save(str(tmp_path / "dino3"))
    node = {"_target_": "umm_zoo.backbones.features.DINOv3Features.from_pretrained", "source": str(tmp_path / "dino3")}
    score = {"_target_": "umm_zoo.metrics.unified_score.UnifiedScore", "encoders": {"dino": node}}
    folder, out = write_run(tmp_path / "run", UAE, metrics={"unified": score}), tmp_path / "out"
    assert main([str(folder), "caption-and-reconstruct", str(run / "one.png"), "--out", str(out)]) == 0
    row = json.loads((out / "results.jsonl").read_text())
    made, original = (encoder(from_pil(Image.open(path))[None])[0] for path in (out / row["files"][0], run / "one.png"))
    assert row["similarities"] == {"dino": pytest.approx(cosine_similarity(made, original, dim=0).item(), abs=1e-4)}
    assert f"  dino {row['similarities']['dino']:.3f}" in capsys.readouterr().out.splitlines()
