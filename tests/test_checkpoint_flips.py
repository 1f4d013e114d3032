"""One flipped bit anywhere in what a run has saved: the checkpoint before it is taken with a note, or one line says it."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tools.consolidate import consolidate
from umm_zoo.checkpoints.files import AtomicCheckpointIO, describe, load_checkpoint
from umm_zoo.checkpoints.folder import CheckpointFolder, checksum, damage
from umm_zoo.checkpoints.output import in_memory
from umm_zoo.checkpoints.sharded import write_rest
from umm_zoo.errors import UserError

STEPS = (10, 20)
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def content(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(30, generator=generator), "b": torch.randn(7, 5, generator=generator)}
    return {"state_dict": weights, "global_step": step, "experiment": {"method": {"step": step}}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in STEPS:
        path = folder.path / f"step-{step:08d}.ckpt"
        AtomicCheckpointIO().save_checkpoint(content(step), path)
        folder.publish(path)
    return tmp_path


def flips(file: Path, count: int) -> list[bytes]:
    """Contents with one flipped bit each, half of them in the table of contents of an archive."""
    whole, chance = file.read_bytes(), random.Random(0)
    table = max(whole.find(b"PK\x01\x02"), 0)
    made = []
    for number in range(count):
        flipped = bytearray(whole)
        flipped[chance.randrange(table * (number % 2), len(whole))] ^= 1 << chance.randrange(8)
        made.append(bytes(flipped))
    return made


def is_whole(found: dict[str, Any], step: int) -> bool:
    expected = content(step)
    weights = all(torch.equal(value, found["state_dict"][key]) for key, value in expected["state_dict"].items())
    return weights and found["experiment"] == expected["experiment"] and found["global_step"] == step


@pytest.mark.parametrize("name", ["step-00000020.ckpt", "LATEST"])
def test_of_a_run_the_checkpoint_before_is_taken_with_a_note(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = 0
    for flipped in flips(run / "checkpoints" / name, 60):
        (run / "checkpoints" / name).write_bytes(flipped)
        found, note = load_checkpoint(run), "note: " in capsys.readouterr().err
        assert is_whole(found, 20) or (note and is_whole(found, 10))
        notes += note
    assert notes > 30


@pytest.mark.parametrize("kind", ["checkpoint", "consolidated"])
def test_a_file_is_whole_or_refused_in_one_line(kind: str, run: Path) -> None:
    file = run / "checkpoints" / "step-00000020.ckpt"
    if kind == "consolidated":
        consolidate(file, run / "all.safetensors")
        file = run / "all.safetensors"
    refused = 0
    for flipped in flips(file, 60):
        file.write_bytes(flipped)
        try:
            assert is_whole(load_checkpoint(file), 20)
        except UserError as error:
            assert len(error.lines()) == 1
            refused += 1
    assert refused > 50


def test_the_folder_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    write_rest(in_memory(content(20)), tmp_path, {})
    assert damage(tmp_path) is None
    for name in ("index.json", "rest.pt"):
        whole = (tmp_path / name).read_bytes()
        for flipped in flips(tmp_path / name, 40):
            (tmp_path / name).write_bytes(flipped)
            harmless = name == "index.json" and flipped.count(b'"crc32"') < whole.count(b'"crc32"')  # the name of its own seal
            assert damage(tmp_path) or harmless, [a for a in zip(whole, flipped, strict=True) if a[0] != a[1]]
        (tmp_path / name).write_bytes(whole)


def sharded(folder: Path) -> Path:
    """A sharded checkpoint with a file of one rank."""
    folder.mkdir()
    save_file(content(20)["state_dict"], folder / SHARD)
    entry = {"size": (folder / SHARD).stat().st_size, "crc32": checksum(folder / SHARD)}
    write_rest(in_memory(content(20)), folder, {SHARD: entry})
    return folder


@pytest.mark.parametrize("name", ["index.json", "rest.pt", SHARD])
@pytest.mark.parametrize("read", [load_checkpoint, describe, lambda folder: consolidate(folder, folder.parent / "all.safetensors")])
def test_every_reader_of_a_sharded_checkpoint_refuses_a_damaged_file(name: str, read: Any, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "step-00000020.ckpt")
    file = folder / name
    file.write_bytes(file.read_bytes().replace(b"1", b"2"))
    with pytest.raises(UserError, match="a damaged checkpoint"):
        read(folder)


def test_a_file_that_was_not_written_with_a_sharded_checkpoint_is_no_part_of_it(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "step-00000020.ckpt")
    assert damage(folder) is None
    (folder / ".DS_Store").touch()
    assert damage(folder) is None
    (folder / f"other-{SHARD}").write_bytes((folder / SHARD).read_bytes())
    assert damage(folder) == f"'other-{SHARD}' was not written with it"


def test_what_an_earlier_version_has_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "step-00000020.ckpt"
    torch.save(content(20), file)
    assert is_whole(load_checkpoint(file), 20)
    data = bytearray(file.read_bytes())
    data[data.index(content(20)["state_dict"]["w"].numpy().tobytes())] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged checkpoint \('.*' is not what was written\)"):
        load_checkpoint(file)


def test_a_checkpoint_is_looked_through_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run / "checkpoints" / "step-00000020.ckpt"
    monkeypatch.setattr(time, "time_ns", lambda: file.stat().st_mtime_ns + 10**10)  # some seconds later
    assert damage(file) is None
    monkeypatch.setattr("umm_zoo.checkpoints.folder.damage_of_archive", lambda path: "looked at again")
    assert damage(file) is None
