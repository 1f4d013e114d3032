"""Buffers of shared memory are used again; no batch may see another's images."""

import time

import pytest
import torch
from test_shards import write_world

from data_pipelines.shards.data import ShardData, ShardSource
from umm_zoo.batch import stacked

pytestmark = pytest.mark.processes


def first_batches(folder, workers: int, count: int, pause: float):
    data = ShardData({"a": ShardSource(f"{folder}/*.tar")}, image_size=8, batch_size=3, num_workers=workers)
    batches = iter(data.train_dataloader())
    kept = []
    for _ in range(count):
        kept.append(next(batches))
        time.sleep(pause)  # workers run as far ahead as they are let
    return kept


@pytest.mark.parametrize("workers", [1, 2])
def test_images_of_workers_that_run_ahead_are_those_of_no_worker(tmp_path, workers):
    folder = write_world(tmp_path / "world", [25, 16])
    plain, ahead = first_batches(folder, 0, 14, 0.0), first_batches(folder, workers, 14, 0.05)
    assert [batch.keys for batch in ahead] == [batch.keys for batch in plain]
    assert torch.equal(
        torch.stack([stacked(batch.images) for batch in ahead]), torch.stack([stacked(batch.images) for batch in plain])
    )


def test_each_image_is_its_own_key_s(tmp_path):
    for batch in first_batches(write_world(tmp_path / "world", [25, 16]), 2, 14, 0.02):
        numbers = [int(conversation[-1]["text"]) for conversation in batch.conversations]
        assert ((stacked(batch.images)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == numbers


@pytest.mark.parametrize("ahead", [1, 2])
def test_packed_images_outlast_the_batches_that_a_trainer_takes_ahead(tmp_path, ahead):
    folder = write_world(tmp_path / "world", [25, 16])
    data = ShardData({"a": ShardSource(f"{folder}/*.tar")}, image_size=8, batch_size=3, num_workers=1)
    loader = data.train_dataloader()
    loader.packed = True
    raw_batches = iter(loader)
    waiting, unpacked = [next(raw_batches) for _ in range(ahead)], []
    for _ in range(14):
        waiting.append(next(raw_batches))
        time.sleep(0.05)
        unpacked.append(waiting.pop(0).batch())
    plain = first_batches(folder, 0, 14, 0.0)
    assert torch.equal(
        torch.stack([stacked(batch.images) for batch in unpacked]), torch.stack([stacked(batch.images) for batch in plain])
    )


def test_a_loader_that_begins_again_is_sent_its_buffers_again(tmp_path):
    folder = write_world(tmp_path / "world", [25, 16])
    data = ShardData({}, val={"a": ShardSource(f"{folder}/*.tar")}, image_size=8, val_batch_size=3, num_workers=2)
    data.setup("validate")
    loader, firsts = data.val_dataloader(), []
    for _ in range(3):  # what the workers that stay had ready is thrown away each time
        batches = iter(loader)
        firsts.append(torch.stack([stacked(next(batches).images) for _ in range(3)]))
    whole = [stacked(batch.images) for batch in loader]
    assert all(torch.equal(first, firsts[0]) for first in firsts) and torch.equal(torch.stack(whole[:3]), firsts[0])
    assert sum(len(images) for images in whole) == 41
