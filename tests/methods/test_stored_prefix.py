"""Prompts in words alone may be read once, stored beside the shards, and need not be read in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bridge_parts import VLM, tiny_vlm, wemmu

from data_pipelines import precompute
from data_pipelines.generation_tasks import Unconditional
from data_pipelines.shapes import main as write_shapes
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.reading import Slot
from data_pipelines.shards.stored import find_stored
from data_pipelines.tasks import Editing, TextToImage
from umm_zoo.backbones.prefix import Prefix
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Batch, Turn
from umm_zoo.fit import main as fit
from umm_zoo.methods.stored_prefix import PREFIX, prefix_with_stored, stored_prefixes, to_store

TEXTS = ["a circle", "a red circle above a small blue square", "two squares"]


def inputs(vlm, texts: list[str], images: torch.Tensor | None = None, counts: list[int] | None = None):
    prompts = [[Turn(role="user", text=text)] for text in texts]
    return vlm.embed(prompts, images, counts or [0] * len(texts), for_generation=True)


def kept(prefix: Prefix, row: int) -> torch.Tensor:
    """Keys and values of the real tokens of a row, all layers."""
    real = prefix.attention_mask[row]
    return torch.stack([part[row][:, real] for layer in prefix.cache.layers for part in (layer.keys, layer.values)])


class Counting:
    """How many rows the model really read."""

    def __init__(self, vlm, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows, read = 0, vlm.prefix
        monkeypatch.setattr(vlm, "prefix", lambda given: (setattr(self, "rows", self.rows + len(given.token_ids)), read(given))[1])


def test_a_stored_prefix_is_the_one_that_would_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_vlm()
    entries = to_store(vlm, inputs(vlm, TEXTS), [0, 1, 2])
    assert len({len(entry) for entry in entries}) > 1
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    now = inputs(vlm, [TEXTS[1], "<image>\na circle", TEXTS[2], "a square", TEXTS[0]], images, [0, 1, 0, 0, 0])
    whole = vlm.prefix(now)
    counting = Counting(vlm, monkeypatch)
    empty = entries[0][:0]
    mixed = prefix_with_stored(vlm, now, [entries[1], empty, entries[2], entries[0], entries[0]])  # the fourth is of another text
    assert counting.rows == 2
    for row in range(5):
        torch.testing.assert_close(kept(mixed, row), kept(whole, row), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed.last_hidden, whole.last_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed.next_position, whole.next_position, rtol=0, atol=0)


@pytest.mark.parametrize(("stored", "computed"), [("half", "float"), ("half", "bfloat16"), ("bfloat16", "bfloat16")])
def test_entries_of_16_bits_are_known_again(stored: str, computed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_vlm()
    vlm = vlm.bfloat16() if computed == "bfloat16" else vlm
    now = inputs(vlm, TEXTS)
    assert now.token_ids.max() > 256  # more than one digit
    whole = vlm.prefix(now)
    entries = [getattr(entry, stored)() for entry in to_store(vlm, now, [0, 1, 2])]
    counting = Counting(vlm, monkeypatch)
    read = prefix_with_stored(vlm, now, entries)
    assert counting.rows == 0
    torch.testing.assert_close(kept(read, 1), kept(whole, 1), rtol=2e-3, atol=2e-3)


def test_the_largest_token_of_the_3b_vocabulary_fits_into_three_digits() -> None:
    vlm = tiny_vlm()
    now = inputs(vlm, ["a circle"])
    now.token_ids[0, -1] = 151_935
    (entry,) = to_store(vlm, now, [0])
    digits = entry.bfloat16()[-2, -3:].long().tolist()
    assert digits[0] + 256 * digits[1] + 65_536 * digits[2] == 151_935


def test_a_sharded_model_always_reads_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers gather their weights from all ranks; one that read nothing would leave the others waiting, or mix them up."""
    vlm = tiny_vlm()
    now = inputs(vlm, TEXTS)
    whole, entries = vlm.prefix(now), to_store(vlm, now, [0, 1, 2])
    monkeypatch.setattr("umm_zoo.methods.stored_prefix._is_sharded", lambda module: True)
    counting = Counting(vlm, monkeypatch)
    read = prefix_with_stored(vlm, now, entries)
    assert counting.rows == 1
    for row in range(3):
        torch.testing.assert_close(kept(read, row), kept(whole, row), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    tasks = ["--tasks", "geneval,edits", "--train", "12", "--val", "0", "--test", "0", "--samples-per-shard", "5"]
    assert write_shapes([str(folder), *tasks]) == 0
    return folder


def stored_batch(world: Path, method) -> tuple[Batch, precompute.Stored]:
    """One batch of prompts, unconditional rows over the same shards, and edits, with what was stored for it."""
    sources = {
        "drawn": ShardSource(shards=str(world / "train/geneval-*.tar"), task=TextToImage()),
        "unasked": ShardSource(shards=str(world / "train/geneval-*.tar"), task=Unconditional()),
        "edited": ShardSource(shards=str(world / "train/edits-*.tar"), task=Editing()),
    }
    data = ShardData(train=sources, image_size=32, batch_size=4)
    item = method.precomputable()[PREFIX]
    fingerprint, report = item.fingerprint(data.transform()), precompute.Stored()
    arguments = precompute.parser().parse_args(["x", "--batch-size", "5"])
    precompute._store(PREFIX, item, fingerprint, "train", data._open_train(), data, report, arguments)
    opened = data._open_train()
    reader = data.reader("train", opened)
    found = find_stored(PREFIX, fingerprint, [index for source in opened for index in source.indexes], None)
    assert found is not None
    reader.stored = [found]
    return reader.__getitems__([Slot(n, n) for n in (*range(12), 12, 13, 24, 25)]).batch(), report


def test_training_reads_it_with_the_same_losses(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = wemmu().train()
    batch, report = stored_batch(world, method)
    prompts = {conversation[0]["text"] for conversation in batch.conversations[:12]}
    assert report.shared == len(prompts) + 1 < 12  # each text once, and the empty entry of rows with images
    losses = []
    for extras in ({}, batch.extras):
        plain = Batch(batch.keys, batch.conversations, batch.images, batch.image_counts, batch.targets, batch.meta, dict(extras))
        counting = Counting(method.vlm, monkeypatch)
        torch.manual_seed(0)
        losses.append((method.training_losses(plain)["loss"].item(), counting.rows))
    torch.manual_seed(0)
    dropped = sum(version != "full" for version in method.dropout(["text_to_image"] * 12))
    (plain, all_rows), (stored, few_rows) = losses
    assert stored == pytest.approx(plain, rel=1e-5) and all_rows == 16
    assert 4 <= few_rows <= 4 + dropped + 4 < 16  # edits, unconditional rows, and whose words were left out


def test_another_system_prompt_is_another_entry() -> None:
    plain, told = (Qwen25VL.from_config(VLM, system_prompt=prompt) for prompt in (None, "Draw what you are told."))
    told.load_state_dict(plain.state_dict())
    assert stored_prefixes(plain).fingerprint({}) != stored_prefixes(told).fingerprint({})


def test_the_command_stores_it_only_when_asked_and_training_goes_on_with_it(world: Path, tmp_path: Path, monkeypatch) -> None:
    """The toy's own experiment file, two steps with what was stored in 16 bits and without."""
    monkeypatch.chdir(Path(__file__).parents[2])
    shutil.copytree(world / "train", tmp_path / "train", ignore=shutil.ignore_patterns("precomputed"))
    shards = str(tmp_path / "train/geneval-*.tar")
    told = ["experiments/wemmu/toy/stage1.yaml", "data.batch_size=6", "data.train.relations=null"]
    told += [f"data.train.{name}.shards={shards}" for name in ("text_to_image", "geneval", "reconstruction", "unconditional")]
    told += [f"data.val.{name}.shards={shards}" for name in ("text_to_image", "geneval", "reconstruction")]
    folder = tmp_path / "train" / "precomputed"
    assert precompute.main([*told, "--measure", "0"]) == 0
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {"latents"}
    assert precompute.main(["--only", "prefix", "--half", *told[:2], "--measure", "0", *told[2:]]) == 0
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {"latents", "prefix"}
    losses = {}
    for precomputed in ("beside", "ignore"):
        more = [f"data.precomputed={precomputed}", "trainer.max_steps=2", "trainer.val_check_interval=2", "metrics={}"]
        runs = tmp_path / precomputed
        assert fit([*told, *more, "trainer.limit_val_batches=0", "--runs", str(runs)]) == 0
        losses[precomputed] = json.loads((runs / "wemmu/toy/stage1/metrics.json").read_text())["metrics"]["train/flow"]
    assert losses["beside"] == pytest.approx(losses["ignore"], rel=1e-3)


def test_rows_that_lost_their_entries_are_read(world: Path) -> None:
    method = wemmu().eval()
    batch, _ = stored_batch(world, method)
    whole = method.read(Batch(batch.keys, batch.conversations, batch.images, batch.image_counts, batch.targets, batch.meta))
    batch.extras[f"{PREFIX}.lengths"] = batch.extras[f"{PREFIX}.lengths"].flip(0)  # of other rows, but of the right sum
    wrong = method.read(batch)
    for row in range(len(batch)):
        torch.testing.assert_close(kept(wrong.prefix, row), kept(whole.prefix, row), rtol=1e-4, atol=1e-5)
