"""Stored outputs of frozen parts: a changed byte is refused, what an earlier version has stored is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_shards import png, write_tar

from data_pipelines.decoding import decode_array
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.index import load_index
from data_pipelines.shards.stored import StoredOutputs, is_intact
from data_pipelines.shards.storing import _npy
from umm_zoo.errors import UserError

VALUES = torch.arange(30.0).view(2, 3, 5)


def stored(folder: Path, content: bytes) -> torch.Tensor:
    write_tar(folder / "images.tar", {"k": {"png": png(5)}})
    write_tar(folder / "side.tar", {"k": {"latents.npy": content}})
    index = load_index(str(folder / "images.tar"))
    outputs = StoredOutputs("latents", {index.path: folder / "side.tar"})
    return outputs.read(RangeReader(), index, 0)["latents"]


@pytest.mark.parametrize("half", [False, True])
def test_an_array_with_its_checksum_is_read_as_any_other(half: bool, tmp_path: Path) -> None:
    content = _npy(VALUES, half)
    assert torch.equal(stored(tmp_path, content).float(), VALUES) and torch.equal(decode_array(content).float(), VALUES)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    content = bytearray(_npy(VALUES, False))
    for number, place in enumerate((0, 10, 100, len(content) - 30, len(content) - 1)):
        flipped = bytearray(content)
        flipped[place] ^= 4
        (tmp_path / str(number)).mkdir()
        with pytest.raises(UserError, match=r"side\.tar: 'latents\.npy' of 'k' is not what was stored; remove the file"):
            stored(tmp_path / str(number), bytes(flipped))


def test_what_an_earlier_version_has_stored_is_read(tmp_path: Path) -> None:
    content = _npy(VALUES, False)[:-9]
    assert is_intact(content) and torch.equal(stored(tmp_path, content), VALUES)
