"""Two processes over gloo read the same shards; what they saw, put together, is what one process sees."""

import json
from pathlib import Path

import pytest
from test_shards import Recorder, data_of, fit, write_world

from data_pipelines.shards.bucketing import ByLength
from data_pipelines.shards.data import ShardSource
from data_pipelines.shards.loading import TrainingBatchSampler, ValidationBatchSampler
from data_pipelines.shards.order import ShardOrder


class Writer(Recorder):
    """Leaves what this rank saw in a file: the ranks are processes of their own."""

    def on_fit_end(self) -> None:
        path = Path(self.trainer.default_root_dir, f"rank{self.trainer.global_rank}.json")
        path.write_text(json.dumps([self.seen, self.validated]))


def run(
    world: Path, out: Path, steps: int, devices: int, accumulate: int = 1, workers: int = 0, resume: Path | None = None, **given
):
    """Keys seen in training, put together in the order of the global batches, and each rank's keys seen in validation."""
    data = data_of(world, val={"a": ShardSource(str(world))}, val_batch_size=3, num_workers=workers, **given)
    options = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto", "num_sanity_val_steps": 0}
    options |= {"val_check_interval": steps * accumulate, "check_val_every_n_epoch": None}
    fit(data, out, steps, resume, accumulate, Writer(), **options)
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(devices)]
    size = 8 // (devices * accumulate)
    parts = range(0, len(ranks[0][0]), size)
    return [key for part in parts for seen, _ in ranks for key in seen[part : part + size]], [validated for _, validated in ranks]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), [5, 9, 1, 7, 3])


@pytest.mark.processes
@pytest.mark.parametrize("bucketing", [None, ByLength([len("<image>\nWhich?7")])], ids=["plain", "buckets"])
def test_two_ranks_then_one_then_two_see_what_one_sees_straight(world, tmp_path, bucketing):
    given = {"bucketing": bucketing}
    straight, [validated] = run(world, tmp_path / "straight", 9, devices=1, **given)
    first, parts = run(world, tmp_path / "a", 3, devices=2, accumulate=2, workers=1, **given)
    second, _ = run(world, tmp_path / "b", 6, devices=1, accumulate=4, resume=tmp_path / "a/at-step=3.ckpt", **given)
    third, _ = run(world, tmp_path / "c", 9, devices=2, resume=tmp_path / "b/at-step=6.ckpt", **given)
    assert set(straight[:25]) == set(straight[25:50]) == set(validated)  # once per epoch, whose border lies within a batch
    assert first + second + third == straight
    assert sorted(parts[0] + parts[1]) == sorted(validated) and len(set(validated)) == 25  # complete, disjoint, nothing padded
    assert (len(parts[0]), len(parts[1])) == (13, 12)


def test_more_ranks_than_samples_are_refused(world):
    with pytest.raises(ValueError, match="3 samples for 4 ranks"):
        ValidationBatchSampler([2, 1], batch_size=8, num_ranks=4, rank=0)
    with pytest.raises(ValueError, match=r"found 4, which 8 ranks x 1 micro-batches"):
        TrainingBatchSampler(ShardOrder([99]), lambda: 0, batch_size=4, accumulation=1, num_ranks=8, rank=0)


def test_small_validation_sources_go_round_the_ranks():
    shares = [[place.sample for batch in ValidationBatchSampler([1, 2, 3], 2, 3, rank) for place in batch] for rank in range(3)]
    assert shares == [[0, 3], [1, 4], [2, 5]]
