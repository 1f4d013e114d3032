"""Requests of ``generate``: settings, batch files, folders of results; most are refused before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished_runs import write_run
from PIL import Image
from test_generate import METHOD
from test_generate_images import PRETRAINING, VLM, WEMMU

from umm_zoo.generate import main, parser
from umm_zoo.generation import COMMANDS
from umm_zoo.generation.progress import progress
from umm_zoo.generation.tensors import from_pil
from umm_zoo.methods.wemmu import WeMMU


@pytest.fixture(scope="module")
def wemmu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "wemmu", WEMMU, image_size=32)
    for name, colour in (("one", "red"), ("two", "blue"), ("three", "green")):
        Image.new("RGB", (40, 32), colour).save(folder / f"{name}.png")
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one error line of a call that is refused."""
    try:
        assert main(["nowhere", *words]) == 2
    except SystemExit as refused:
        assert refused.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and error[:-1].isprintable()
    return error


SETTINGS = [
    *(("--size", value) for value in ("0", "-8", "8x", "8x0", "8.0", "²", "x", "1e3", "100000", "8x8x8")),
    *(("--steps", value) for value in ("0", "-3", "1e9", "2.5", "10001", "ten")),
    *(("--guidance", value) for value in ("nan", "inf", "1e39", "strong")),
    *(("--num", value) for value in ("0", "-1", "1000000000")),
    *(("--seed", value) for value in ("-1", "1e99", "1" * 30, str(2**63), "0.5", "")),
    ("--batch-size", "-1"),
    ("--out", ""),
]


@pytest.mark.parametrize(("option", "value"), SETTINGS)
def test_a_setting_that_cannot_be_is_one_line_before_anything_is_loaded(capsys, option, value):
    error = error_of(capsys, "text-to-image", "a star", option, value)
    assert f"error: {option}: found " in error and ", expected " in error


@pytest.mark.parametrize("option", [["--temperature", "nan"], ["--temperature", "-1"], ["--max-new-tokens", "0"], ["--seed", "-1"]])
def test_settings_of_answers_are_checked_too(capsys, option):
    assert f"{option[0]}: found " in error_of(capsys, "ask", "What?", *option)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["text-to-image", "a\ud800b"], "text-to-image: found the character \\ud800 at place 2 of 'a\\ud800b'"),
        (["ask", "a\x1b[31m"], "ask: found the character \\x1b at place 2"),
        (["caption", "one.png", "--prompt", "a\x00"], "caption: found the character \\x00"),
        (["ask", "nowhere.png", "why " * 100], "nowhere.png: found no such file"),
        (["edit", "a" * 300, "Make it red."], "found no such file"),
        (["edit", "/", "Make it red."], "/: found a folder, expected an image"),
        (["edit", "one.png", " "], "edit: found an empty question"),
        (["text-to-image", "--guidance", "-inf", "a"], "argument --guidance: expected one argument"),
        (["text-to-image", "a", "--batch", "b.txt"], "--batch: found further words beside a file"),
        (["text-to-image", "a", "--seed", str(2**63 - 2), "--num", "3"], "expected a last seed of at most"),
    ],
)
def test_words_that_cannot_be_are_one_line(capsys, words, expected):
    assert expected in error_of(capsys, *words)


def read(command: str, file: Path, *options: str):
    arguments = parser().parse_args(["nowhere", command, "--batch", str(file), *options])
    return COMMANDS[command].requests([], arguments)


ROWS = '{"question": "a café"}\n\n{"question": "two\u2028lines", "seed": 3}'


@pytest.mark.parametrize(
    "content",
    [
        ROWS.encode(),
        ROWS.encode("utf-8-sig"),
        ROWS.encode("utf-16"),
        ROWS.replace("\n", "\r\n").encode(),
        ROWS.replace("\n", "\r").encode(),
        b"\xfe\xff" + ROWS.encode("utf-16-be"),
    ],
    ids=["utf-8", "mark", "utf-16", "CRLF", "CR", "big-endian"],
)
def test_a_file_of_any_system_reads_the_same(tmp_path, content):
    (tmp_path / "b.jsonl").write_bytes(content)
    requests = read("text-to-image", tmp_path / "b.jsonl")
    assert [(r.question, r.settings["seed"]) for r in requests] == [("a café", 0), ("two\u2028lines", 3)]
    assert requests[1].place.endswith("line 3")


LINES = [
    (b'{"question": "caf\xe9"}', "found a byte that is not UTF-8 (0xe9)"),
    (b"[" * 100_000, "expected one JSON object per line"),
    (b'{"question": ' + b"[" * 100_000, "expected one JSON object per line"),
    (b'[{"question": "a"}]', "expected one JSON object per line"),
    (b'{"question": "a", "seed": ' + b"9" * 5000 + b"}", "expected one JSON object per line"),
    (b'{"question": "a", "guidance": NaN}', "expected one JSON object per line"),
    (b'{"question": "a", "question": "b"}', "found the key 'question' twice"),
    (b'{"question": "a", "sede": 3}', "found an unknown key 'sede', expected images, question, seed"),
    (b'{"prompt": "a"}', "found an unknown key 'prompt'"),
    (b'{"question": "a\\ud800"}', "found the character \\ud800"),
    (b'{"question": 3}', "question: found 3, expected a text"),
    (b"{}", "found no question"),
    (b'{"question": "a", "seed": -1}', "seed: found -1, expected a whole number"),
    (b'{"question": "a", "seed": true}', "seed: found true"),
    (b'{"question": "a", "steps": 0}', "steps: found 0"),
    (b'{"question": "a", "size": "8x"}', "size: found '8x'"),
    (b'{"question": "a", "num": 0}', "num: found 0"),
    (b'{"question": "a", "guidance": "strong"}', "guidance: found 'strong'"),
    (b'{"question": "a", "images": ["one.png"]}', "images: found 1, expected 0 for text-to-image"),
    (b'{"question": "a", "images": "one.png"}', "images: found 'one.png', expected a list"),
]


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_a_line_that_cannot_be_is_named(tmp_path, capsys, line, expected):
    (tmp_path / "b.jsonl").write_bytes(b'{"question": "a"}\n\n' + line + b"\n")
    error = error_of(capsys, "text-to-image", "--batch", str(tmp_path / "b.jsonl"))
    assert f"b.jsonl: line 3: {expected}" in error or (": line 3: found" in error and expected in error)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\n \n", "found no request"), (b"", "found no request"), (b"a\nb\x0cc", "line 2: found the character")],
)
def test_plain_files_are_checked_too(tmp_path, capsys, content, expected):
    (tmp_path / "b.txt").write_bytes(content)
    assert expected in error_of(capsys, "text-to-image", "--batch", str(tmp_path / "b.txt"))


def test_images_of_a_file_are_opened_before_a_model_is_loaded(wemmu, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes((wemmu / "one.png").read_bytes()[:60])
    rows = [{"images": [str(wemmu / "one.png")], "question": "a"}, {"images": ["cut.png"], "question": "b"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    error = error_of(capsys, "edit", "--batch", str(tmp_path / "b.jsonl"))
    assert f"b.jsonl: line 2: {tmp_path / 'cut.png'}: found no readable image" in error


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_lines_have_their_own_settings_and_results_say_them(wemmu, tmp_path):
    rows = [
        {"question": "a circle", "seed": 7, "num": 2},
        {"question": "a star", "size": "4x6", "steps": 1},
        {"question": "a star", "guidance": 2},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["text-to-image", "--batch", str(tmp_path / "b.jsonl"), "--seed", "5", "--size", "8"]
    assert main([str(wemmu), *words, "--out", str(tmp_path / "o")]) == 0
    found = results(tmp_path / "o")
    assert [(row["seed"], row["size"], row["steps"], row["guidance"]) for row in found] == [
        (7, "8x8", None, None), (8, "8x8", None, None), (5, "4x6", 1, None), (5, "8x8", None, 2.0),
    ]  # fmt: skip
    assert [row["files"] for row in found] == [[f"{k:03d}-generated.png"] for k in range(4)]
    assert found[0]["run"] == str(wemmu) and found[0]["step"] == 1 and "commit" in found[0]
    alone = ["text-to-image", "a star", "--seed", "5", "--size", "4x6", "--steps", "1", "--out", str(tmp_path / "alone")]
    assert main([str(wemmu), *alone]) == 0
    images = [tmp_path / "o" / "002-generated.png", tmp_path / "alone" / "000-generated.png"]
    assert images[0].read_bytes() == images[1].read_bytes()


def test_python_gives_the_image_of_the_command_line(wemmu, tmp_path):
    assert main([str(wemmu), "text-to-image", "a star", "--seed", "3", "--out", str(tmp_path / "o")]) == 0
    stored = from_pil(Image.open(tmp_path / "o" / "000-generated.png"))
    assert (WeMMU.load(wemmu).sample(["a star"], seed=3)[0] - stored).abs().max() <= 1 / 255


def test_a_reconstruction_is_the_same_in_a_batch_of_any_size(wemmu, tmp_path):
    images = [str(wemmu / f"{name}.png") for name in ("one", "two", "three")]
    for name, words in {"a": images, "b": [*images, "--batch-size", "2"], "c": images[2:]}.items():
        assert main([str(wemmu), "reconstruct", *words, "--seed", "4", "--out", str(tmp_path / name)]) == 0
    made = [tmp_path / name for name in ("a/002", "b/002", "c/000")]
    assert len({path.with_name(f"{path.name}-reconstruction.png").read_bytes() for path in made}) == 1


def test_drawn_words_depend_on_request_and_seed_alone(tmp_path, capsys):
    run = write_run(tmp_path / "run", METHOD)
    rows = [{"question": "Which?"}, {"question": "What colour?", "seed": 4}, {"question": "What colour?", "seed": 5}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn = ["--temperature", "1", "--max-new-tokens", "9"]
    assert main([str(run), "ask", "--batch", str(tmp_path / "b.jsonl"), *drawn, "--out", str(tmp_path / "o")]) == 0
    assert main([str(run), "ask", "What colour?", "--seed", "4", *drawn, "--out", str(tmp_path / "alone")]) == 0
    answers = [row["answer"] for row in results(tmp_path / "o")]
    assert answers[1] == results(tmp_path / "alone")[0]["answer"] != answers[2]


def test_results_never_lie_among_earlier_ones(wemmu, tmp_path, capsys):
    (tmp_path / "o").mkdir()  # an empty one will do
    words = [str(wemmu), "text-to-image", "a", "b", "--size", "4", "--steps", "1", "--out", str(tmp_path / "o")]
    assert main(words) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    capsys.readouterr()
    assert main(words) == 0
    assert f"written to {tmp_path / 'o-2'}; {tmp_path / 'o'} holds something else" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    assert len(list((tmp_path / "o-2").glob("0*.png"))) == 2


def test_what_was_made_before_an_error_is_kept_and_the_line_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", PRETRAINING)
    (tmp_path / "b.txt").write_text("a circle\n" + "a circle " * 100)
    words = ["text-to-image", "--batch", str(tmp_path / "b.txt"), "--size", "4", "--batch-size", "1", "--out", str(tmp_path / "o")]
    assert main([str(run), *words]) == 2
    assert "b.txt: line 2: found a prompt of " in (error := capsys.readouterr().err) and "max_length" in error
    assert [row["question"] for row in results(tmp_path / "o")] == ["a circle"]
    assert main([str(run), "text-to-image", "a <image>", "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()  # a call that made nothing leaves nothing


def test_the_bar_shows_the_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with progress(2) as advance:
        advance()
    shown = capsys.readouterr()
    assert "1/2" in shown.err and "left" in shown.err and not shown.out


def test_a_prompt_beyond_the_language_models_positions_is_refused(tmp_path, capsys):
    method = {
        **WEMMU,
        "vlm": {**WEMMU["vlm"], "config": {**VLM, "text_config": {**VLM["text_config"], "max_position_embeddings": 64}}},
    }
    run = write_run(tmp_path / "run", method)
    assert main([str(run), "text-to-image", "a circle " * 40, "--out", str(tmp_path / "o")]) == 2
    assert "tokens, expected at most 64, the positions of the language model" in capsys.readouterr().err


def test_the_device_of_shapes_alone_is_refused(wemmu, tmp_path, capsys):
    assert main([str(wemmu), "text-to-image", "a", "--device", "meta", "--out", str(tmp_path / "o")]) == 2
    assert "error: --device: found 'meta'" in capsys.readouterr().err
