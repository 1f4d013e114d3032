import json
import logging
from collections import Counter

import numpy as np
import pytest
from test_shards import fit, write_tar, write_world

from data_pipelines.shards import streaming
from data_pipelines.shards.data import ShardSource
from data_pipelines.shards.streaming import Progress, ShardStream, StreamData
from data_pipelines.transforms.image_transform import ImageTransform
from data_pipelines.transforms.resize import Square
from umm_zoo.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), [5, 9, 1, 7, 3, 4])  # 29 samples; no index


def stream(world, rank=0, ranks=1, start=Progress(), seed=0, buffer=6, stage="train") -> ShardStream:  # noqa: B008 - a tuple
    shards = [("a", str(path)) for path in sorted(world.glob("*.tar"))]
    transform = ImageTransform(8, 8, Square())
    made = ShardStream(stage, shards, {"a": ShardSource(str(world))}, transform, 4, (ranks, rank), seed, buffer, start)
    made.endless = False  # one epoch
    return made


def keys(batches) -> list[str]:
    return [key for raw in batches for key in raw.keys]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_are_disjoint_and_complete_and_no_index_is_made(world, ranks):
    shares = [keys(stream(world, rank, ranks)) for rank in range(ranks)]
    assert Counter(key for share in shares for key in share) == Counter(
        f"a/part-{shard:03d}.tar:s{number:04d}"
        for shard, numbers in enumerate(np.split(np.arange(29), np.cumsum([5, 9, 1, 7, 3])))
        for number in numbers
    )
    assert all(shares) and not list(world.glob("*.json"))


def test_epochs_and_seeds_differ_and_repeat_when_asked_again(world):
    first, second, other = (keys(stream(world, start=Progress(e), seed=s)) for e, s in ((0, 0), (1, 0), (0, 1)))
    assert sorted(first) == sorted(second) == sorted(other) and len({tuple(first), tuple(second), tuple(other)}) == 3
    assert keys(stream(world)) == first


def test_progress_counts_only_shards_that_were_delivered_whole(world):
    whole = set(keys(stream(world)))
    for cut in range(1, 8):
        batches = list(stream(world))[:cut]
        rest = keys(stream(world, start=batches[-1].progress)) if batches[-1].progress.epoch == 0 else []
        assert set(keys(batches)) | set(rest) == whole  # nothing is left out; some may come again


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_training_streams_says_so_once_and_resumes_approximately(world, tmp_path, workers, caplog):
    streaming._note_once.cache_clear()

    def data(**options):
        source = ShardSource(str(world))
        return StreamData({"a": source}, {"a": source}, image_size=8, batch_size=4, num_workers=workers, buffer=3, **options)

    with caplog.at_level(logging.WARNING):
        model = fit(data(), tmp_path, 5)
        again = fit(data(), tmp_path / "more", 8, tmp_path / "at-step=5.ckpt")
    notes = [message for message in caplog.messages if "resume is approximate" in message]
    assert len(notes) == 1 and "data_pipelines.index" in notes[0]
    assert len(model.seen) == 20 and len(again.seen) == 12
    assert len(set(model.seen)) == 20 or workers  # a worker that is through with its shards begins its next epoch
    assert len(set(model.seen) | set(again.seen)) > len(set(model.seen))  # it went on, and did not start over


def test_a_shard_cut_short_and_bad_samples_are_named_and_kill_nothing(tmp_path):
    world = write_world(tmp_path / "w", [4, 4])
    whole = (world / "part-001.tar").read_bytes()
    (world / "part-001.tar").write_bytes(whole[:3000])
    write_tar(world / "part-002.tar", {"bad": {"json": b"{"}, "none": {"0.png": b""}})
    (world / "part-003.tar").write_bytes(b"no tar at all" * 99)
    batches = list(stream(world, buffer=1))
    reasons = {f"{skip.shard[-12:]}:{skip.key}": skip.reason for raw in batches for skip in raw.skips}
    assert {"part-000.tar:s0000", "part-000.tar:s0003"} <= {key.removeprefix("a/") for key in keys(batches)}
    assert {"part-001.tar:*", "part-002.tar:bad", "part-002.tar:none", "part-003.tar:*"} <= set(reasons)
    assert "cannot be read" in reasons["part-003.tar:*"]


@pytest.mark.parametrize(
    ("change", "name"), [("seed", "seed"), ("buffer", "shuffled"), ("fewer", "sources"), ("renamed", "names of")]
)
def test_a_resume_with_another_order_of_shards_is_refused(change, name, tmp_path):
    world = write_world(tmp_path / "w", [2, 2, 2])

    def data(**options):
        return StreamData({"a": ShardSource(str(world))}, image_size=8, batch_size=2, **{"buffer": 3, **options})

    state = data().state_dict()
    data(buffer=4, num_workers=2).load_state_dict(state)
    if change == "fewer":
        (world / "part-002.tar").unlink()
    elif change == "renamed":
        (world / "part-002.tar").rename(world / "a-part.tar")
    with pytest.raises(UserError, match=f"this checkpoint was made with {name}.*the order of shards would change"):
        data(**{"seed": {"seed": 1}, "buffer": {"buffer": 1}}.get(change, {})).load_state_dict(state)


def test_a_checkpoint_of_an_earlier_version_says_no_order(world):
    StreamData({"a": ShardSource(str(world))}, image_size=8).load_state_dict({"epoch": 1, "shards": 2})


def test_more_streams_than_shards_are_refused(world):
    data = StreamData({"a": ShardSource(str(world / "part-00[01].tar"))}, image_size=8, num_workers=3)
    with pytest.raises(UserError, match="found 2 shards for 1 ranks x 3 workers"):
        data.train_dataloader()


def test_nothing_but_bad_samples_end_the_run(tmp_path):
    write_tar(tmp_path / "a.tar", {f"bad{n}": {"json": b"{"} for n in range(3)})
    data = StreamData({"a": ShardSource(str(tmp_path))}, image_size=8, batch_size=2)
    with pytest.raises(UserError, match=r"no usable sample in the 1 shards .*a\.tar:bad\d: json cannot be parsed"):
        next(iter(data.train_dataloader()))


def test_addresses_are_opened_without_a_shell(world, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **options: pytest.fail("a program was started"))
    files = fsspec.filesystem("memory")
    for path in world.glob("*.tar"):
        files.pipe(f"/stream/{path.name}", path.read_bytes())
    data = StreamData({"a": ShardSource("memory://stream/*.tar")}, image_size=8, batch_size=29)
    batch = next(iter(data.train_dataloader()))
    assert len(set(batch.keys)) == 29 and json.dumps(data.state_dict())
    with pytest.raises(ValueError, match="never run"):
        StreamData({"a": ShardSource("pipe:cat x.tar")}, image_size=8).check()
    files.rm("/stream", recursive=True)
