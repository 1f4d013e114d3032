import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_configs
from finished_runs import write_run
from PIL import Image

from data_pipelines.transforms.shaped import Native
from data_pipelines.transforms.tiles import Tiles
from umm_zoo import generate
from umm_zoo.conversation import Task
from umm_zoo.errors import UserError, printable
from umm_zoo.generation.model import Model, load_image, load_images
from umm_zoo.generation.requests import Request

CONFIG = {"vision_config": tiny_configs.clip(), "text_config": tiny_configs.llama(num_hidden_layers=1, initializer_range=0.5)}
METHOD = {
    "_target_": "umm_zoo.methods.llava.LLaVA",
    "vlm": {"_target_": "umm_zoo.backbones.llava.LlavaBackbone.from_config", "config": CONFIG},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), METHOD)


@pytest.fixture
def images(tmp_path):
    for name, colour, size in (("red.png", "red", (8, 8)), ("blue.jpg", "blue", (20, 12))):
        Image.new("RGB", size, colour).save(tmp_path / name)
    return [str(tmp_path / "red.png"), str(tmp_path / "blue.jpg")]


def test_questions_are_answered_alone_as_in_a_batch(run, images, tmp_path, capsys):
    assert generate.main([str(run), "ask", images[0], "What colour?"]) == 0
    alone = capsys.readouterr().out.strip().splitlines()[-1].strip()
    rows = [{"images": ["red.png"], "question": "What colour?"}, {"images": ["red.png", "blue.jpg"], "question": "Which?"}]
    rows.append({"question": "Nothing to see?"})
    (tmp_path / "batch.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    out = tmp_path / "out"
    assert generate.main([str(run), "ask", "--batch", str(tmp_path / "batch.jsonl"), "--out", str(out), "--batch-size", "2"]) == 0
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["question"] for row in results] == ["What colour?", "Which?", "Nothing to see?"]
    assert printable(results[0]["answer"]) == alone != ""
    assert Image.open(out / "grid.png").width > 400


def test_every_image_gets_a_caption(run, images, capsys):
    assert generate.main([str(run), "caption", *images, "--max-new-tokens", "3"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(": ")[0] for line in lines] == images


def test_captions_of_a_file_need_no_question(run, images, tmp_path, capsys):
    rows = [{"images": ["red.png"]}, {"images": ["blue.jpg"], "question": "Describe the image briefly."}]
    (tmp_path / "batch.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["caption", "--batch", str(tmp_path / "batch.jsonl"), "--out", str(tmp_path / "out"), "--max-new-tokens", "2"]
    assert generate.main([str(run), *words]) == 0
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["question"] for row in results] == ["Describe the image.", "Describe the image briefly."]
    capsys.readouterr()
    (tmp_path / "batch.jsonl").write_text('{"images": []}')
    assert generate.main([str(run), *words]) == 2
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["ask"], "no question"),
        (["ask", "nowhere.png", "What?"], "nowhere.png"),
        (["caption"], "no image"),
        (["ask", "--batch", "nowhere.jsonl"], "nowhere.jsonl"),
        (["ask", "<image> What?"], "1 <image> markers"),
        (["ask", "What?", "--batch-size", "0"], "--batch-size: found 0, expected a positive"),
        (["ask", "What?", "--device", "abacus"], "--device: found 'abacus' ("),
        (
            ["text-to-image", "A star."],
            "found a LLaVA, which cannot generate images, expected a method that can (umm_zoo.outputs.Draws)",
        ),
    ],
)
def test_user_errors_are_one_line(run, capsys, words, said):
    assert generate.main([str(run), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and error.startswith("error: ") and "\n" not in error


def test_bad_files_are_named(run, tmp_path, capsys):
    (tmp_path / "not.png").write_text("no image")
    assert generate.main([str(run), "caption", str(tmp_path / "not.png")]) == 2
    assert "not.png: found no readable image" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('{"images": []}\n')
    assert generate.main([str(run), "ask", "--batch", str(tmp_path / "b.jsonl")]) == 2
    assert "line 1" in capsys.readouterr().err
    assert generate.main([str(tmp_path / "norun"), "ask", "What?"]) == 2
    assert "norun" in capsys.readouterr().err


def test_images_are_squared_as_in_training(tmp_path):
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(tmp_path / "clear.png")
    loaded = load_image(tmp_path / "clear.png", None)
    assert loaded.shape == (3, 4, 6) and loaded[:, 0, 0].tolist() == [1, -1, -1] and loaded[:, 1:].eq(1).all()
    assert [image.shape for image in load_images(tmp_path / "clear.png", 8, Native(1, patch=4))] == [(3, 4, 8)]


def test_an_image_in_tiles_is_one_image_to_whoever_asks(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "one.png")
    model = Model(None, lambda path: load_images(path, 8, Tiles([[1, 2]])), load_image, "cpu")
    asked = ["What is it?", "", "Is <image> it?"]
    batch = model.batch_of([Request([tmp_path / "one.png"], question) for question in asked])
    markers = "<image><image><image>"
    texts = [turns[0]["text"] for turns in batch.conversations]
    assert texts == [f"{markers}\nWhat is it?", markers, f"Is {markers} it?"]
    assert batch.image_counts == [3] * 3 and batch.tasks == [Task.EDIT, Task.RECONSTRUCT, Task.EDIT]
    with pytest.raises(UserError, match="found 2 <image> markers, expected 1, one for each image"):
        model.batch_of([Request([tmp_path / "one.png"], "<image> <image>")])


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_16_bits_is_as_dark_as_the_file_says_and_upright(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[0, 200], [0, 0], [0, 25700]], dtype=np.uint16)).save(tmp_path / f"one.{kind}", exif=exif)
    loaded = load_image(tmp_path / f"one.{kind}", None)
    assert ((loaded + 1) * 127.5).round()[0].tolist() == [[0, 0, 0], [100, 0, 1]]


def test_grey_whose_white_is_unknown_says_so(tmp_path):
    Image.fromarray(np.array([[0, 200]], dtype=np.float32)).save(tmp_path / "one.tiff")
    with pytest.raises(UserError, match=r"no readable image \(ValueError: grey values from 0 to 200, expected 0 to 1\)"):
        load_image(tmp_path / "one.tiff", None)


@pytest.mark.processes
def test_help_needs_no_torch():
    code = """
import sys
import umm_zoo.generate as command
try:
    command.main(["--help"])
except SystemExit:
    assert not {"torch", "transformers", "PIL"} & set(sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "caption" in shown.stdout and "ask" in shown.stdout
