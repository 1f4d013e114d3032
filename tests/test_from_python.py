"""Requests from Python: the results of the command line, forms of images and lists, and one line where something cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import write_run
from PIL import Image
from test_generate import METHOD
from test_generate_images import PRETRAINING, STRANGER, WEMMU

from umm_zoo.errors import UserError
from umm_zoo.generate import main
from umm_zoo.generation.tensors import from_pil
from umm_zoo.method import Method
from umm_zoo.outputs import Draws

README = Path(__file__).parents[1] / "umm_zoo" / "README.md"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    resize = {"_target_": "data_pipelines.transforms.shaped.Bucket", "multiple": 4}
    data = {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 32, "target_size": 8, "resize": resize}
    folder = write_run(tmp_path_factory.mktemp("home") / "runs" / "wemmu" / "toy" / "stage4", WEMMU, data=data)
    for name, size in (("one", (48, 20)), ("two", (33, 71))):
        noise = np.random.default_rng(len(name) + size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Method:
    return Method.load(run)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Method:
    return Method.load(write_run(tmp_path_factory.mktemp("llava"), METHOD))


@pytest.mark.parametrize(
    "words, ask",
    [
        (
            ["edit", "one.png", "Make it green.", "--num", "2"],
            lambda model, one, two: model.edit(one, "Make it green.", n=2, seed=3),
        ),
        (["compose", "one.png", "two.png", "Both."], lambda model, one, two: [model.edit([one, two], "Both.", seed=3)]),
        (
            ["text-to-image", "a", "b", "--size", "8x12", "--steps", "1", "--guidance", "2"],
            lambda model, one, two: model.generate(["a", "b"], seed=3, size=(8, 12), steps=1, guidance=2),
        ),
    ],
)
def test_images_are_those_of_the_command_line(run, model, tmp_path, words, ask):
    words = [str(run / word) if word.endswith(".png") else word for word in words]
    assert main([str(run), *words, "--seed", "3", "--out", str(tmp_path / "o")]) == 0
    stored = [pixels(Image.open(file)) for file in sorted((tmp_path / "o").glob("0*.png"))]
    made = ask(model, run / "one.png", Image.open(run / "two.png"))
    assert len(made) == len(stored) and all(np.array_equal(pixels(a), b) for a, b in zip(made, stored, strict=True))


def test_answers_are_those_of_the_command_line(run, model, capsys):
    one = str(run / "one.png")
    assert main([str(run), "caption", one, "--max-new-tokens", "5", "--temperature", "1", "--seed", "4"]) == 0
    said = model.caption(one, max_new_tokens=5, temperature=1, seed=4)
    assert capsys.readouterr().out.removesuffix("\n") == f"{one}: {said}"
    assert model.ask([one, run / "two.png"], "Which?", max_new_tokens=5) == model.ask([[one, run / "two.png"]], ["Which?"], 5)[0]


def test_a_text_is_one_prompt_and_n_makes_a_list(model):
    alone, listed, four = (
        model.generate("a star", seed=4),
        model.generate(["a star"], seed=4),
        model.generate("a star", n=4, seed=3),
    )
    assert isinstance(alone, Image.Image) and len(listed) == 1 and len(four) == 4
    assert np.array_equal(pixels(alone), pixels(listed[0])) and np.array_equal(pixels(alone), pixels(four[1]))
    nested = model.generate(["a star", "a ring"], n=2, seed=3)
    assert [len(images) for images in nested] == [2, 2] and np.array_equal(pixels(nested[0][1]), pixels(alone))


def test_a_path_an_opened_image_and_tensors_are_one_image(run, llava):
    opened = Image.open(run / "one.png")
    levels = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
    forms = [run / "one.png", str(run / "one.png"), opened, levels, from_pil(opened), opened.convert("RGBA")]
    first, *others = llava.features(forms)
    assert first.shape == (4, 24) and first.std() > 0
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(llava.features(opened), first) and torch.equal(llava.features(levels[None])[0], first)


def test_a_method_without_the_capability_says_in_one_line_what_it_can(llava, run, tmp_path):
    said = "found a LLaVA, which cannot generate images, expected a method that can .*; this one can answer questions and describe"
    for ask in (lambda: llava.generate("a star"), lambda: llava.edit(run / "one.png", "Make it green.")):
        with pytest.raises(UserError, match=said) as caught:
            ask()
        assert len(caught.value.lines()) == 1
    assert not isinstance(llava, Draws) and not hasattr(llava, "generate")
    painter = Method.load(write_run(tmp_path / "painter", PRETRAINING))
    with pytest.raises(UserError, match=r"cannot answer, .*; this one can generate images, tell features of images$"):
        painter.ask(run / "one.png", "What?")


def test_a_strangers_method_draws_texts_as_it_is(tmp_path):
    (tmp_path / "lines_of_python.py").write_text(STRANGER)
    folder = write_run(tmp_path / "run", {"_target_": "lines_of_python.Lines"}, folders=(str(tmp_path),))
    assert Method.load(folder, trust=["lines_of_python"]).generate("four").size == (4, 4)


@pytest.mark.parametrize(
    "ask, said",
    [
        (lambda model: model.ask(torch.zeros(3, 4, 5, 6, 7), "?"), r"image: found a tensor \[3, 4, 5, 6, 7\], expected a path"),
        (lambda model: model.ask(torch.full((3, 4, 4), 200.0), "?"), r"values from 200 to 200, expected"),
        (lambda model: model.ask(torch.full((3, 4, 4), torch.nan), "?"), r"values from nan to nan, expected"),
        (lambda model: model.ask(7, "?"), "image: found a int, expected a path"),
        (lambda model: model.ask("nowhere.png", "?"), "nowhere.png: found no such file"),
        (lambda model: model.ask(None, " "), "found an empty question"),
        (lambda model: model.ask(None, 7), "text: found a int, expected a text, or a list"),
        (lambda model: model.ask(["one.png"], ["a", "b"]), "image: found 1 in a list for 2 texts"),
        (lambda model: model.ask(None, "?", temperature=-1), "temperature: found -1, expected a number"),
        (lambda model: model.generate("a", n=0), "^n: found 0, expected a positive"),
        (lambda model: model.generate("a", size=(8, 0)), "size: found '8x0', expected 512 or"),
        (lambda model: model.generate("a", size=9), "9"),
        (lambda model: model.edit([], "Make it green."), "image: found none for 'Make it green.'"),
        (lambda model: model.ask(None, ["What?", "<image>?"]), "request 1: found 1 <image> markers"),
    ],
)
def test_what_cannot_be_is_one_line(model, ask, said):
    with pytest.raises(UserError, match=said) as caught:
        ask(model)
    assert len(caught.value.lines()) == 1


def test_the_readme_s_lines_run(run, monkeypatch):
    monkeypatch.chdir(run.parents[3])
    for name in ("one", "two"):
        Image.open(run / f"{name}.png").save(f"{name}.png")
    (lines,) = re.findall(r"```python\n(# use_it\.py\n.*?)```", README.read_text(), re.DOTALL)
    found: dict = {}
    exec(lines, found)
    answer, captions, images, changed, features = found["try_out"]()
    assert isinstance(answer, str) and len(captions) == 2 and len(images) == 4
    assert changed.size == (12, 4) and features.ndim == 2
