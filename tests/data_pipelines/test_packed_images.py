"""Images of unequal sizes on their way from a worker to a batch, packed in one buffer."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_shards import write_tar
from torch.nn.functional import avg_pool2d

from data_pipelines.decoding import decode_image
from data_pipelines.generation_tasks import Reconstruction
from data_pipelines.precompute import parser
from data_pipelines.shards.batches import RawBatch, RawBatchBuilder, to_signals
from data_pipelines.shards.buffers import ImageBuffers, PackedImages
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.reading import BatchRequest, SamplePosition, SampleReader
from data_pipelines.shards.stored import stored_items
from data_pipelines.shards.storing import _store
from data_pipelines.tasks import Conversations, SampleTask
from data_pipelines.transforms.image_transform import ImageTransform
from data_pipelines.transforms.resize import Resize, Square, Squeeze
from data_pipelines.transforms.shaped import Bucket, Native
from data_pipelines.transforms.tiles import Tiles
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.batch import Batch, Task, stacked
from umm_zoo.errors import UserError

SIZES = [(3, 5), (3, 5), (7, 2), (1, 1), (3, 5), (40, 30), (2, 7)]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def filled(images: list[np.ndarray], capacity: int = 2) -> ImageBuffers:
    buffers = ImageBuffers()
    buffers.start(capacity)
    for image in images:
        buffers.put(image)
    return buffers


def bytes_of(packed: PackedImages | None) -> list[bytes]:
    return [] if packed is None else [image.numpy().tobytes() for run in packed.runs() for image in run]


def test_a_buffer_grows_with_images_of_any_sizes_and_keeps_each():
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    packed = filled(images).images()
    assert bytes_of(packed) == [image.tobytes() for image in images] and packed.sizes == SIZES
    assert [tuple(run.shape[:3]) for run in packed.runs()] == [(2, 3, 5), (1, 7, 2), (1, 1, 1), (1, 3, 5), (1, 40, 30), (1, 2, 7)]


@pytest.mark.parametrize("kept", range(len(SIZES) + 1))
def test_images_of_a_bad_sample_make_room_for_the_next(kept):
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    buffers = filled(images)
    buffers.drop_to(kept)
    buffers.put(noise(4, 6))
    assert bytes_of(buffers.images()) == [image.tobytes() for image in [*images[:kept], noise(4, 6)]]


def test_floats_of_unequal_images_are_each_image_s_own_in_one_piece_of_memory():
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    signals = to_signals(filled(images).images())
    for image, signal in zip(images, signals, strict=True):
        assert torch.equal(signal, (torch.from_numpy(image).permute(2, 0, 1).float() - 127.5) / 127.5)
    assert len({signal.untyped_storage().data_ptr() for signal in signals}) == 1


def sample(sizes: list[tuple[int, int]], target: tuple[int, int] | None = None) -> dict[str, bytes]:
    turns = [{"role": "user", "text": "First <image>, then <image>."[: 14 if len(sizes) == 1 else None] if sizes else "Draw."}]
    turns += [{"role": "assistant", "text": "Yes <image>."}]
    members = {"json": json.dumps({"conversations": turns}).encode()}
    named = {f"{place}.png": size for place, size in enumerate(sizes)} | ({"target.png": target} if target else {})
    for name, size in named.items():
        file = io.BytesIO()
        Image.fromarray(noise(*size)).save(file, "PNG")
        members[name] = file.getvalue()
    return members


def built(
    samples: list[dict[str, bytes]], resize: Resize, target: Resize | None = None, task: SampleTask | None = None
) -> RawBatch:
    builder = RawBatchBuilder(ImageTransform(32, 32, resize, target))
    builder.start(len(samples))
    for number, members in enumerate(samples):
        builder.add(Skip("train", "a", "a.tar", f"s{number}", "", number), task or Conversations(), members)
    return builder.build([])


def test_an_image_that_is_shown_and_asked_for_in_one_way_is_one_tensor():
    samples = [sample([(20, 90)]), sample([(50, 50)])]
    one, apart = (built(samples, Square(), target, Reconstruction()) for target in (Square(), Squeeze()))
    batch, moved, others = one.batch(), one.without({0}).batch().to("cpu"), apart.batch()
    assert all(own is shown for own, shown in zip(batch.targets, batch.images, strict=True))
    assert moved.targets[0] is moved.images[0] and torch.equal(moved.images[0], batch.images[1])
    assert not any(own is shown for own, shown in zip(others.targets, others.images, strict=True))


def test_tiles_are_images_of_the_row_with_a_marker_each_and_the_task_is_that_of_the_sample():
    raw = built([sample([(20, 90), (50, 50)]), sample([(90, 20)])], Tiles())
    assert raw.image_counts == [4 + 5, 4] and raw.tasks == [Task.QUESTION] * 2
    assert raw.conversations[0][0]["text"] == "First <image><image><image><image>, then <image><image><image><image><image>."
    assert raw.conversations[0][1]["text"] == "Yes <image>."  # an answer's is none
    batch = raw.batch()
    overview = decode_image(sample([(50, 50)])["0.png"], 32, Tiles())
    assert torch.equal(batch.images_of(0)[4], (torch.tensor(overview).permute(2, 0, 1) - 127.5) / 127.5)
    edit = built([sample([(20, 90)], target=(9, 9))], Tiles(), Square())
    assert edit.tasks == [Task.EDIT] and edit.image_counts == [4]


def test_an_image_to_generate_in_tiles_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^data\.target_resize: found Tiles, which makes several images of one, expected a policy"):
        built([sample([], target=(9, 9))], Tiles())


def test_what_was_cut_away_goes_with_the_row_of_its_image():
    raw = built([sample([(9, 9)]), sample([], (64, 128)), sample([(9, 9)], (128, 64)), sample([], (32, 32))], Square(), Bucket(8))
    assert [crop and crop.original for crop in raw.crops] == [None, (64, 128), (128, 64), (32, 32)]
    for batch in (raw.without({0, 1}).batch(), raw.batch().select([2, 3])):
        assert batch.crops[0].kept == tuple(batch.targets[0].shape[1:]) and batch.crops[1].lost == 0
    assert Batch(["a", "b"], [[], []]).crops == [None, None]


@pytest.mark.processes
@pytest.mark.parametrize("policy", [Bucket(8), Native(patch=7), Tiles()])
def test_unequal_images_of_workers_are_those_of_no_worker(tmp_path, policy):
    rng = np.random.default_rng(0)
    samples = {f"s{n:03d}": sample([tuple(map(int, rng.integers(5, 90, 2)))], (n + 4, 20)) for n in range(23)}
    write_tar(tmp_path / "a.tar", samples)
    batches = []
    for workers in (0, 2):
        data = ShardData(
            {"a": ShardSource(str(tmp_path))},
            image_size=32,
            batch_size=4,
            num_workers=workers,
            resize=policy,
            target_resize=Bucket(8),
        )
        stream = iter(data.train_dataloader())
        batches.append([next(stream) for _ in range(17)])
    for plain, other in zip(*batches, strict=True):
        assert plain.keys == other.keys and plain.crops == other.crops and plain.image_counts == other.image_counts
        for one, two in zip([*plain.images, *plain.requested], [*other.images, *other.requested], strict=True):
            assert torch.equal(one, two)


def test_stored_outputs_of_unequal_images_come_back_entry_by_entry(tmp_path):
    sizes = [(40, 20), (20, 40), (30, 30), (40, 22), (30, 31)]
    write_tar(tmp_path / "a.tar", {f"s{n}": sample([], size) for n, size in enumerate(sizes)})
    data = ShardData(
        {"a": ShardSource(str(tmp_path))}, image_size=32, batch_size=5, window=0, target_resize=Bucket(8), precomputed="ignore"
    )
    item = Precomputable(torch.nn.Linear(1, 1), lambda batch: avg_pool2d(stacked(batch.requested), 4), "target")
    given = parser().parse_args(["x.yaml", "--batch-size", "3"])
    _store("latents", item, data, given)
    sources = data.open("train")
    stored = stored_items({"latents": item}, data.transform, sources[0].indexes, None)
    reader = SampleReader("train", sources, data.transform, True, None, stored)
    raw = reader[BatchRequest([SamplePosition(n, n) for n in range(5)])].without({1})
    batch = raw.batch()
    assert len({tuple(value.shape) for value in batch.extras["latents"]}) > 1
    for rows in ([0, 1, 2, 3], [3, 0]):
        chosen = batch.select(rows)
        for target, value in zip(chosen.requested, chosen.extras["latents"], strict=True):
            torch.testing.assert_close(avg_pool2d(target, 4), value)
    alike = reader[BatchRequest([SamplePosition(n, n) for n in (0, 3)])].batch()
    assert isinstance(alike.extras["latents"], torch.Tensor)
