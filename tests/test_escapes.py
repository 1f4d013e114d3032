"""What comes from data or from paths is printed as it is spelt: no markup, no control characters, on one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipelines.converters.report import count_rows, entry_of, print_report
from data_pipelines.inspect import Findings, print_findings
from data_pipelines.overlap import print_overlaps
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.writing import write_shards
from umm_zoo.callbacks.metrics import print_scores
from umm_zoo.errors import note, say
from umm_zoo.experiment.file import load_experiment
from umm_zoo.metrics.rows import kind_of
from umm_zoo.training.preview import print_check

ROOT = Path(__file__).parent.parent
MARKED, HOSTILE = "[red]a[/red]", "\x1b[2Jb\nerror: c"
ESCAPED = r"\x1b[2Jb\nerror: c"


def report_of(folder: Path) -> None:
    entry = entry_of(1, 1, {MARKED: 1, HOSTILE: 1})
    print_report(str(folder), count_rows([(MARKED, entry), (HOSTILE, entry)], {MARKED: 1}, {}), folder / "report.json")


def overlaps_of(folder: Path) -> None:
    example = [{"shard": MARKED, "key": HOSTILE}]
    rows = [{"prompt": "prompt", "equal": 1, "examples": example}]
    counts = {"samples_with_overlap": {}, "prompts_with_overlap": {"any": 1}}
    kinds = {name: dict.fromkeys(("equal", "contained", "ngram"), 1) | {"any": 1} for name in counts}
    numbers = {"samples": 1, "texts": 1, "prompts": 1, "unreadable_samples": 0, "unreadable_shards": {}}
    print_overlaps({**numbers, **kinds, "overlaps": rows}, folder / "overlap.json")


def findings_of(folder: Path) -> None:
    findings = Findings(samples=2, bad={MARKED: HOSTILE})
    findings.answers.update({MARKED: 1, HOSTILE: 1})
    print_findings(findings, 1, Console(highlight=False, markup=False, width=120))


def table_of(folder: Path) -> None:
    write_shards([{"__key__": "a", "json": {}}], folder, "part")
    data = ShardData({MARKED: ShardSource(str(folder)), HOSTILE: ShardSource(str(folder))}, image_size=32)
    Console(markup=False, width=200).print(data.table())


PRINTERS: dict[str, Callable[[Path], Any]] = {
    "scores": lambda _: print_scores(MARKED, {MARKED: 1.0, HOSTILE: 2.0}),
    "report": report_of,
    "overlaps": overlaps_of,
    "findings": findings_of,
    "sources": table_of,
    "say": lambda _: say(f"{MARKED} {HOSTILE}"),
}


@pytest.mark.parametrize("name", PRINTERS)
def test_names_of_others_are_printed_as_they_are_spelt(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    PRINTERS[name](tmp_path)
    printed = capsys.readouterr().out
    assert MARKED in printed and ESCAPED in printed and "\x1b" not in printed


def test_notes_and_skips_are_one_line(capsys):
    note(HOSTILE)
    assert capsys.readouterr().err == f"note: {ESCAPED}\n"
    assert str(Skip("train", "a", "a.tar", HOSTILE, "bad", 3)) == rf"a/a.tar:{ESCAPED}: bad"
    assert kind_of({"kind": "\x1b[2J"}) == r"\x1b[2J"


def test_the_check_of_an_experiment_shows_its_folder_as_it_is_spelt(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_check(load_experiment(ROOT / "experiments/llava/shapes.yaml"), str(tmp_path / MARKED / "\x1b[2Jb"))
    printed = capsys.readouterr().out
    assert f"run folder: {tmp_path / MARKED}/\\x1b[2Jb/" in printed.replace("\n", "") and "\x1b" not in printed


def test_the_warning_of_a_skip_holds_no_control_characters_of_its_substitute(tmp_path, caplog):
    good = {"conversations": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]}
    write_shards([{"__key__": "bad", "json": {}}, {"__key__": "\x1b[2Jgood", "json": good}], tmp_path, "part")
    data = ShardData({"a": ShardSource(str(tmp_path))}, image_size=32, batch_size=1, window=0)
    next(iter(data.train_dataloader()))
    assert r"(repeated a/part-000000.tar:\x1b[2Jgood instead)" in caplog.text
    assert json.dumps(caplog.text).count("\\u001b") == 0
