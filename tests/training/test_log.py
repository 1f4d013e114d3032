"""The log of a run, whatever has become of it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from umm_zoo.training.log import DAMAGED, MetricsLog
from umm_zoo.training.log_file import NAME, read_log


def log_of(folder: Path, rows: int = 4) -> Path:
    log = MetricsLog(folder)
    for step in range(rows):
        log.log_metrics({"epoch": 0, "train/loss": 0.5 + step}, step)
    log.finalize("success")
    return folder / NAME


def rows(file: Path) -> list[tuple[str, str]]:
    with file.open(newline="") as stream:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(stream)]


def test_rows_are_on_the_disk_at_once_and_a_new_column_keeps_them(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log_metrics({"train/loss": 0.25}, 3)
    assert rows(tmp_path / NAME) == [("3", "0.25")]
    log.log_metrics({"val/loss": 1.5}, 3)
    assert rows(tmp_path / NAME) == [("3", "0.25"), ("3", "")] and log.num_rows == 2
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_rewound_log_goes_on_behind_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    file = log_of(tmp_path)
    log = MetricsLog(tmp_path)
    log.rewind(step=9, lines=2)
    log.log_metrics({"train/loss": 7.0}, 2)
    assert rows(file) == [("0", "0.5"), ("1", "1.5"), ("2", "7.0")]
    log.rewind(step=1)
    assert rows(file) == [("0", "0.5")]


DAMAGES = {
    "empty": (lambda text: b"", [], 0),
    "bad byte": (lambda text: text.replace(b"1.5", b"\xff.5"), ["0", "2", "3"], 1),
    "no number": (lambda text: text.replace(b"1.5", b"one"), ["0", "2", "3"], 1),
    "cut in a value": (lambda text: text[:-2], ["0", "1", "2"], 1),
    "cut in the header": (lambda text: text[:9], [], 1),
    "a value too many": (lambda text: text.replace(b"1.5", b"1.5,8"), ["0", "2", "3"], 1),
    "a column more in the header": (lambda text: text.replace(b"loss", b"loss,mine", 1), [], 4),
    "a column of a user's": (lambda text: b"".join(b"9," + line for line in text.splitlines(True)), ["0", "1", "2", "3"], 0),
    "another header": (lambda text: text.replace(b"step", b"stop"), [], 5),
    "a bad byte in the header": (lambda text: b"\xfe" + text, [], 5),
    "a blank line": (lambda text: text.replace(b"\n", b"\n\n"), ["0", "1", "2", "3"], 0),
    "of another system": (lambda text: text.replace(b"\n", b"\r\n"), ["0", "1", "2", "3"], 0),
    "zeros, as a crash of the machine leaves": (lambda text: text + b"\0" * 40, ["0", "1", "2", "3"], 1),
    "a negative step": (lambda text: text.replace(b",1,", b",-1,"), ["0", "2", "3"], 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_never_blocks_and_is_set_aside(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = log_of(tmp_path)
    text = file.read_bytes().replace(b"epoch,step,train/loss", b"epoch,step,train/loss")
    change, kept, aside = DAMAGES[damage]
    file.write_bytes(change(text))
    log = MetricsLog(tmp_path)
    log.rewind(step=99)
    log.log_metrics({"train/loss": 9.0}, 99)
    assert [row["step"] for _, row in read_log(file).rows] == [*kept, "99"] and not read_log(file).damaged
    set_aside = (tmp_path / DAMAGED).read_bytes().splitlines() if aside else []
    assert len(set_aside) == aside
    assert (f"note: {aside} damaged lines of {file} now stand in" in capsys.readouterr().err) == bool(aside)


def test_an_error_while_rewriting_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = log_of(tmp_path)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("umm_zoo.checkpoints.plain_files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        MetricsLog(tmp_path).rewind(step=2)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize(("kept", "missing"), [(0, 3), (1, 2), (3, 0)])
def test_rows_that_are_gone_are_said(kept: int, missing: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = log_of(tmp_path, rows=3)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[: kept + 1] if kept else []))
    MetricsLog(tmp_path).rewind(step=99, lines=3)
    said = capsys.readouterr().err
    assert (f"note: {missing} rows that {file} had at the checkpoint are gone" in said) == bool(missing)
