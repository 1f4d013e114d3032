"""What somebody types on the page as a command line, and images that are the command's, byte for byte."""

from __future__ import annotations

import itertools
import json
import shlex
import threading
from pathlib import Path

import pytest
from finished_runs import write_run
from PIL import Image
from torch import nn

from tests.test_generate_images import PRETRAINING, UAE, WEMMU
from umm_zoo.errors import UserError
from umm_zoo.generate import main as generate
from umm_zoo.generation import COMMANDS
from umm_zoo.play.__main__ import LOOPBACK, _bound
from umm_zoo.play.__main__ import main as play
from umm_zoo.play.asking import Asked
from umm_zoo.play.cards import history_card, result_card
from umm_zoo.play.commands import RunWords, command_words, requests_of, shell_line
from umm_zoo.play.history import INPUTS, History
from umm_zoo.play.loaded import LoadedRun, shared_abilities
from umm_zoo.play.server import Guard
from umm_zoo.play.watch import Cancelled, Watch, progress

HOSTILE = [
    "--help",
    "-1",
    'it\'s $HOME `id` "x" \\',
    "two\nlines",
    "<script>document.title = 'owned'</script>",
    "-- x",
    " @x ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("play")
    write_run(place / "wemmu", WEMMU, image_size=32)
    Image.new("RGB", (40, 32), "red").save(place / "-red one.png")
    Image.new("RGB", (40, 32), "blue").save(place / "blue.png")
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> LoadedRun:
    return LoadedRun(RunWords(str(folder / "wemmu")))


def asked(run: LoadedRun, name: str, files: list[str], text: str, **given: str) -> list[str]:
    """Cards of what was asked of one run."""
    return [card for _, card in Asked(name, files, text, given).results([run], lambda share, line: None, threading.Event())]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", ["ask", "caption", "text-to-image", "edit", "compose"])
def test_any_text_passes_the_shell_and_the_command_line_as_it_is(name: str, text: str) -> None:
    images = ["-a b.png", "c.png"][: COMMANDS[name].num_images[1]]
    images = images[:1] if name == "caption" else images
    words = command_words(RunWords("-run"), name, images, text, {"seed": "3"})
    again = shlex.split(shell_line(words))
    assert again[3:] == words
    (request,) = requests_of(again[3:])
    assert (request.question, request.settings["seed"]) == (text, 3)
    assert [Path(path) for path in request.images] == [Path("./-a b.png"), Path("c.png")][: len(images)]


@pytest.mark.parametrize(
    ("name", "count", "text", "given"),
    [
        ("edit", 1, HOSTILE[2], {"seed": "5", "guidance": "2", "size": "8x12", "steps": ""}),
        ("text-to-image", 0, HOSTILE[3], {"num": "2", "seed": "7"}),
        ("compose", 2, HOSTILE[0], {"steps": "1"}),
        ("reconstruct", 1, "", {"seed": "2"}),
    ],
)
def test_the_copied_command_makes_the_same_bytes(run, folder, tmp_path, name, count, text, given) -> None:
    files = [str(folder / "-red one.png"), str(folder / "blue.png")][:count]
    made = len(asked(run, name, files, text, **given))
    for number, entry in enumerate(run.history.entries(made)):
        out = tmp_path / str(number)
        words = shlex.split(entry.line(run.words))[3:]
        assert generate([words[0], words[1], "--out", str(out), *words[2:]]) == 0
        row = json.loads((out / "results.jsonl").read_text())
        assert [(out / file).read_bytes() for file in row["files"]] == [path.read_bytes() for path in entry.images]


def test_the_line_names_whose_run_it_is_and_where() -> None:
    words = command_words(RunWords("r", "cuda:1", ["mine", "-x"], True), "caption", ["a.png"], "Describe the image.", {})
    assert shell_line(words) == "python -m umm_zoo.generate r caption --device cuda:1 --trust mine --trust=-x --raw-weights a.png"


def test_runs_that_have_no_ability_in_common_are_refused(run: LoadedRun, folder: Path) -> None:
    other = LoadedRun(RunWords(str(write_run(folder / "decoder", PRETRAINING))))
    assert shared_abilities([run, other]) == ["text-to-image"]
    assert shared_abilities([run])[:2] == ["text-to-image", "edit"]
    other.abilities = {}
    with pytest.raises(UserError, match=r"no ability that both runs have \(.*/wemmu: .*; .*/decoder: nothing that can be tried\)"):
        shared_abilities([run, other])


def test_a_history_that_cannot_be_written_says_where_it_could_be(run: LoadedRun, folder: Path) -> None:
    (folder / "file").touch()
    other = LoadedRun(RunWords(str(folder / "wemmu")), folder / "file")
    with pytest.raises(UserError, match="--history DIR with a folder that can be written"):
        asked(other, "text-to-image", [], "x")


def test_settings_are_refused_by_the_command_s_own_line(run: LoadedRun, folder: Path) -> None:
    with pytest.raises(UserError, match="--steps: found 0, expected a positive whole number up to 1000"):
        asked(run, "text-to-image", [], "x", steps="0")
    with pytest.raises(UserError, match="images: found 1, expected 2 or more for compose"):
        asked(run, "compose", [str(folder / "blue.png")], "x")
    (folder / "no.png").write_text("no image")
    with pytest.raises(UserError, match="no readable image"):
        asked(run, "edit", [str(folder / "no.png")], "x")


def test_hostile_prompts_are_text_in_every_card(run: LoadedRun) -> None:
    (card,) = asked(run, "text-to-image", [], HOSTILE[4])
    entry = run.history.entries(1)[0]
    for shown in (card, history_card(entry, 0, HOSTILE[4], run.words), result_card(entry, 0, run.words)):
        assert "<script" not in shown and "&lt;script&gt;" in shown


def test_the_history_is_what_lies_in_its_folder(run: LoadedRun, tmp_path: Path) -> None:
    asked(run, "text-to-image", [], "first", seed="1")
    asked(run, "text-to-image", [], "second", seed="2")
    again = History(run.history.folder)
    assert [(entry.row["question"], entry.row["given"]) for entry in again.entries(2)] == [
        ("second", {"seed": 2}),
        ("first", {"seed": 1}),
    ]
    newest = again.entries(1)[0]
    assert newest.settings() == {"seed": 2, "steps": 2, "guidance": 4.0, "size": "8x8"}
    assert again.file(newest.folder.name, newest.images[0].name) == newest.images[0]
    lines = newest.folder / "results.jsonl"
    lines.write_text(lines.read_text() + '[1]\n{"command": "rm", "files": []}\n{"half')
    assert again.entries(1)[0].row["question"] == "second"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("..", "experiment.yaml"),
        (INPUTS, "../../x.png"),
        (INPUTS, "link.png"),
        ("2026-01-01-000000", "results.jsonl"),
        ("checkpoints", "a.png"),
    ],
)
def test_no_other_file_is_handed_out(tmp_path: Path, call: str, name: str) -> None:
    for place in (INPUTS, "2026-01-01-000000", "checkpoints"):
        (tmp_path / place).mkdir()
    for file in ("x.png", "2026-01-01-000000/results.jsonl", "checkpoints/a.png"):
        (tmp_path / file).touch()
    (tmp_path / INPUTS / "link.png").symlink_to(tmp_path / "x.png")
    assert History(tmp_path).file(call, name) is None


def test_a_cancelled_request_leaves_nothing_and_the_next_one_runs(run: LoadedRun) -> None:
    before, event = run.history.entries(), threading.Event()
    event.set()
    with pytest.raises(Cancelled):
        list(Asked("text-to-image", [], "x", {}).results([run], lambda share, line: None, event))
    assert [entry.folder for entry in run.history.entries()] == [entry.folder for entry in before]
    assert len(asked(run, "text-to-image", [], "x")) == 1


def test_progress_counts_images_and_says_the_time_left() -> None:
    assert progress(None, 3.0, (0, 1)) == (None, "3 s so far")
    assert progress(0.5, 10.0, (1, 4)) == (0.375, "2 of 4, about 50 s left")


def test_settings_without_a_value_are_the_run_s_own(run: LoadedRun) -> None:
    edit = COMMANDS["edit"]
    assert {name: run.own(edit, name) for name in edit.options} == {
        "seed": 0,
        "num": 1,
        "steps": 2,
        "guidance": 3.0,
        "image_guidance": 2.0,
        "size": None,
    }


def test_two_runs_get_the_same_input_and_seed(run: LoadedRun, folder: Path) -> None:
    other = LoadedRun(RunWords(str(folder / "wemmu")), folder / "other")
    found = Asked("text-to-image", [], "x", {"seed": "4"}).results([run, other], lambda share, line: None, threading.Event())
    assert [place for place, _ in found] == [0, 1]
    pair = [own.history.entries(1)[0].images[0].read_bytes() for own in (run, other)]
    assert pair[0] == pair[1]


def test_captions_made_into_images_are_kept_with_both(folder: Path) -> None:
    uae = LoadedRun(RunWords(str(write_run(folder / "uae", UAE))))
    (card,) = asked(uae, "caption-and-reconstruct", [str(folder / "blue.png")], "")
    row = uae.history.entries(1)[0].row
    assert row["answer"] is not None and row["files"] == ["000-reconstruction.png"] and "reconstruction.png" in card


@pytest.mark.parametrize(
    ("headers", "path", "refused"),
    [
        ({"host": "127.0.0.1:7860"}, "/", False),
        ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, "/gradio_api/queue/join", False),
        ({"host": "evil.example:7860"}, "/", True),
        ({"host": "localhost:7860", "origin": "http://evil.example"}, "/gradio_api/queue/join", True),
        ({"host": "localhost:7860", "origin": "null"}, "/gradio_api/queue/join", True),
        ({"host": "localhost"}, "/gradio_api/proxy=https://x.hf.space/", True),
        ({}, "/", True),
        ({"host": "[::1"}, "/", True),
    ],
)
def test_other_names_and_other_sites_are_refused(headers: dict[str, str], path: str, refused: bool) -> None:
    async def behind(*arguments: object) -> None: ...

    assert bool(Guard(behind, LOOPBACK).refusal("POST", path, headers)) is refused


def test_without_the_extra_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umm_zoo.play.__main__.find_spec", lambda name: None)
    assert play(["runs/none"]) == 2
    assert capsys.readouterr().err == "error: umm_zoo.play: found no gradio, expected the extra 'ui'; pip install 'umm_zoo[ui]'\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b", "c"], "RUN: found 3 runs, expected one, or two side by side"),
        (["a", "--port", "x"], "--port: found 'x', expected a whole number from 0 to 65535"),
        (["a", "--host", "no such host", "--port", "0"], "--host, --port: found no such host:0"),
        (["nowhere", "--port", "0"], "nowhere"),
        (["--host", "0.0.0.0", "--port", "0"], "RUN: found none, expected a run, or two; --allow-training"),
    ],
)
def test_user_errors_of_the_command_are_one_line(words, said, capsys, monkeypatch) -> None:
    monkeypatch.setattr("umm_zoo.play.__main__.find_spec", lambda name: True)
    assert play(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_second_request_of_a_kind_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(nn.Module):
        def forward(self) -> None: ...

    method, said = nn.Sequential(Counted()), list[float | None]()
    watch, clock = Watch(method), itertools.count()
    monkeypatch.setattr("umm_zoo.play.watch.time.monotonic", lambda: float(next(clock)))
    for _ in range(2):
        with watch.over("kind", None, (0, 1), lambda share, line: said.append(share), threading.Event()):
            for _ in range(4):
                method[0]()
    assert said[:4] == [None] * 4 and said[4:] == [0.25, 0.5, 0.75, 0.99]


def test_a_port_is_taken_while_the_runs_are_still_loaded() -> None:
    with _bound("127.0.0.1", 0) as first, pytest.raises(UserError, match="a free address of this machine"):
        _bound("127.0.0.1", first.getsockname()[1])
