import multiprocessing
import time

import pytest
import torch

from tools.benchmark_loader import make_shards, measure, ours, plain, summary


def test_both_loaders_end_in_the_same_images(tmp_path):
    paths = make_shards(tmp_path, samples=12, edges=[40], shards=3)
    mine, theirs = (next(loader(paths, 32, 12, 0)) for loader in (ours, plain))
    assert mine.shape == theirs.shape == (12, 32, 32, 3) and mine.dtype == theirs.dtype == torch.uint8
    order = [sorted(range(12), key=lambda row, images=images: images[row].sum().item()) for images in (mine, theirs)]
    assert mine[order[0]].equal(theirs[order[1]])


def test_buckets_of_unequal_images_hold_the_same_pixels_whoever_loads(tmp_path):
    paths = make_shards(tmp_path, samples=24, edges=[30, 60], shards=2)
    mine, theirs = (torch.cat([next(batches).flatten() for _ in range(4)]) for batches in (
        loader(paths, 32, 6, 0, buckets=True) for loader in (ours, plain)
    ))  # fmt: skip
    assert len(next(ours(paths, 32, 6, 0, buckets=True)).shape) in (1, 4)
    assert mine.sort().values.equal(theirs.sort().values) and 24 * 0.8 * 32 * 32 * 3 < len(mine) <= 24 * 32 * 32 * 3


def test_ratios_are_medians_of_the_rounds(monkeypatch):
    rates = {"pil 1 workers": [10.0, 20.0, 30.0], "ours 1 workers": [9.0, 19.0, 60.0], "webdataset 1 workers": [9.0, 38.0, 30.0]}
    rates["files 1 workers"] = [10.0, 10.0, 60.0]
    report = summary(rates, batch_size=4, workers=[1])
    assert report["images_per_second"]["pil 1 workers"] == 80.0
    assert report["ours_to_files"]["1"] == 1.0
    assert (report["ours_to_pil"]["1"], report["ours_to_webdataset"]["1"], report["webdataset_to_pil"]["1"]) == (0.95, 1.0, 1.0)


def test_what_workers_have_ready_is_not_timed():
    taken: dict[str, list[int]] = {"pil 0 workers": [], "ours 2 workers": []}

    def stream(name):
        taken[name].append(0)
        while True:
            taken[name][-1] += 1
            yield None

    rates = measure({name: lambda name=name: stream(name) for name in taken}, rounds=2, batches=3)
    assert taken == {"pil 0 workers": [1 + 6 + 3] * 2, "ours 2 workers": [1 + 2 * 6 + 2 * 3] * 2}  # six buffers to a worker
    assert all(len(found) == 2 for clock in rates.values() for found in clock.values())


def spin(count, seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return count


@pytest.mark.processes
def test_the_processor_time_of_workers_is_told_from_that_of_the_main_process():
    def stream():
        with multiprocessing.get_context("fork").Pool(1) as pool:
            while True:
                pool.apply(spin, (0, 0.06))
                spin(0, 0.02)
                yield None

    rates = measure({"ours 1 workers": stream}, rounds=1, batches=3)
    [worker], [everything] = rates["per_process"]["ours 1 workers"], rates["all"]["ours 1 workers"]
    assert 1 / worker == pytest.approx(0.06, rel=0.25) and 1 / everything == pytest.approx(0.08, rel=0.25)
