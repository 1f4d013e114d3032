"""What the tests of the converters share: photos, a run of a command, its error line, and the samples it wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipelines.command import run
from data_pipelines.shards.archive import read_samples
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.tasks import SampleTask
from umm_zoo.batch import Batch


def photo(value: int = 0, kind: str = "JPEG", size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, 50, 99)).save(file, kind)
    return file.getvalue()


def convert(command: Any, *arguments: object) -> dict[str, Any]:
    """Run a converter, and the report it saved (empty where it saves none)."""
    parsed = command.parser().parse_args([str(argument) for argument in arguments])
    command.main(parsed)
    report = Path(parsed.out or "") / "report.json"
    return json.loads(report.read_text()) if report.is_file() else {}


def error_of(command: Any, arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The only error line of a command that ends with exit code 2."""
    capsys.readouterr()
    try:
        code = run(command.main, command.parser().parse_args([str(argument) for argument in arguments]))
    except SystemExit as left:  # the parser's
        code = int(left.code or 0)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    return line


def loaded(shards: Any, task: SampleTask | None = None) -> Batch:
    """The samples of shards (their folder, or what names them) in order, as one batch of the loader."""
    (batch,) = ShardData(val={"a": ShardSource(shards, task)}, val_batch_size=50, image_size=8).val_dataloader()
    return batch


def parquet_of(path: Path, row_group_size: int = 4, **columns: list[Any]) -> None:
    """A parquet file, where pyarrow is there."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path, row_group_size=row_group_size)


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of the samples of a tar."""
    return read_samples(str(path))


def samples_in(pattern: Path) -> list[dict[str, Any]]:
    """The json of each sample in tars of a glob, with its key, its members and the texts of its turns."""
    found = [pair for path in sorted(pattern.parent.glob(pattern.name)) for pair in read_tar(path)]
    rows = [{**json.loads(members["json"]), "key": key, "members": members} for key, members in found]
    return [{**row, "turns": [turn["text"] for turn in row["conversations"]]} for row in rows]


def same_files(one: Path, other: Path) -> int:
    """Number of files of two folders, which hold the same bytes."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    return len(names)
