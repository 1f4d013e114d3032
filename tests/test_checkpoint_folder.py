"""The order of events around a checkpoint, and what is done when the disk has not kept its word."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn
from toy_parts import Body, Head, Toy

from umm_zoo.checkpoints import output
from umm_zoo.checkpoints.files import AtomicCheckpointIO, load_checkpoint, verify
from umm_zoo.checkpoints.folder import CheckpointFolder, checkpoint_path
from umm_zoo.errors import UserError
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup


def written(folder: Path, *steps: int) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder / "checkpoints")
    for step in steps:
        path = checkpoints.path / f"step-{step:08d}.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.full((300,), float(step))}, "global_step": step}, path)
        checkpoints.publish(path)
    return checkpoints


def names(checkpoints: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in checkpoints.path.iterdir())


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((300,), float(path.stem[-1])).numpy().tobytes()) + 600] ^= 1  # one bit of one weight
    path.write_bytes(content)


def test_the_newest_two_stay_and_latest_names_them(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2, 3)
    assert names(checkpoints) == ["LATEST", "step-00000002.ckpt", "step-00000003.ckpt"]
    assert (checkpoints.path / "LATEST").read_text() == "step-00000003.ckpt\nstep-00000002.ckpt\n"
    assert load_checkpoint(tmp_path)["global_step"] == 3


def test_one_wrong_bit_is_found_and_the_one_before_taken_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = written(tmp_path, 1, 2, 3)
    spoil(checkpoints.path / "step-00000003.ckpt")
    assert torch.load(checkpoints.path / "step-00000003.ckpt", weights_only=True)["global_step"] == 3  # torch does not see it
    assert checkpoint_path(tmp_path).name == "step-00000002.ckpt"
    said = capsys.readouterr().err
    assert "note: " in said and "step-00000003.ckpt is damaged ('" in said and "taking " in said
    with pytest.raises(UserError, match="found a damaged checkpoint"):
        AtomicCheckpointIO().load_checkpoint(checkpoints.path / "step-00000003.ckpt")


@pytest.mark.parametrize("length", [0, 700])
def test_a_file_cut_short_is_passed_over(length: int, tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2)
    with (checkpoints.path / "step-00000002.ckpt").open("r+b") as stream:
        stream.truncate(length)
    assert checkpoints.latest() == checkpoints.path / "step-00000001.ckpt"
    spoil(checkpoints.path / "step-00000001.ckpt")
    with pytest.raises(UserError, match=r"found no intact .*00002.* is damaged .*00001.* is damaged"):
        checkpoints.latest()


def test_a_checkpoint_beside_the_marker_is_no_rival_but_a_reserve(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2)
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, checkpoints.path / "step-00000003.ckpt")  # killed before LATEST
    assert checkpoints.latest() == checkpoints.path / "step-00000002.ckpt"
    (checkpoints.path / "LATEST").unlink()
    assert checkpoints.latest() == checkpoints.path / "step-00000003.ckpt"


def test_a_run_that_went_back_forgets_the_steps_after(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 5, 6, 3)
    assert names(checkpoints) == ["LATEST", "step-00000003.ckpt"]


def test_what_was_half_written_or_half_removed_goes(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1)
    (checkpoints.path / "step-00000002.ckpt.partial").write_bytes(b"half")
    (checkpoints.path / "step-00000000.ckpt.partial").mkdir()
    written(tmp_path, 2)
    assert names(checkpoints) == ["LATEST", "step-00000001.ckpt", "step-00000002.ckpt"]


def test_the_word_of_the_disk_is_passed_on_and_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, put = written(tmp_path, 1), output.put

    def on_a_full_disk(file: BinaryIO, piece: memoryview) -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        put(file, piece)

    monkeypatch.setattr(output, "put", on_a_full_disk)
    with pytest.raises(UserError, match=r"00002.ckpt could not be written: no room on the disk \(No space left"):
        written(tmp_path, 2)
    assert names(checkpoints) == ["LATEST", "step-00000001.ckpt"] and load_checkpoint(tmp_path)["global_step"] == 1


def test_what_could_not_be_read_back_is_refused_when_it_is_written(tmp_path: Path) -> None:
    for state in ({"callback": nn.Linear(2, 2)}, {"callback": lambda: 0}):  # not plain values; not even picklable
        with pytest.raises(UserError, match="could not be written"):
            AtomicCheckpointIO().save_checkpoint(state, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_another_content_than_was_to_be_written_is_noticed(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.ones(3)}}, tmp_path / "a.ckpt")
    for state in ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(4)}):
        with pytest.raises(ValueError, match="the weights read back are not those written"):
            verify(tmp_path / "a.ckpt", {"state_dict": state})


def trained_head() -> Toy:
    method = Toy(Body(4, 3), Head(3))
    TrainingSetup(["head"], AdamW(lr=0.1)).prepare(method)
    return method


def test_keys_of_a_part_outlive_its_tensors() -> None:
    method = trained_head()
    method.head.linear = nn.Linear(3, 1)  # as a strategy does that puts its own tensors in
    assert method.checkpoint_keys() == {"head.linear.weight", "head.linear.bias"}


def test_a_strategy_that_takes_the_weights_away_is_resumed() -> None:
    method = trained_head()
    checkpoint: dict[str, Any] = {"state_dict": dict(method.state_dict())}
    method.on_save_checkpoint(checkpoint)
    del checkpoint["state_dict"]  # FSDP's load_checkpoint has used them by then
    method.on_load_checkpoint(checkpoint)
    checkpoint["state_keys"].remove("head.linear.bias")
    with pytest.raises(ValueError, match="1 trained tensors are missing"):
        method.on_load_checkpoint(checkpoint)


def test_clipping_under_fsdp_is_that_of_its_root() -> None:
    method = trained_head()
    clipped: list[float] = []
    root = SimpleNamespace(clip_grad_norm_=clipped.append)
    method._trainer = SimpleNamespace(strategy=SimpleNamespace(model=root))  # type: ignore[assignment]
    method._fabric = None
    method.configure_gradient_clipping(torch.optim.SGD(method.head.parameters()), 0.7, "norm")
    assert clipped == [0.7]
