"""The table of probes and the images of parts, on numbers and parts made for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipelines.shapes import main as make_shapes
from tools import probe_parts, show_parts, update_readme
from tools.probing import part_features
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.shapes import World

TOWER = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 1, "num_attention_heads": 3, "model_type": "llama"}


def llava() -> LlavaBackbone:
    torch.manual_seed(0)
    return LlavaBackbone.from_config({"vision_config": TOWER | {"model_type": "clip_vision_model"}, "text_config": TEXT}).eval()


def row(part: str, attribute: str, linear: float, mlp: float, place: str = "latents") -> dict[str, object]:
    numbers = {"linear": linear, "mlp": mlp, "chance": 0.5, "num_train": 30, "num_test": 10}
    return {"part": part, "place": place, "attribute": attribute, **numbers}


def test_an_attribute_is_lost_where_little_above_chance_is_left() -> None:
    rows = [row("pixels", name, 0.9, 1.0) for name in ("colour", "background")]
    rows += [row("codec", "colour", 0.96, 0.94), row("codec", "background", 0.94, 0.5)]  # 92 % and 88 % of what is above chance
    text = probe_parts.markdown({"rows": rows, "command": "python x", "commit": "abc"}).splitlines()
    assert text[0] == "| part | read at | colour (50) | background (50) | lost |"
    assert text[3] == "| `codec` | latents | 96.0 / 94.0 | 94.0 / 50.0 | background |"
    assert "n = 10 objects" in text[5] and "commit abc" in text[5]


def test_rows_of_other_parts_are_kept_where_the_settings_are_the_same(tmp_path: Path) -> None:
    assert (
        make_shapes([str(tmp_path / "w"), "--train", "0", "--val", "0", "--test", "60", "--heldout", "0", "--tasks", "captions"])
        == 0
    )
    codec = KLCodec.from_config({"latent_channels": 3, "block_out_channels": [8], "norm_num_groups": 4})
    (tmp_path / "weights" / "codec").mkdir(parents=True)
    codec.save(tmp_path / "weights" / "codec")
    load = {"_target_": "umm_zoo.backbones.codecs.KLCodec.from_pretrained"}
    (tmp_path / "weights" / "codec" / "card.json").write_text(json.dumps({"load": load}))
    words = ["--weights", str(tmp_path / "weights"), "--shards", str(tmp_path / "w" / "test" / "captions-*.tar")]
    words += ["--out", str(tmp_path / "out"), "--steps"]
    seen = []
    for parts, steps in (([], "2"), (["codec"], "2"), (["pixels"], "2"), (["codec"], "3")):
        probe_parts.main([*parts, *words, steps])
        rows = json.loads((tmp_path / "out" / "probes.json").read_text())["rows"]
        seen.append([(row["part"], row["attribute"]) for row in rows])
    assert seen[0] == [(part, name) for part in ("pixels", "codec") for name in probe_parts.ATTRIBUTES]
    assert seen[1] == seen[2] == seen[3] == seen[0]
    assert (tmp_path / "out" / "probes.md").read_text().startswith("| part | read at | colour (")


def test_image_states_are_what_enters_and_leaves_the_language_model() -> None:
    model, images = llava(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    entering, grid = part_features(model, images, 0)
    torch.testing.assert_close(entering, torch.stack(model.encode_images(images)))
    leaving, _ = part_features(model, images, -1)
    assert grid == (4, 4) and leaving.shape == (2, 16, 24)
    prompt = [{"role": "user", "text": "<image>\nWhat colour?"}]  # another question behind the image changes nothing
    inputs = model.embed([prompt, prompt], images, [1, 1])
    torch.testing.assert_close(leaving, model(inputs).hidden[inputs.image_mask].view(2, 16, 24))
    with pytest.raises(ValueError, match=r"expected 0 .* and -1"):
        part_features(model, images, -2)


def test_one_vector_is_laid_into_the_block_of_each_cell() -> None:
    tower = CLIPVisionFeatures.from_config(TOWER)
    images = torch.zeros(2, 3, 32, 32)
    tokens, grid = part_features(tower, images, "pooled", cells=4)
    assert tokens.shape == (2, 4, 64) and grid == (2, 2)
    torch.testing.assert_close(tokens[1, 2].view(4, 16)[2], tower(images)[1])
    assert tokens[1, 2].view(4, 16)[[0, 1, 3]].abs().sum() == 0


def test_round_trips_show_four_times_the_difference() -> None:
    codec = KLCodec.from_config({"latent_channels": 3, "block_out_channels": [8], "norm_num_groups": 4})
    codec.encode, codec.decode = (lambda images: images), (lambda latents: latents + 0.125)
    (card,) = show_parts.round_trips(codec, torch.zeros(1, 3, 8, 8), ["scene"])
    levels = {name: image.getpixel((0, 0))[0] for name, image in card.images.items()}
    # 4 * 0.125 / 2 in [-1, 1] is a quarter of the way from grey to white
    assert levels == {"original": 128, "round trip": 143, "difference x 4": 159} and card.title == "scene, 24.1 dB"


def test_every_kind_of_question_is_shown() -> None:
    batch = show_parts.one_of_each_kind(World(), "questions", 7, 0.2)
    assert sorted(meta["kind"] for meta in batch.meta) == ["colour", "count", "exists", "mark", "position", "shape", "size"]


def test_images_of_a_codec_and_a_language_model_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, photos = tmp_path / "weights", tmp_path / "photos" / "cat"
    photos.mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (40, 36), colour).save(photos / name)
    codec = KLCodec.from_config({"latent_channels": 3, "block_out_channels": [8], "norm_num_groups": 4})
    cards = {
        "codec": (codec, {"psnr": 1.0}),
        "llava": (llava(), {"accuracy/overall": 0.5, "perplexity": 3.0}),
        "tower": (CLIPVisionFeatures.from_config(TOWER), {}),
    }
    for name, (part, metrics) in cards.items():
        (weights / name).mkdir(parents=True)
        part.save(weights / name)
        kind = f"{type(part).__module__}.{type(part).__name__}"
        card = {"load": {"_target_": f"{kind}.from_pretrained"}, "scores": {"val": {"metrics": metrics}}, "worlds": []}
        (weights / name / "card.json").write_text(json.dumps(card))
    show_parts.main(["--weights", str(weights), "--out", str(tmp_path / "out"), "--photos", str(tmp_path / "photos")])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["codec-photos.png", "codec.png", "llava.png"]
    assert all((tmp_path / "out" / name).stat().st_size < 300_000 for name in written)
    assert show_parts.main(["nothing", "--weights", str(weights)]) == 2 and "no such part" in capsys.readouterr().err


def test_a_table_in_markdown_is_put_into_the_readme(tmp_path: Path) -> None:
    (tmp_path / "probes.md").write_text("| a |\n|---|\n| 1 |\n")
    text = "before\n<!-- results: probes.md -->\nold\n<!-- end results -->\nafter\n"
    expected = "before\n<!-- results: probes.md -->\n\n| a |\n|---|\n| 1 |\n\n<!-- end results -->\nafter\n"
    assert update_readme.filled(text, tmp_path) == expected


def test_parts_with_features_are_probed_and_decoders_are_not(tmp_path: Path) -> None:
    classes = {"eyes": "umm_zoo.backbones.features.CLIPVisionFeatures", "hand": "umm_zoo.backbones.sana.Sana", "bare": None}
    for name, kind in classes.items():
        (tmp_path / name).mkdir()
        if kind is not None:
            (tmp_path / name / "card.json").write_text(json.dumps({"load": {"_target_": f"{kind}.from_pretrained"}}))
    assert [name for name in classes if probe_parts.is_probed(tmp_path / name)] == ["eyes"]
