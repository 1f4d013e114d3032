"""What a method has prepared in the loader's workers, and batches in memory that CUDA reads by itself."""

import os
import pickle

import pytest
import torch
from test_shards import data_of, fit, write_world
from transformers import PreTrainedTokenizerBase

from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.buffers import PackedImages
from data_pipelines.shards.data import ShardSource
from data_pipelines.shards.streaming import StreamData
from tests.backbones.vlm_parts import llava
from umm_zoo.backbones.preparation import Preparation, Prepared, Prepares
from umm_zoo.backbones.processed_images import ProcessedImages, waiting
from umm_zoo.conversation import Task
from umm_zoo.methods.llava import LLaVA


class Learner(LLaVA):
    """A tiny LLaVA that keeps its losses."""

    def __init__(self) -> None:
        super().__init__(llava())
        self.train_only(["projector"])
        self.losses = []

    def training_losses(self, batch):
        losses = super().training_losses(batch)
        self.losses.append(losses["loss"].item())
        return losses

    def configure_optimizers(self):
        return torch.optim.SGD(self.vlm.projector.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), [5, 9, 1, 7, 3])


@pytest.fixture
def calls(monkeypatch):
    """Texts that this process tokenises."""
    seen, call = [], PreTrainedTokenizerBase.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "__call__", lambda own, texts, **options: seen.append(texts) or call(own, texts, **options)
    )
    return seen


@pytest.mark.processes
def test_workers_tokenise_for_the_step_and_change_no_loss(world, tmp_path, calls, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    options = {"val": {"a": ShardSource(str(world))}, "val_batch_size": 9, "image_size": 12}
    alone = fit(data_of(world, **options), tmp_path / "0", 3, model=Learner(), limit_val_batches=0)
    assert len(calls) == 4  # one of each batch; the trainer takes one ahead
    calls.clear()
    helped = fit(data_of(world, num_workers=1, **options), tmp_path / "1", 3, model=Learner(), val_check_interval=3)
    assert helped.losses == alone.losses and not calls
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_a_stream_is_prepared_too(world, tmp_path, calls):
    model = fit(StreamData({"a": ShardSource(str(world))}, image_size=12, batch_size=5), tmp_path, 2, model=Learner())
    assert len(model.losses) == 2 and len(calls) == 3 and len(calls[0]) == 5


def test_a_preparation_holds_no_weights(world):
    method = Learner()
    prepare = method.preparation(scoring=False)
    assert isinstance(method, Prepares) and len(pickle.dumps(prepare)) < 250_000  # the tokenizer
    again: Preparation = pickle.loads(pickle.dumps(prepare))
    raw = next(iter(data_of(world, image_size=12).train_dataloader()))
    there, here = again(raw, []), prepare(raw, [])
    assert there.rows.keys() == here.rows.keys() and len(there.rows) == 8
    assert all((there.rows[key].ids == here.rows[key].ids).all() for key in here.rows)


def test_what_cannot_be_prepared_is_left_to_the_step(world, tmp_path, calls):
    method = Learner()
    prepare = method.preparation(scoring=False)
    prepare.asked = None  # calling it fails, as a template of a user's own may
    method.preparation = lambda scoring: prepare
    assert len(fit(data_of(world, image_size=12), tmp_path, 2, model=method).losses) == 2 and len(calls) >= 2


def raw_of(counts):
    """Rows with so many images of one pixel, each with what an image processor has made of them: the number of the row."""
    of_rows = [{"pixels": torch.full((count, 2), float(row)), "sizes": torch.tensor([row])} for row, count in enumerate(counts)]
    processed = ProcessedImages.of([made for made, count in zip(of_rows, counts, strict=True) if count])
    packed = PackedImages(torch.zeros(3 * sum(counts), dtype=torch.uint8), [(1, 1)] * sum(counts))
    every = {"conversations": [], "meta": {}, "tasks": Task.QUESTION, "has_target": False, "crops": None, "rows": None}
    rows = {name: [value] * len(counts) for name, value in every.items()}
    keys = [f"row {row}" for row in range(len(counts))]
    return RawBatch(keys=keys, **rows, image_counts=list(counts), images=packed, prepared=Prepared(images=processed))


def test_processed_images_are_found_by_the_images_of_a_row_alone():
    batch = raw_of([1, 0, 2, 3]).without({0}).batch()
    found = [waiting(batch.images_of(row)) for row in (1, 2)]
    assert [own["pixels"].tolist() for own in found] == [[[2.0, 2.0]] * 2, [[3.0, 3.0]] * 3]
    assert [own["sizes"].item() for own in found] == [2, 3]
    changed = [batch.images_of(1)[0], batch.images_of(1)[1].clone()]
    assert waiting(changed) is None and waiting(batch.images_of(1)[:1]) is None


def test_a_batch_for_cuda_lies_in_pinned_memory_and_is_not_waited_for(world, tmp_path, monkeypatch):
    pinned, moved, to = [], [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda own: pinned.append(own.shape) or own.clone())
    data = data_of(world, image_size=12)
    data._pinned = lambda: True
    fit(data, tmp_path, 2, model=Learner())
    assert pinned[:2] == [(8 * 3 * 12 * 12,)] * 2
    raw = raw_of([1, 0, 2])
    monkeypatch.setattr(torch.Tensor, "to", lambda own, *place, **options: moved.append((place[0], options)) or to(own, "cpu"))
    for batch in (raw, raw.batch()):
        batch.to("cuda")
        batch.to("cpu")
    waits = [(place, options["non_blocking"]) for place, options in moved if "non_blocking" in options]
    assert waits == [*[("cuda", True)] * 2, *[("cpu", False)] * 2, ("cuda", True), ("cpu", False)]
