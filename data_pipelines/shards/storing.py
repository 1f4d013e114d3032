"""Storing of outputs of frozen parts beside the shards, and the gain of it."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.data import ShardData
from data_pipelines.shards.index import ShardIndex, load_index
from data_pipelines.shards.indexing import index_path
from data_pipelines.shards.progress import progress_bar
from data_pipelines.shards.reading import BatchRequest, SamplePosition, SampleReader
from data_pipelines.shards.stored import sealed, stored_items, stored_place
from data_pipelines.shards.writing import IndexedShardWriter
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError, locating, say
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment
from umm_zoo.method import Method
from umm_zoo.training.run import load_weights, quieten
from umm_zoo.training.run_folder import RunFolder
from umm_zoo.training.setup import build_data, build_experiment, check_data

_TRUE_PRECISIONS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def store_outputs(arguments: argparse.Namespace) -> None:
    """Store, and measure the gain, as the command line says."""
    with locating(arguments.experiment):
        data, method = _build(arguments)
        items = method.precomputable()
        for name in arguments.only or ():
            if name not in items:
                raise UserError("--only", f"'{name}'", ", ".join(items) or "none")
        items = {name: item for name, item in items.items() if name in (arguments.only or items)}
        if not items:
            raise UserError("method", f"{type(method).__name__}, which has no frozen output that is worth storing here")
        for name, item in items.items():
            _store(name, item, data, arguments)
        if arguments.measure and data.sources["train"] and arguments.part.count == 1:
            _measure(method, data, items, arguments)


def _build(arguments: argparse.Namespace) -> tuple[ShardData, Method]:
    quieten()
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    check(experiment)
    data = build_data(experiment)
    if not isinstance(data, ShardData):
        raise UserError("data", type(data).__name__, "data_pipelines.shards.data.ShardData")
    check_data(data, experiment.file)
    lightning.seed_everything(experiment.seed, workers=True, verbose=False)
    built = build_experiment(experiment, data)
    for name, callback in built.callbacks.items():
        if getattr(callback, "changes_images", False):
            found = "one that changes the images in training"
            raise UserError(f"callbacks.{name}", found, "none, for then nothing can be stored")
    if experiment.after:
        after = Path(experiment.after)
        place = RunFolder.of(load_experiment(after)).path if after.suffix in (".yaml", ".yml") else after
        if place.exists():
            load_weights(built.method, place, experiment.file, experiment.training.get("weights") == "raw")
        else:  # a stage that trains none of what is stored changes nothing; one that does changes the hash, and training refuses
            sys.stderr.write(f"note: {experiment.after} has not been run; stored are outputs of the weights as they are built\n")
    method = built.method
    if (dtype := _TRUE_PRECISIONS.get(str(experiment.trainer.get("precision")))) is not None:
        method.to(dtype)
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return data, method.to(device)


def _store(name: str, item: Precomputable, data: ShardData, arguments: argparse.Namespace) -> None:
    """Store one output for the shards of training and validation, or for this part's share of them, and report."""
    fingerprint, began = item.fingerprint(data.transform.to_json()), time.monotonic()
    shards: dict[Path, tuple[SampleReader, int, ShardIndex]] = {}  # those of both are stored once
    for stage in (stage for stage, sources in data.sources.items() if sources):
        reader, first = SampleReader(stage, data.open(stage), data.transform, False, data.shard_cache), 0
        for _, index in reader.shards:
            shards.setdefault(stored_place(index, name, fingerprint, data.stored_folder()), (reader, first, index))
            first += len(index)
    places = arguments.part.of(list(shards))
    left_out = 0
    with progress_bar(name, sum(len(shards[place][2]) for place in places)) as advance:
        for place in places:
            reader, first, index = shards[place]
            if not (place.is_file() and index_path(place).is_file()):
                samples = range(first, first + len(index))
                left_out += _store_shard(name, place, index, _outputs(name, item, reader, samples, arguments))
            advance(len(index))
    count, size = sum(len(load_index(str(place))) for place in places), sum(place.stat().st_size for place in places)
    folders = ", ".join(sorted({str(place.parent) for place in places}))
    part = f" (part {arguments.part} of {len(shards):,} shards)" if arguments.part.count > 1 else ""
    say(f"{name}{part}: {count:,} samples, {size / 1e6:,.1f} MB, {time.monotonic() - began:.1f} s, in {folders or 'none'}")
    if left_out:
        say(f"  {left_out:,} samples cannot be used; training skips them and names them in data.json")


def _store_shard(name: str, place: Path, index: ShardIndex, outputs: Iterator[bytes | None]) -> int:
    """Store the output of each sample of a shard; None is left out. Returns how many were."""
    with IndexedShardWriter(place.parent, place.name.removesuffix("-000000.tar"), sys.maxsize) as writer:
        for number, output in enumerate(outputs):
            if output is not None:
                writer.write({"__key__": index.key(number), f"{name}.npy": output})
        left_out = len(index) - writer.summary.samples
        if not writer.summary.samples:
            writer.write({"__key__": "none", f"{name}.none": b""})  # a shard without one usable sample was looked at, too
    return left_out


@torch.no_grad()
def _outputs(
    name: str, item: Precomputable, reader: SampleReader, samples: range, arguments: argparse.Namespace
) -> Iterator[bytes | None]:
    """The output of each sample as the content of a ``.npy``; None where the sample cannot be used: training says why."""
    device = next((tensor.device for tensor in item.part.parameters()), torch.device("cpu"))
    for first in range(0, len(samples), arguments.batch_size):
        numbers = samples[first : first + arguments.batch_size]
        raw = _read(reader, numbers)
        skipped, entries = {skip.position for skip in raw.skips}, iter(tuple[Tensor]())
        if raw.keys:
            if item.per == "row":
                raw.refuse_mixed("each kind needs shards of its own")
            batch = raw.batch().to(device)
            per = {"image": batch.image_counts, "row": [1] * len(batch), "target": [*map(int, batch.has_target)]}
            counts = per[item.per]
            computed = dict[int, Tensor]()
            for rows in _of_like_sizes(batch):
                values = item.compute(batch if len(rows) == len(batch) else batch.select(rows))
                expected = [counts[row] for row in rows]
                if len(values) != sum(expected):
                    found = f"found {len(values)} entries for {len(rows)} rows, expected {sum(expected)}"
                    raise ValueError(f"precomputable '{name}': {found}")
                computed.update(zip(rows, values.split(expected), strict=True))
            entries = iter(computed[row] for row in range(len(batch)))
        for number in numbers:
            yield None if number in skipped else _npy(next(entries), arguments.half)


def _of_like_sizes(batch: Batch) -> Iterable[list[int]]:
    """The rows of a batch, together where their images have the same sizes: what is made of them can be stacked."""
    if all(len({image.shape for image in images}) < 2 for images in (batch.images, batch.requested)):
        return [list(range(len(batch)))]
    rows: dict[tuple[Any, ...], list[int]] = {}
    for row, target in enumerate(batch.targets):
        sizes = frozenset(image.shape for image in batch.images_of(row)), target if target is None else target.shape
        rows.setdefault(sizes, []).append(row)
    return rows.values()


def _npy(values: Tensor, half: bool) -> bytes:
    values = values.detach().cpu()
    if values.is_floating_point():
        values = values.half() if half else values.float()
    file = io.BytesIO()
    np.save(file, values.numpy(), allow_pickle=False)
    return sealed(file.getvalue())


def _read(reader: SampleReader, numbers: Sequence[int]) -> RawBatch:
    raw = reader[BatchRequest([SamplePosition(number, number) for number in numbers])]
    if raw.error is not None:
        raise raw.error
    return raw


def _measure(method: Method, data: ShardData, items: dict[str, Precomputable], arguments: argparse.Namespace) -> None:
    """Time reading, forward and backward with and without what is stored, in turns, so that a busy machine slows both alike."""
    sources = data.open("train")
    indexes = [index for source in sources for index in source.indexes]
    stored = stored_items(items, data.transform, indexes, data.stored_folder())
    readers = [SampleReader("train", sources, data.transform, True, data.shard_cache, given) for given in ((), stored)]
    size = min(data.batch_size, arguments.batch_size)
    device = next(method.parameters()).device
    method.train()
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(arguments.measure + 1):
        numbers = data.stream.take(turn * size, (turn + 1) * size).tolist()
        for reads_stored in (False, True) if turn % 2 else (True, False):
            began = time.perf_counter()
            batch = _read(readers[reads_stored], numbers).batch().to(device)
            method.training_losses(batch)["loss"].backward()
            method.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms both up
                times[reads_stored].append(time.perf_counter() - began)
    ratio = float(np.median(times[False]) / np.median(times[True]))
    print(
        f"a training step (reading, forward, backward; {size} samples on {device.type}, median of {arguments.measure}) "
        f"is {ratio:.2f} times as fast with what is stored"
    )
