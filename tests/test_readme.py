"""What the README pages show is what happens: their files are checked, their commands parsed, the error line printed."""

from __future__ import annotations

import importlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipelines.command import run
from data_pipelines.converters.converting import converter_parser
from umm_zoo.batch import Batch, Tokens
from umm_zoo.compare import main as compare
from umm_zoo.comparison.plan import load_plan
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment
from umm_zoo.fit import main
from umm_zoo.methods.wemmu import WeMMU
from umm_zoo.outputs import Outputs
from umm_zoo.testing import check_block, check_reward
from umm_zoo.training.setup import build_experiment

ROOT = Path(__file__).resolve().parents[1]
#: Every README but those of the shipped weights, whose cards are tested with them, and of the project that ``new`` writes.
PAGES = {
    path: path.read_text(encoding="utf-8")
    for room in (".", "umm_zoo", "data_pipelines", "experiments", "tools", "tests")
    for path in sorted((ROOT / room).rglob("README.md") if room != "." else [ROOT / "README.md"])
    if not {"weights", "project"} & set(path.parts)
}
FRONT = PAGES[ROOT / "README.md"]
#: The packages inside ours: each has a page of one screen.
ROOMS = sorted(file.parent for package in ("umm_zoo", "data_pipelines") for file in (ROOT / package).glob("*/__init__.py"))
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.M | re.S)
FILES = {body.split("\n")[0].removeprefix("# "): body for kind, body in BLOCKS if kind in ("yaml", "python")}
LINES = [line.split("  #")[0].strip() for kind, body in BLOCKS if kind == "bash" for line in body.splitlines() if line.strip()]
#: Without those that differ from another in what no check looks at.
DIFFERENT = {re.sub(r" (--check|ckpt=\S+)", "", line): line for line in LINES}.values()
#: Every ``python -m …`` of the text, in blocks and in passing.
COMMANDS = sorted({*re.findall(r"`(python -m [^`]+)`", TEXT), *(line for line in LINES if line.startswith("python -m"))})
#: Files of a reader's own that no page shows.
PLACEHOLDERS = ("FILE", "EXPERIMENT", "my_method.yaml")
YAML = [name for name in FILES if name.endswith(".yaml") and name not in PLACEHOLDERS]
COMPARISONS = [name for name in YAML if "\nvary: " in FILES[name]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would stand: the README's own files beside the repository's folders."""
    for name, body in FILES.items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    for name in ("experiments", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


def test_every_block_is_of_a_kind_that_is_checked_here() -> None:
    assert {kind for kind, _ in BLOCKS} <= {"bash", "yaml", "python", ""}
    assert [name for name in FILES if not re.fullmatch(r"\w+\.(yaml|py)", name)] == []


@pytest.mark.parametrize("name", sorted({*YAML} - {*COMPARISONS}))
def test_its_experiments_pass_the_check(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", COMPARISONS)
def test_its_comparisons_can_be_planned_and_every_run_passes_the_check(name: str, folder: Path) -> None:
    assert compare([name, "--plan"]) == 0
    for step in load_plan(name).steps():
        check(step.experiment)


def test_its_block_passes_the_contract(folder: Path) -> None:
    found = importlib.import_module("my_heads")
    shape = re.search(r"check_block\(LinearHead\((\d+), (\d+)\)", TEXT)
    assert shape is not None
    width, channels = map(int, shape.groups())
    check_block(found.LinearHead(width, channels), [Tokens(torch.randn(2, 9, width))], [2, channels, 3, 3])


def test_its_reward_passes_the_contract(folder: Path) -> None:
    reward = importlib.import_module("my_reward").Warmth()
    check_reward(reward, torch.rand(4, 3, 8, 8) * 2 - 1, Batch(["one", "two"], [[], []]))


def test_its_metric_is_exact_over_batches_of_other_sizes(folder: Path) -> None:
    metric, batch = importlib.import_module("my_metric").Brightness(), Batch(["one"], [[]])
    for value, count in ((0.5, 3), (-1.0, 1)):
        metric.update(Outputs(generated=torch.full((count, 3, 2, 2), value)), batch)
    metric.update(Outputs(), batch)
    assert float(metric.compute()) == pytest.approx((0.5 * 3 - 1) / 4)


def test_its_task_makes_a_question(folder: Path) -> None:
    sample = importlib.import_module("my_task").Titles()("key", {"title": b" Night ", "jpg": b"bytes"})
    assert [turn["text"] for turn in sample.conversation] == ["<image>\nWhat is it called?", "Night"]
    assert sample.images == [b"bytes"]


def test_its_converter_leaves_out_what_has_no_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    for name in ("one", "two"):
        Path(f"texts/{name}.txt").write_text(name)
    Image.new("RGB", (8, 8)).save("texts/one.jpg")
    module = importlib.import_module("my_converter")
    arguments = converter_parser(module.__doc__, "", unit="texts").parse_args(["texts", "shards"])
    assert run(module.main, arguments) == 0, capsys.readouterr().err
    report = json.loads(Path("shards/report.json").read_text())
    assert report["samples"] == {"train/captions": 1} and "missing image" in str(report["left_out_items"])


def test_its_schedule_halves(folder: Path) -> None:
    schedule = importlib.import_module("my_schedule").Halving(every=200)
    assert [schedule.factor(step) for step in (0, 199, 200, 400)] == [1.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py") and name != "generate.py"])
def test_its_python_runs(name: str, folder: Path) -> None:
    runpy.run_path(str(folder / name))


def test_generating_from_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_experiment(load_experiment(folder / "experiments/wemmu/toy/stage1.yaml")).method.eval()
    monkeypatch.setattr(WeMMU, "load", lambda run: built if run == "runs/wemmu/toy/stage4" else None)
    done = runpy.run_path(str(folder / "generate.py"))
    assert done["images"].shape == (2, 3, 32, 32) and done["edited"].shape == (1, 3, 32, 32)
    assert not torch.equal(done["edited"][0], done["images"][0])


def test_its_error_line_is_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = next(body.strip() for kind, body in BLOCKS if not kind and body.startswith("error: "))
    assert main(["mine.yaml", "--check", "training.optimizer.learning_rate=0.1"]) == 2
    assert capsys.readouterr().err.strip() == shown


@pytest.mark.parametrize("line", DIFFERENT)
def test_its_command_lines_name_what_exists(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = shlex.split(line)
    if first == "source":
        return  # made by tools/setup.sh
    if first == "bash":
        assert subprocess.run(["bash", "-n", rest[0]], check=False).returncode == 0
    else:
        assert first == "python" and (rest[0] == "-m" or (ROOT / rest[0]).is_file())
        if rest[1] == "umm_zoo.compare":
            assert compare([rest[2], "--plan"]) == 0, capsys.readouterr().err
        if rest[1] == "umm_zoo.fit" and rest[2] not in PLACEHOLDERS:
            own = [word for word in rest[2:] if not word.startswith("ckpt=") and word != "--check"]
            assert main([*own, "--check"]) == 0, capsys.readouterr().err


@cache
def help_of(module: str, *words: str) -> str:
    """What the module says of its flags, once for all lines that use it."""
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(io.StringIO()) as said:
        monkeypatch.setattr(sys, "argv", [module, *words, "--help"])
        monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of a module that is there already
        with pytest.raises(SystemExit) as left:
            runpy.run_module(module, run_name="__main__")
    assert not left.value.code and "usage" in said.getvalue()
    return said.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_its_modules_have_the_flags_it_uses(command: str) -> None:
    module, *words = command.split()[2:]
    named = ["RUN", words[1]] if module == "umm_zoo.generate" and words else []  # its flags belong to the command
    text = help_of(module, *named)
    assert [word for word in words if word.startswith("--") and word not in text] == []


def test_the_front_page_stays_a_page() -> None:
    assert len(FRONT.splitlines()) <= 170


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_every_room_has_a_page_of_one_screen_whose_files_are_there(room: Path) -> None:
    text = PAGES[room / "README.md"]
    written = re.sub(r"<!-- results: .*?<!-- end results -->", "", text, flags=re.S)  # a matrix may be longer
    assert len(written.splitlines()) <= 75
    assert [name for name in re.findall(r"`(\w+\.py)`", text) if not any(room.rglob(name))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not re.match(r"https?:", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", PAGES.get(target, ""), flags=re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, link


def test_the_paths_it_names_exist() -> None:
    named = set(re.findall(r"`((?:experiments|tools|tests)/[\w./-]+)`", TEXT)) | set(
        re.findall(r"\b(tools/\w+\.(?:py|sh|txt))\b", TEXT)
    )
    assert len(named) > 5 and [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_page_of_the_tools_names_each_of_them() -> None:
    text = PAGES[ROOT / "tools" / "README.md"]
    programs = [path.name for path in (ROOT / "tools").iterdir() if path.suffix in (".py", ".sh", ".txt")]
    assert [name for name in sorted(programs) if f"tools/{name}" not in text] == []


def test_the_classes_it_names_exist() -> None:
    for path in set(re.findall(r"`(umm_zoo\.[\w.]+[A-Z]\w+)`", TEXT)):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
