"""Rows that ask for an image beside rows that do not, in one batch: each keeps its own, and not every method takes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_refused_rows import Choosy
from test_shards import fit, png, sample, write_tar

from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.buffers import PackedImages
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.reading import BatchRequest, SamplePosition
from data_pipelines.shards.streaming import StreamData
from umm_zoo.batch import Batch, Task, image_of_each_row
from umm_zoo.errors import UserError
from umm_zoo.outputs import Outputs

#: Rows 1, 2 and 5 of six ask for an image; rows 0, 3 and 5 have 1, 2 and 1 input images.
TARGETS, COUNTS = (1, 2, 5), (1, 0, 0, 2, 0, 1)


def shade(value: float, size: int = 4) -> torch.Tensor:
    return torch.full((3, size, size), value)


def mixed() -> Batch:
    """Row r: input images of shade r and r + .5, target of shade -r, codes r and latents of its images."""
    images = [shade(row / 10 + place / 20, 4 + row) for row, count in enumerate(COUNTS) for place in range(count)]
    return Batch(
        keys=[f"row{row}" for row in range(6)],
        conversations=[[{"role": "user", "text": "<image>" * count + "Go."}] for count in COUNTS],
        images=images,
        image_counts=list(COUNTS),
        targets=[shade(-row / 10, 8 + row) if row in TARGETS else None for row in range(6)],
        extras={"codes": torch.tensor([[1], [2], [5]]), "seen": torch.tensor([0.0, 3.0, 3.5, 5.0]), "own": torch.arange(6)}
        | {"uneven": [torch.full((1, row + 1), row) for row in range(6)]},
        entries={"codes": [int(row in TARGETS) for row in range(6)], "seen": list(COUNTS)},
    )


def check_rows_are_their_own(batch: Batch, rows: list[int]) -> None:
    assert batch.keys == [f"row{row}" for row in rows] and batch.has_target == [row in TARGETS for row in rows]
    for place, row in enumerate(rows):
        assert [float(image.mean()) for image in batch.images_of(place)] == pytest.approx(
            [row / 10 + n / 20 for n in range(COUNTS[row])]
        )
        target = batch.target_of(place)
        assert (target is None) == (row not in TARGETS)
        assert target is None or torch.equal(target, shade(-row / 10, 8 + row))
    assert batch.extras["codes"].flatten().tolist() == [row for row in rows if row in TARGETS]
    assert batch.extras["seen"].tolist() == [row + place / 2 for row in rows for place in range(COUNTS[row])]
    assert batch.extras["own"].tolist() == rows
    assert [value.tolist() for value in batch.extras["uneven"]] == [[[row] * (row + 1)] for row in rows]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [5, 0, 3], [2, 1], [4, 3, 0], [4], []])
def test_chosen_rows_keep_images_targets_and_what_was_computed_of_either(rows: list[int]) -> None:
    check_rows_are_their_own(mixed().select(rows), rows)


def test_every_row_asks_for_what_it_has() -> None:
    assert mixed().tasks == [Task.QUESTION, Task.TEXT_TO_IMAGE, Task.TEXT_TO_IMAGE, Task.QUESTION, Task.QUESTION, Task.EDIT]
    moved = mixed().to("meta")
    assert [image.shape for image in moved.requested] == [
        (3, 8 + row, 8 + row) for row in TARGETS
    ] and moved.has_target == mixed().has_target


def test_the_image_of_a_row_is_shown_or_asked_for() -> None:
    batch = mixed().select([0, 3, 5])
    assert [float(image.mean()) for image in image_of_each_row(batch)] == pytest.approx([0.0, 0.3, 0.5])
    batch = mixed().select([2, 1])
    assert [float(image.mean()) for image in image_of_each_row(batch)] == pytest.approx([-0.2, -0.1])
    with pytest.raises(UserError, match="row4: found no image, expected an image or a target"):
        image_of_each_row(mixed().select([2, 4]))


def test_targets_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Batch\.targets has 3 rows, Batch.keys has 6"):
        Batch(mixed().keys, [[]] * 6, targets=torch.zeros(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"Batch\.targets must be floating \[3, H, W\] each, found torch\.uint8 \[3, 4, 4\]"):
        Batch(["a", "b"], [[], []], targets=[None, shade(1).byte()])


def packed(images: list[torch.Tensor]) -> PackedImages:
    return PackedImages(torch.cat([image.permute(1, 2, 0).flatten() for image in images]), [image.shape[1:] for image in images])


@pytest.mark.parametrize("refused", [{0}, {1, 3}, {0, 3, 4}, {1, 2, 5}, {0, 1, 2, 3, 5}])
def test_refused_rows_take_with_them_what_is_theirs_alone(refused: set[int]) -> None:
    whole = mixed()
    content = {name: getattr(whole, name) for name in ("keys", "conversations", "image_counts", "meta", "tasks", "has_target")}
    content |= {"extras": whole.extras, "entries": whole.entries}
    pixels = {"images": packed(whole.images), "targets": packed(whole.requested)}
    raw = RawBatch(**content, **pixels, rows=[Skip("train", "a", "a", key, "", -1) for key in whole.keys])
    left = raw.without(refused)
    found = {name: getattr(left, name) for name in content if name != "has_target"}
    both = (left.images, left.targets)
    images, targets = ([] if own is None else [image for run in own.runs() for image in run.permute(0, 3, 1, 2)] for own in both)
    found |= {"images": images, "targets": [targets.pop(0) if there else None for there in left.has_target]}
    check_rows_are_their_own(Batch(**found), [row for row in range(6) if row not in refused])


# -- from shards ------------------------------------------------------------------------------------------------------------


def asking(number: int) -> dict[str, bytes]:
    """Sample that asks for an image of shade ``number``."""
    row = {"conversations": [{"role": "user", "text": f"Number {number}."}, {"role": "assistant", "text": "1"}]}
    return {"json": json.dumps(row).encode(), "target.png": png(number)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Questions 1 to 9, requests 11 to 19, and a folder of both."""
    folder = tmp_path_factory.mktemp("kinds")
    tell, draw = ({f"s{n:04d}": make(n) for n in range(first, first + 9)} for first, make in ((1, sample), (11, asking)))
    write_tar(folder / "tell/a.tar", tell)
    write_tar(folder / "draw/a.tar", draw)
    write_tar(folder / "both/a.tar", {key: one for pair in zip(tell.items(), draw.items(), strict=True) for key, one in pair})
    return {name: str(folder / name) for name in ("tell", "draw", "both")}


def of_sources(sources: dict[str, str], *names: str, **more: object) -> ShardData:
    return ShardData({name: ShardSource(sources[name]) for name in names}, image_size=8, batch_size=6, **more)  # type: ignore[arg-type]


def check_numbers(batch: Batch) -> None:
    for row, key in enumerate(batch.keys):
        number = int(key.rpartition(":s")[2])
        image = batch.target_of(row) if number > 10 else batch.images_of(row)[0]
        assert batch.has_target[row] == (number > 10) and len(batch.images_of(row)) == (number < 10)
        assert round(float((image[0, 0, 0] + 1) * 127.5)) == number  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_a_loader_mixes_sources_and_each_row_has_its_own(sources: dict[str, str], workers: int) -> None:
    batches = iter(of_sources(sources, "tell", "draw", num_workers=workers).train_dataloader())
    found = [next(batches) for _ in range(9)]
    assert any(len(set(batch.has_target)) == 2 for batch in found)
    for batch in found:
        check_numbers(batch)


def test_a_stream_mixes_them_too(sources: dict[str, str]) -> None:
    data = StreamData({"both": ShardSource(sources["both"])}, image_size=8, batch_size=6)
    batch = next(iter(data.train_dataloader()))
    assert len(set(batch.has_target)) == 2
    check_numbers(batch)


class Greedy(Choosy):
    """Takes rows of both kinds, and no answer that is a multiple of 4."""

    takes_mixed = True

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        assert not (scoring and len(set(batch.has_target)) == 2)
        for row, answer in enumerate(batch.answers()):
            if int(answer) % 4 == 0:
                raise UserError("", "a four", "none", row=row)

    def training_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        check_numbers(batch)
        self.seen += batch.keys
        return {"loss": self.layer.weight.sum()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        assert len(set(batch.has_target)) == 1
        check_numbers(batch)
        return super().validation_step(batch, batch_idx)


REFUSAL = r"data: \w+/a.tar:s001\d has an image to generate, \w+/a.tar:s000\d of the same batch has none; "


@pytest.mark.parametrize("names", [("tell", "draw"), ("both",)])
def test_a_method_that_takes_no_mixed_batch_refuses_it_in_one_line(
    sources: dict[str, str], names: tuple[str, ...], tmp_path
) -> None:
    with pytest.raises(UserError, match=REFUSAL + r"sources of both kinds cannot be mixed in one run \(train them in turn"):
        fit(of_sources(sources, *names), tmp_path, 3, model=Choosy(1000))


def test_a_method_that_takes_them_is_trained_on_all_but_those_it_refuses(sources: dict[str, str], tmp_path) -> None:
    method = fit(of_sources(sources, "tell", "draw"), tmp_path, 3, model=Greedy())
    assert sorted(key.rpartition(":")[2] for key in method.seen) == [
        f"s{n:04d}" for n in (*range(1, 10), *range(11, 20)) if n not in (4, 8)
    ]


def test_batches_of_a_validation_are_of_one_kind(sources: dict[str, str], tmp_path) -> None:
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    val = {name: ShardSource(sources[name]) for name in ("tell", "draw")}
    method = fit(of_sources(sources, "tell", val=val, val_batch_size=4), tmp_path, 1, model=Greedy(), **options)
    assert len(method.validated) == 9 - 2 + 9
    val = {"both": ShardSource(sources["both"])}
    with pytest.raises(UserError, match=REFUSAL + "give each kind a source of its own in data.val"):
        fit(of_sources(sources, "tell", val=val), tmp_path / "other", 1, model=Greedy(), **options)


def test_what_is_stored_for_targets_comes_back_with_their_rows(sources: dict[str, str]) -> None:
    """A sample without a target has stored no entry."""
    data = of_sources(sources, "both")
    reader = data.reader("train")

    class Stored:
        def read(self, files: object, index: object, number: int) -> dict[str, torch.Tensor]:
            value = number // 2 + 11
            return {"codes": torch.full((number % 2, 2, 1), value), "own": torch.full((1, 3), number)}

    reader._stored = [Stored()]  # type: ignore[list-item]
    batch = reader[BatchRequest([SamplePosition(n, n) for n in range(5)])].batch()
    assert batch.has_target == [False, True, False, True, False] and batch.entries == {"codes": [0, 1, 0, 1, 0]}
    assert batch.extras["codes"].tolist() == [[[11], [11]], [[12], [12]]] and batch.extras["own"].shape == (5, 3)
    alone = reader[BatchRequest([SamplePosition(0, 0)])].batch()
    assert alone.extras["codes"].shape == (0, 2, 1) and not np.any(alone.has_target)
