"""User errors that show only in mid-run: one line with shard and key, exit code 2, and the way on."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import toy_parts
from lightning import LightningDataModule
from PIL import Image
from test_generate import METHOD
from torch.utils.data import DataLoader, Dataset

from data_pipelines.shards.writing import write_shards
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.evaluate import main as evaluate
from umm_zoo.fit import main

SAMPLES = 24  # per shard: more than a worker reads ahead
TURNS = [{"role": "user", "text": "<image>?"}, {"role": "assistant", "text": "5"}]
BAD = [b"", b"<html>", b"GIF89a", b"\x89PNG"]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def write(shard: str, rows: list[dict[str, Any]], first: int = 0) -> None:
    """One shard of samples ``s<number>``: a question with an image, and what each row says of it."""
    folder, name = shard.split("/")
    Path(f"{shard}-000000.tar").unlink(missing_ok=True)
    plain = ({"__key__": f"s{number:02d}", "json": {"conversations": TURNS}, "0.png": png()} for number in range(first, 10**6))
    write_shards([sample | row for row, sample in zip(rows, plain)], folder, name)  # noqa: B905 - plain has no end


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two shards read in the written order, two samples per step."""
    monkeypatch.chdir(tmp_path)
    write("world/a", [{}] * SAMPLES)
    write("world/b", [{}] * SAMPLES, first=SAMPLES)
    source = {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "world/*.tar"}
    data = {"image_size": 8, "batch_size": 2, "window": 0, "train": {"world": source}}
    tree = toy_parts.toy_experiment() | {"data": {"_target_": "data_pipelines.shards.data.ShardData", **data}, "metrics": {}}
    tree["trainer"] |= {"max_steps": 20, "val_check_interval": 4}
    toy_parts.write_yaml(tmp_path / "toy.yaml", tree)
    return "toy.yaml"


def spoiled(action: str) -> str:
    return (
        f"callbacks.spoil={json.dumps({'_target_': 'toy_parts.Spoil', 'step': 5, 'action': action, 'file': 'world/b-000000.tar'})}"
    )


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed as errors; no more than the line and the advice."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error") or "ckpt" in line or "File" in line]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
@pytest.mark.parametrize(
    ("action", "found"),
    [
        ("remove", "found no sample 's24', for the shard cannot be read any more (No such file or directory), expected"),
        ("truncate", "the tar holds no member 's24."),
    ],
)
def test_a_shard_that_changes_in_mid_run_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    action: str, found: str, workers: int, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path("world/b-000000.tar").read_bytes()
    argv = [file, f"data.num_workers={workers}", spoiled(action)]
    assert main(argv) == 2
    error, advice = said(capsys)
    assert error.startswith(f"error: toy.yaml: data: world/b-000000.tar: {found}")
    assert re.fullmatch(r"runs/toy/checkpoints/\S+\.ckpt is kept; continue from it with ckpt=last", advice)
    Path("world/b-000000.tar").write_bytes(whole)
    assert main([file, "ckpt=last"]) == 0
    assert json.loads(Path("runs/toy/metrics.json").read_text())["steps"] == 20


def test_too_many_bad_samples(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("world/b", [{"0.png": content} for content in BAD])
    assert main([file, "data.max_skips=3"]) == 2
    error, _ = said(capsys)
    assert error.startswith("error: toy.yaml: data.max_skips: found 4 bad samples, expected 3 (all of them in runs/toy/data.json)")
    assert "world/b-000000.tar:s00: image of 0 bytes" in error


def test_samples_with_and_without_an_image_to_generate(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("world/b", [{}, {"target.png": png()}])
    assert main([file]) == 2
    error, _ = said(capsys)
    assert error.startswith(
        "error: toy.yaml: data: world/b-000000.tar:s01 has an image to generate, world/b-000000.tar:s00 of the same batch has none;"
    )


def test_an_error_before_the_first_checkpoint_says_to_start_again(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("world/a", [{}] * 4 + [{"0.png": content} for content in BAD])
    assert main([file, "data.max_skips=0"]) == 2
    error, advice = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: toy.yaml: data.max_skips: found 1 bad samples, expected 0")
    assert advice == "runs/toy holds no checkpoint yet; start again"
    assert main([file]) == 0  # and one can


@pytest.mark.parametrize("split", ["train", "val"])
def test_texts_longer_than_the_model_reads_are_named(split: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    vlm = METHOD["vlm"] | {"max_length": 24}  # type: ignore[operator]  # 4 image tokens and the chat template are 21
    write("short/a", [{}, {}])
    write("long/a", [{}, {"json": {"conversations": [{"role": "user", "text": "so long " * 9 + "<image>"}, TURNS[1]]}}])
    source = {"_target_": "data_pipelines.shards.data.ShardSource"}
    data = {part: {"some": source | {"shards": "long" if part == split else "short"}} for part in ("train", "val")}
    training = {"trained": ["projector"]}
    tree: Any = {"method": METHOD | {"vlm": vlm}, "training": training, "metrics": {"loss": None}, "base": file, "data": data}
    toy_parts.write_yaml(Path("long.yaml"), tree)
    assert main(["long.yaml", "trainer.val_check_interval=1", "data.train.world=null", "data.max_skips=0"]) == 2
    error = said(capsys)[0]
    assert error.startswith("error: long.yaml: data.max_skips: found 1 bad samples, expected 0")
    assert "some/a-000000.tar:s01: " in error
    assert "of which max_length 24 would cut off 4 image tokens, expected shorter texts or a larger method.vlm.max_length" in error


def test_a_metric_that_the_method_does_not_feed(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "world/a-*.tar"}
    metric = "metrics.psnr={_target_: umm_zoo.metrics.PSNR}"
    assert main([file, metric, f"data.val={json.dumps({'v': own})}"]) == 2
    (error,) = said(capsys)
    assert error == (
        "error: toy.yaml: metrics.psnr: found a PSNR, which reads 'generated'; Toy does not make it, expected a metric of loss"
    )


def test_the_traceback_is_shown_on_demand(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, spoiled("truncate"), "--traceback"]) == 2
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text and "Error: toy.yaml: data: " in text


def test_evaluate_names_a_damaged_shard_too(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "trainer.max_steps=1", "trainer.val_check_interval=1"]) == 0
    capsys.readouterr()
    write("other/v", [{"0.png": content} for content in BAD])
    source = json.dumps({"v": {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "other"}})
    assert evaluate(["runs/toy", f"data.val={source}", "data.max_skips=2", "--trust", "toy_parts"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: runs/toy: data.max_skips: found 3 bad samples, expected 2")


class OwnRows(Dataset[Any]):
    """A user's own data set, whose rows run out."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> str:
        if row > 8:
            raise UserError("mine/rows.csv", f"no row {row}", "0 to 8")
        return f"row{row}"


class OwnData(LightningDataModule):
    def train_dataloader(self) -> Any:
        collate: Any = lambda keys: Batch(keys=keys, conversations=[[] for _ in keys])  # noqa: E731
        return DataLoader(OwnRows(), batch_size=1, collate_fn=collate, num_workers=1)


@pytest.mark.processes
def test_an_error_in_a_users_own_worker_loses_torchs_wrapping(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    toy_parts.write_yaml(Path("own.yaml"), toy_parts.toy_experiment() | {"data": {"_target_": "test_fit_errors.OwnData"}})
    assert main(["own.yaml", "trainer.max_steps=20"]) == 2
    assert said(capsys)[0] == "error: own.yaml: mine/rows.csv: found no row 9, expected 0 to 8"


def test_a_full_disk_is_one_line(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, spoiled("fill the disk")]) == 2
    error, advice = capsys.readouterr().err.splitlines()[-2:]
    assert error == "error: runs/toy: found that nothing more can be written (No space left on device: world/b-000000.tar)"
    assert advice.endswith("continue from it with ckpt=last")


def test_a_run_folder_that_may_not_be_entered_is_one_line(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists

    def refuse(path: Path) -> bool:  # what the system does for everyone but root, who runs these tests in a container
        if path.parts[0] == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    assert main([file, "--runs", "locked"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: locked/toy: found a place that cannot be written (Permission denied), expected a folder")


def test_a_run_whose_experiment_file_is_damaged_is_kept(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/toy").mkdir(parents=True)
    Path("runs/toy/metrics.json").write_text("{}")
    for damaged in ("name: 'to", "just text"):
        Path("runs/toy/experiment.yaml").write_text(damaged)
        assert main([file]) == 2
        assert said(capsys)[-1].startswith("error: runs/toy: found a run of another experiment (other ")


def test_a_run_folder_that_cannot_be_made_is_one_line(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("a file")
    assert main([file, "--runs", "taken"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: taken/toy: found a place that cannot be written (Not a directory")
