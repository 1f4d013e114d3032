import gc
import io
import itertools
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.tasks import Captions
from umm_zoo.batch import stacked
from umm_zoo.errors import UserError


def png(value: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes = b"x") -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for name, content in members.items():
                add(tar, f"{key}.{name}", content)


def sample(number: int, **changes: bytes) -> dict[str, bytes]:
    turns = [{"role": "user", "text": "<image>\nWhich?"}, {"role": "assistant", "text": str(number)}]
    row = {"task": "vqa", "kind": "number", "conversations": turns}
    return {"json": json.dumps(row).encode(), "0.png": png(number), **changes}


def write_world(folder: Path, sizes: list[int], first: int = 0) -> Path:
    numbers = itertools.count(first)
    for shard, size in enumerate(sizes):
        write_tar(folder / f"part-{shard:03d}.tar", {f"s{n:04d}": sample(n) for n in itertools.islice(numbers, size)})
    return folder


class Recorder(LightningModule):
    """Records the keys of what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[str] = []
        self.validated: list[str] = []
        self.steps: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen += batch.keys
        self.steps.append(self.trainer.global_step)
        return self.weight.sum() * stacked(batch.images).mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.keys

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    data: ShardData, folder: Path, steps: int, resume: Path | None = None, accumulate: int = 1, model=None, **options
) -> Recorder:
    model = model or Recorder()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saving = {"callbacks": [ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=1, save_top_k=-1)]}
    place: dict = {"default_root_dir": folder, "accelerator": "cpu", **quiet, **saving, **options}
    trainer = Trainer(max_steps=steps, accumulate_grad_batches=accumulate, **place)
    trainer.fit(model, data, ckpt_path=resume)
    return model


def data_of(folder: Path, **options) -> ShardData:
    return ShardData(**{"train": {"a": ShardSource(str(folder))}, "batch_size": 8, "window": 2, "image_size": 8, **options})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), [5, 9, 1, 7, 3])  # 25 samples, uneven


def test_batches_are_the_declared_contract(world):
    batch = next(iter(data_of(world).train_dataloader()))
    assert stacked(batch.images).shape == (8, 3, 8, 8) and batch.images[0].dtype == torch.float32
    number = int(batch.answers()[3])
    assert batch.keys[3].endswith(f"s{number:04d}") and batch.keys[3].startswith("a/part-")
    torch.testing.assert_close(batch.images_of(3)[0][0, 0, 0].item(), number / 127.5 - 1)
    assert batch.meta[3] == {"task": "vqa", "kind": "number"}


def test_every_sample_comes_once_per_epoch_although_batches_cross_its_border(world):
    loader = iter(data_of(world, batch_size=10).train_dataloader())
    keys = [key for _ in range(5) for key in next(loader).keys]  # 50 samples are two epochs
    assert len(set(keys[:25])) == 25 and set(keys[:25]) == set(keys[25:]) and keys[:25] != keys[25:]


@pytest.mark.processes
@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2), (0, 4), (1, 2)])
def test_five_steps_and_five_more_are_ten_straight(world, tmp_path, workers, accumulate):
    straight = fit(data_of(world), tmp_path / "straight", 10)
    fit(data_of(world, num_workers=1), tmp_path / "half", 5, accumulate=2)
    resumed = fit(data_of(world, num_workers=workers), tmp_path / "rest", 10, tmp_path / "half/at-step=5.ckpt", accumulate)
    assert resumed.seen == straight.seen[40:]
    assert resumed.steps == [5 + step // accumulate for step in range(5 * accumulate)]  # no step was closed early


def test_resume_from_an_earlier_step_repeats_exactly_what_followed(world, tmp_path):
    straight = fit(data_of(world), tmp_path, 7)
    resumed = fit(data_of(world), tmp_path / "again", 7, tmp_path / "at-step=3.ckpt")
    assert resumed.seen == straight.seen[24:]


def test_resume_in_the_middle_of_an_accumulated_step_does_the_whole_step_again(world, tmp_path):
    straight = fit(data_of(world), tmp_path / "straight", 6)

    class Crash(ModelCheckpoint):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 6:  # the third of four micro-batches of the second step
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    fit(data_of(world), tmp_path, 2, accumulate=4, callbacks=[Crash()])
    resumed = fit(data_of(world), tmp_path / "rest", 6, tmp_path / "mid.ckpt", accumulate=2)
    assert resumed.seen == straight.seen[8:]
    assert resumed.steps == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_checkpoint_of_other_data_is_refused(world, tmp_path):
    fit(data_of(world), tmp_path, 2)
    with pytest.raises(ValueError, match=r"made with seed 0, found 4"):
        fit(data_of(world, seed=4), tmp_path, 4, tmp_path / "at-step=1.ckpt")


def test_a_batch_that_cannot_be_shared_out_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"found 8, which 1 ranks x 3 micro-batches"):
        fit(data_of(world), tmp_path, 2, accumulate=3)


def test_validation_reads_every_sample_once_and_in_order(world, tmp_path):
    other = write_world(tmp_path / "other", [3, 2], first=100)
    val = {"a": ShardSource(str(world)), "b": ShardSource(str(other / "*.tar"))}
    options = {"num_sanity_val_steps": 0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    model = fit(data_of(world, val=val, val_batch_size=4), tmp_path, 1, **options)
    assert [key.split(":")[1] for key in model.validated] == [f"s{n:04d}" for n in [*range(25), *range(100, 105)]]


def test_captioned_shards_of_others_become_conversations(tmp_path):
    write_tar(tmp_path / "x.tar", {"0001": {"jpg": png(7), "txt": b"A red square."}})
    data = ShardData(train={"c": ShardSource(str(tmp_path / "x.tar"), Captions(["Say what you see."]))}, batch_size=1, image_size=8)
    batch = next(iter(data.train_dataloader()))
    assert batch.conversations[0][0]["text"] == "<image>\nSay what you see." and batch.answers() == ["A red square."]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("nothing/*.tar", r"nothing/\*\.tar: no shard"),
        ("missing-{00..01}.tar", r"missing-00\.tar: no shard"),
        ("empty.tar", r"empty\.tar: this shard is an empty file"),
        ("none.tar", r"none\.tar: this shard holds no sample"),
        ("text.tar", r"text\.tar: "),
        ("cut.tar", r"cut\.tar: cut short"),
        ("stale.tar", r"its index was made for \d+.*data_pipelines.index"),
        (["stale.tar", "stale.tar"], r"named twice"),
    ],
)
def test_broken_shards_are_one_clear_line(tmp_path, monkeypatch, shards, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.tar").touch()
    write_tar(Path("none.tar"), {})
    Path("text.tar").write_text("no tar at all" * 100)
    write_tar(Path("stale.tar"), {"a": {"json": b"{}"}})
    content = Path("stale.tar").read_bytes()
    data_of(Path("stale.tar")).check()
    write_tar(Path("cut.tar"), {"a": {"0.png": np.random.default_rng(0).bytes(9000)}})
    Path("cut.tar").write_bytes(Path("cut.tar").read_bytes()[:4000])
    Path("stale.tar").write_bytes(content + bytes(10240))
    with pytest.raises(UserError, match=message) as caught:
        ShardData(train={"a": ShardSource(shards)}, image_size=8).check()
    assert "\n" not in str(caught.value)


@pytest.mark.processes
def test_workers_of_a_loader_that_is_garbage_end_at_once(world):
    loader = data_of(world, num_workers=1).train_dataloader()
    batches = iter(loader)
    next(batches)
    cycle = [loader, batches]
    cycle.append(cycle)
    del loader, batches, cycle
    began = time.monotonic()
    gc.collect()
    assert time.monotonic() - began < 4  # told, they take hundredths of a second; they look for an end by themselves after five
