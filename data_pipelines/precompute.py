"""``python -m data_pipelines.precompute EXPERIMENT [key=value …]``: store outputs of frozen parts beside the shards.

What a frozen part makes of a sample is the same in every epoch and every run: latents of a codec, targets of a reconstruction.
The method names what it can read back (``Method.precomputable``); training reads it wherever it was stored for exactly these
weights and this transform, and refuses it otherwise. The originals stay as they are. A stopped run goes on with the first
unfinished shard.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.converters.converting import Parser
from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.index import ShardIndex, load_index
from data_pipelines.shards.reading import OpenSource, Row, SampleReader, stack
from data_pipelines.shards.stored import base_folder, folder_of, stem_of
from data_pipelines.shards.writing import IndexedShardWriter
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.batch import Batch
from umm_zoo.errors import MistakeError, UserError, user_errors
from umm_zoo.experiment.file import load_experiment
from umm_zoo.fit import check_data

if TYPE_CHECKING:
    from data_pipelines.shards.data import ShardData
    from umm_zoo.method import Method

_TRUE_PRECISIONS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_EPILOG = """examples:
  python -m data_pipelines.precompute experiments/ross/toy/d-stage2.yaml
  python -m data_pipelines.precompute FILE data.image_size=384 --only latents --batch-size 32
Stored beside each shard, in precomputed/NAME-HASH/, or below data.precomputed where that names a folder."""


@dataclass
class Stored:
    """What was written for one name."""

    samples: int = 0
    left_out: int = 0
    bytes: int = 0
    seconds: float = 0.0
    folders: set[str] = field(default_factory=set)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m data_pipelines.precompute",
        description=(__doc__ or "").split("\n\n")[1],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("experiment", metavar="EXPERIMENT", help="an experiment file")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="as for umm_zoo.fit")
    made.add_argument("--only", action="append", metavar="NAME", help="store this output and no other (may be repeated)")
    made.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples computed together (default 64)")
    made.add_argument("--half", action="store_true", help="store 16-bit floats: half the room, losses equal to about 1e-3")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--measure", type=int, default=6, metavar="N", help="training steps timed each way in the end; 0 for none")
    made.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_intermixed_args(argv)
    with user_errors(arguments.traceback) as outcome:
        try:
            run(arguments)
        except (MistakeError, OSError) as error:
            raise UserError(arguments.experiment, str(error)) from error
        except KeyboardInterrupt:
            sys.stderr.write("\nstopped; the same command goes on with the first unfinished shard\n")
            outcome.code = 130
    return outcome.code


def run(arguments: argparse.Namespace) -> dict[str, Stored]:
    """Store everything, measure the gain, and report both.

    Raises:
        UserError: the experiment cannot be built, names nothing that can be stored, or changes its images in training.
        MistakeError: a shard cannot be read.
    """
    data, method = _build(arguments)
    items = method.precomputable()
    for name in arguments.only or ():
        if name not in items:
            raise UserError(arguments.experiment, f"--only: found '{name}', expected {', '.join(items) or 'none'}")
    items = {name: item for name, item in items.items() if name in (arguments.only or items)}
    if not items:
        kind = type(method).__name__
        raise UserError(arguments.experiment, f"method: found {kind}, which has no frozen output that is worth storing here")
    if arguments.batch_size < 1:
        raise UserError(arguments.experiment, f"--batch-size: found {arguments.batch_size}, expected positive whole numbers")
    reports: dict[str, Stored] = {}
    stages = {"train": data._open_train() if data.train_sources else [], "val": data._open_val()}
    for name, item in items.items():
        reports[name] = Stored()
        fingerprint = item.fingerprint(data.transform())
        for stage, sources in stages.items():
            _store(name, item, fingerprint, stage, sources, data, reports[name], arguments)
        _print(name, reports[name])
    if arguments.measure and stages["train"]:
        _measure(method, data, items, stages["train"], arguments)
    return reports


def _build(arguments: argparse.Namespace) -> tuple[ShardData, Method]:
    import lightning

    from data_pipelines.shards.data import ShardData
    from umm_zoo.experiment.check import check
    from umm_zoo.fit import carry
    from umm_zoo.training.run_folder import RunFolder
    from umm_zoo.training.setup import build_data, build_experiment
    from umm_zoo.training.trainer import quieten

    quieten()
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    check(experiment)
    data = build_data(experiment)
    if not isinstance(data, ShardData):
        raise UserError(arguments.experiment, f"data: found {type(data).__name__}, expected data_pipelines.shards.data.ShardData")
    check_data(data, experiment)
    lightning.seed_everything(experiment.seed, workers=True, verbose=False)
    built = build_experiment(experiment, data)
    for name, callback in built.callbacks.items():
        if getattr(callback, "changes_images", False):
            raise UserError(
                arguments.experiment, f"callbacks.{name}: found one that changes the images in training, so nothing can be stored"
            )
    if experiment.after:
        after = Path(experiment.after)
        place = RunFolder.of(load_experiment(after)).path if after.suffix in (".yaml", ".yml") else after
        if place.exists():
            carry(built, place, experiment)
        else:  # a stage that trains none of what is stored changes nothing; one that does changes the hash, and training refuses
            sys.stderr.write(f"note: {experiment.after} has not been run; stored are outputs of the weights as they are built\n")
    method = built.method
    if (dtype := _TRUE_PRECISIONS.get(str(experiment.trainer.get("precision")))) is not None:
        method.to(dtype)
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return data, method.to(device)


# -- storing -----------------------------------------------------------------------------------------------------------------


def _store(
    name: str,
    item: Precomputable,
    fingerprint: str,
    stage: str,
    sources: Sequence[OpenSource],
    data: ShardData,
    report: Stored,
    arguments: argparse.Namespace,
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    reader = SampleReader(stage, sources, data.image_size, data.target_size, data.resize, False, data.cache)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{name} ({stage})", total=len(reader))
        first = 0
        for _, index in reader.shards:
            folder = folder_of(base_folder(index.path, data.stored_folder()), name, fingerprint)
            report.folders.add(str(folder))
            place = folder / f"{stem_of(index)}-000000.tar"
            if place.is_file() and place.with_name(place.name + ".index.json").is_file():
                report.samples += len(load_index(str(place)))
                progress.advance(bar, len(index))
            else:
                began = time.monotonic()
                _store_shard(
                    name,
                    item,
                    folder,
                    index,
                    range(first, first + len(index)),
                    reader,
                    report,
                    arguments,
                    lambda n: progress.advance(bar, n),
                )
                report.seconds += time.monotonic() - began
            report.bytes += place.stat().st_size if place.is_file() else 0
            first += len(index)


def _store_shard(
    name: str,
    item: Precomputable,
    folder: Path,
    index: ShardIndex,
    samples: range,
    reader: SampleReader,
    report: Stored,
    arguments: argparse.Namespace,
    advance: Any,
) -> None:
    with IndexedShardWriter(folder, stem_of(index), sys.maxsize) as writer:
        for start in range(0, len(samples), arguments.batch_size):
            rows: list[tuple[str, Row]] = []
            for sample in samples[start : start + arguments.batch_size]:
                try:
                    rows.append((index.key(sample - samples.start), reader.read(sample)))
                except BadSampleError:  # training meets it too, and says why
                    report.left_out += 1
            for key, members in _entries(name, item, rows, arguments.half):
                writer.write({"__key__": key, **members})
                report.samples += 1
            advance(min(arguments.batch_size, len(samples) - start))
        if not writer.summary.samples:
            writer.write({"__key__": "none", f"{name}.none": b""})  # a shard without one usable sample was looked at, too


def _entries(name: str, item: Precomputable, rows: list[tuple[str, Row]], half: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each row."""
    if not rows:
        return
    batch = stack([row for _, row in rows], []).batch().to(_device(item))
    counts = batch.image_counts if item.per == "image" else [1] * len(batch)
    with torch.no_grad():
        values = item.compute(batch)
    if len(values) != sum(counts):
        raise ValueError(f"precomputable '{name}': found {len(values)} entries for {len(counts)} rows, expected {sum(counts)}")
    for (key, _), part in zip(rows, values.split(counts), strict=True):
        yield key, {f"{name}.npy": _npy(part, half)}


def _npy(values: Tensor, half: bool) -> bytes:
    values = values.detach().cpu()
    if values.is_floating_point():
        values = values.half() if half else values.float()
    file = io.BytesIO()
    np.save(file, values.numpy(), allow_pickle=False)
    return file.getvalue()


def _device(item: Precomputable) -> torch.device:
    return next((tensor.device for tensor in item.part.parameters()), torch.device("cpu"))


# -- the gain ----------------------------------------------------------------------------------------------------------------


def _print(name: str, report: Stored) -> None:
    folders = ", ".join(sorted(report.folders))
    print(f"{name}: {report.samples:,} samples, {report.bytes / 1e6:,.1f} MB, {report.seconds:.1f} s, in {folders}")
    if report.left_out:
        print(f"  {report.left_out:,} samples cannot be used; training skips them and names them in data.json")


def _measure(
    method: Method, data: ShardData, items: dict[str, Precomputable], sources: Sequence[OpenSource], arguments: argparse.Namespace
) -> None:
    """Time reading, forward and backward with and without what is stored, in turns, so that a busy machine slows both alike."""
    from data_pipelines.shards.stored import find_stored

    indexes = [index for source in sources for index in source.indexes]
    stored = [find_stored(name, item.fingerprint(data.transform()), indexes, data.stored_folder()) for name, item in items.items()]
    plain = SampleReader("train", sources, data.image_size, data.target_size, data.resize, True, data.cache)
    fast = SampleReader(
        "train", sources, data.image_size, data.target_size, data.resize, True, data.cache, [s for s in stored if s]
    )
    size = min(data.batch_size, arguments.batch_size)
    device = next(method.parameters()).device
    method.train()
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(arguments.measure + 1):
        numbers = data.stream.take(turn * size, (turn + 1) * size).tolist()
        for reads_stored in (False, True) if turn % 2 else (True, False):
            reader = fast if reads_stored else plain
            began = time.perf_counter()
            batch = _batch_of(reader, numbers).to(device)
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


def _batch_of(reader: SampleReader, numbers: list[int]) -> Batch:
    rows = []
    for number in numbers:
        try:
            rows.append(reader.read(number))
        except BadSampleError:
            continue
    return stack(rows, []).batch()


if __name__ == "__main__":
    raise SystemExit(main())
