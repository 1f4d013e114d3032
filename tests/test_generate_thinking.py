"""``text-to-image --think``: the thought is printed and kept beside the image; others are refused in a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from finished_runs import write_run
from PIL import Image, ImageChops

from umm_zoo.generate import main
from umm_zoo.generation import COMMANDS, abilities_of
from umm_zoo.method import Method
from umm_zoo.play.commands import RunWords, command_words, requests_of

sys.path.insert(0, str(Path(__file__).parent / "methods"))
from test_generate_images import UAE, WEMMU

REASONER = {"_target_": "umm_zoo.methods.reasoning.Reasoner", "max_new_tokens": 6}
THINKER = {**UAE, "_target_": "umm_zoo.methods.think_then_generate.ThinkThenGenerate", "reasoner": REASONER}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "thinker", THINKER, image_size=8)


def test_the_thought_is_printed_and_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(run), "text-to-image", "--think", "a circle", "a star", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["think"] for row in rows] == [True, True] and all(isinstance(row["answer"], str) for row in rows)
    assert all("generated from the prompt as it was" in row["remark"] for row in rows) and "prompt as it was" in said
    assert main([str(run), "text-to-image", "a circle", "--out", str(tmp_path / "plain")]) == 0
    plain = json.loads((tmp_path / "plain" / "results.jsonl").read_text(encoding="utf-8"))
    assert plain["answer"] is None and not {"think", "remark"} & plain.keys()
    images = [Image.open(folder / "000-generated.png") for folder in (out, tmp_path / "plain")]
    assert ImageChops.difference(*images).getbbox() is None  # no rewrite: the user's own prompt


def test_from_python_the_image_holds_its_thought(run: Path) -> None:
    model = Method.load(run)
    thought, plain = model.generate("a circle", think=True), model.generate("a circle")
    assert isinstance(thought.info["thought"], str) and "thought" not in plain.info


def test_only_what_thinks_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bridge = write_run(tmp_path / "wemmu", WEMMU, image_size=32)
    assert main([str(bridge), "text-to-image", "--think", "a circle"]) == 2
    assert "cannot think before it generates" in capsys.readouterr().err
    method = Method.load(bridge)
    assert "think" not in COMMANDS["text-to-image"].options_of(method) and "refine" not in abilities_of(method)
    assert main([str(bridge), "refine", "one.png", "a circle"]) == 2 and "one.png" in capsys.readouterr().err


def test_a_switch_on_the_page_is_one_on_the_command_line(run: Path) -> None:
    for given, on in ((True, True), ("", False)):
        words = command_words(RunWords(str(run)), "text-to-image", [], "a circle", {"think": given, "steps": "3"})
        (request,) = requests_of(words)
        assert request.settings.get("think", False) is on and request.settings["steps"] == 3 and ("--think" in words) == on
