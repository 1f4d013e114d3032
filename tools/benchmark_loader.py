"""``python tools/benchmark_loader.py``: images per second of ``ShardData`` against plain webdataset and against PIL alone.

All read the same shards of JPEG files (made from noise and gradients), make the same transform, and end in the same batch: images
in bytes, one behind the other, as they go to the device that makes floats of them, and their captions; ``floats`` tells what that
step takes on the processor, whoever loads. With ``--buckets`` images of unequal sizes are brought to aspect-ratio buckets, and
ours are dealt out to batches of one bucket each. ``pil`` decodes bytes that lie in memory and transforms them, in a plain loop of
PIL's own calls to the same pixels, in as many processes as the loaders have, and sends nothing: no loader can be faster per
process. ``files`` reads each of those images from a file first, still without a batch. Both take the images in our order, for
what an image costs depends on its size. They run in turns, a short block each, so that a busy machine slows all alike; a ratio is
the median over the rounds of one round's rates. Three clocks: ``clock`` on the wall; ``per_process``, the processor time of the
processes that decode (the workers, or this one where there are none), which tells what a worker does with a core of its own also
where cores are few or busy; ``all``, the processor time of all processes together.
"""

from __future__ import annotations

import argparse
import gc
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines.decoding import decode_image
from data_pipelines.shards.batches import to_signal
from data_pipelines.shards.bucketing import ByShape
from data_pipelines.shards.buffers import NUM_BUFFERS
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.writing import write_shards
from data_pipelines.tasks import Captions
from data_pipelines.transforms.resize import Resize, Square
from data_pipelines.transforms.shaped import Bucket
from umm_zoo.checkpoints.plain_files import strict_json
from umm_zoo.training.report import circumstances


def make_shards(folder: Path, samples: int, edges: Sequence[int], shards: int) -> list[str]:
    """JPEGs of about the size and detail of photos, with sides between the least and the largest edge, and a caption each."""
    rng = np.random.default_rng(0)

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(samples):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            width, height = rng.integers(min(edges), max(edges), 2, endpoint=True).tolist()
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
            noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(noisy).save(file, "JPEG", quality=90)
            yield {"__key__": f"s{number:06d}", "jpg": file.getvalue(), "txt": f"An image with the number {number}."}

    return [str(path) for path in write_shards(rows(), folder, "photos", -(-samples // shards)).shards]


def policy(size: int, buckets: bool) -> Resize:
    """Squares, or aspect-ratio buckets of sides that are multiples of an eighth."""
    return Bucket(multiple=size // 8) if buckets else Square()


def shard_data(paths: list[str], size: int, batch_size: int, workers: int, buckets: bool) -> ShardData:
    """Our data, shuffled over all shards."""
    options: dict[str, Any] = {"resize": policy(size, buckets), "bucketing": ByShape() if buckets else None}
    source = ShardSource(paths, Captions())
    return ShardData({"a": source}, image_size=size, batch_size=batch_size, num_workers=workers, **options)


def ours(paths: list[str], size: int, batch_size: int, workers: int, buckets: bool = False) -> Iterator[Tensor]:
    """``ShardData``."""
    loader = shard_data(paths, size, batch_size, workers, buckets).train_dataloader()
    loader.packed = True  # as a trainer gets them
    for batch in loader:
        runs = list(batch.images.runs())
        yield runs[0] if len(runs) == 1 else batch.images.pixels


def plain(paths: list[str], size: int, batch_size: int, workers: int, buckets: bool = False) -> Iterator[Tensor]:
    """The usual pipeline of webdataset's documentation, with our transform in place of torchvision's."""
    data = (
        wds.WebDataset(paths, shardshuffle=len(paths), empty_check=False, nodesplitter=None)
        .shuffle(1000, initial=batch_size)
        .to_tuple("jpg", "txt", "__key__")
        .map_tuple(partial(decode_image, size=size, resize=policy(size, buckets)), bytes.decode, str)
        .batched(batch_size, collation_fn=collate, partial=False)
        .repeat()
    )
    for images, _, _ in DataLoader(data, batch_size=None, num_workers=workers):
        yield images


def collate(rows: list[tuple[Any, str, str]]) -> tuple[Tensor, list[str], list[str]]:
    """Images stacked, or one behind the other where they are of unequal sizes; texts and keys as lists."""
    images, texts, keys = zip(*rows, strict=True)
    equal = len({image.shape for image in images}) == 1
    whole = np.stack(images) if equal else np.concatenate([image.reshape(-1) for image in images])
    return torch.from_numpy(whole), list(texts), list(keys)


def floats_per_second(size: int, batch_size: int) -> float:
    """Images per second that become floats on the processor."""
    images = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8)
    timer = Timer("to_signal(images)", globals={"to_signal": to_signal, "images": images})
    return batch_size / timer.blocked_autorange().median


def bare(content: bytes, size: int, resize: Resize) -> NDArray[np.uint8]:
    """What ``decode_image`` makes of an upright JPEG of RGB, by PIL's own calls."""
    with Image.open(io.BytesIO(content)) as image:
        columns, rows = resize.output_size(*image.size, size)
        image.draft("RGB", resize.least(*image.size, size))
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(ImageOps.fit(rgb, (columns, rows), resize.resample))


class Decoding(IterableDataset[Tensor]):
    """Decoding and transform of bytes in memory, or each from a file (no loader gets its bytes for nothing); no batch."""

    def __init__(self, data: ShardData, paths: list[str], from_files: bool) -> None:
        contents = [row["jpg"] for row in wds.WebDataset(paths, shardshuffle=False, empty_check=False)]
        self.data, self.order = data, data.stream.take(0, 4 * len(contents)).tolist()
        self.contents: list[bytes | Path] = list(contents)
        for number, content in enumerate(contents if from_files else []):
            file = Path(paths[0]).parent / "files" / f"{number}.jpg"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
            self.contents[number] = file

    def __iter__(self) -> Iterator[Tensor]:
        worker, size = get_worker_info(), self.data.batch_size
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while True:
            for start in range(first * size, len(self.order) - size + 1, step * size):
                for number in self.order[start : start + size]:
                    content = self.contents[number]
                    read = content.read_bytes() if isinstance(content, Path) else content
                    bare(read, *self.data.transform.inputs[::-1])
                yield torch.empty(0)


def pil(
    paths: list[str], size: int, batch_size: int, workers: int, buckets: bool = False, from_files: bool = False
) -> Iterator[Tensor]:
    """``Decoding`` in this process or in workers."""
    data = Decoding(shard_data(paths, size, batch_size, 0, buckets), paths, from_files)
    yield from DataLoader(data, batch_size=None, num_workers=workers)


LOADERS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "pil": pil,
    "files": partial(pil, from_files=True),
    "ours": ours,
    "webdataset": plain,
}
CLOCKS = ("clock", "per_process", "all")
Rates = dict[str, dict[str, list[float]]]


def measure(makers: dict[str, Callable[[], Iterator[Tensor]]], rounds: int, batches: int) -> Rates:
    """Batches per second by clock and name, of every round, taking turns.

    Each starts over in its turn and ends with it, or its workers would read ahead while another is timed. What they have ready when
    the clock starts was taken out before, and each of our workers' buffers has been used once, as in all of a training but its
    first seconds.
    """
    rates: Rates = {clock: {name: [] for name in makers} for clock in CLOCKS}
    for turn in range(rounds):
        for name in makers if turn % 2 == 0 else reversed(makers):
            workers = int(name.split()[1])
            others = {child.pid for child in multiprocessing.active_children()}
            stream = makers[name]()
            for _ in range(1 + NUM_BUFFERS * max(1, workers)):  # torch keeps two batches per worker ready
                next(stream)
            helping = [child.pid for child in multiprocessing.active_children() if child.pid and child.pid not in others]
            count = batches * max(1, workers)
            began = _seconds(helping)
            for _ in range(count):
                next(stream)
            for clock, first, last in zip(CLOCKS, began, _seconds(helping), strict=True):
                rates[clock][name].append(count / (last - first))
            del stream
            gc.collect()
    return rates


def _seconds(workers: list[int]) -> tuple[float, float, float]:
    """The time on the wall, processor time of the processes that decode, and of all."""
    mine = time.process_time()
    theirs = sum(time.clock_gettime(~pid << 3 | 2) for pid in workers)  # Linux's number for the clock of another process
    return time.perf_counter(), theirs if workers else mine, mine + theirs


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--edge", type=int, nargs="+", default=[256], help="pixels of the JPEG files, or least and largest side")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of the batch, or of the square with a bucket's area")
    parser.add_argument("--buckets", action="store_true", help="aspect-ratio buckets in place of squares")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batches", type=int, default=2, help="batches of one block")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_shards(Path(folder), given.samples, given.edge, given.shards)
        makers: dict[str, Callable[[], Iterator[Tensor]]] = {
            f"{name} {workers} workers": partial(loader, paths, given.image_size, given.batch_size, workers, given.buckets)
            for workers in given.workers
            for name, loader in LOADERS.items()
        }
        rates = measure(makers, given.rounds, given.batches)
    report: dict[str, Any] = {clock: summary(rates[clock], given.batch_size, given.workers) for clock in CLOCKS}
    report |= {"floats": {"images_per_second": round(floats_per_second(given.image_size, given.batch_size), 1)}}
    report |= {"settings": {key: value for key, value in vars(given).items() if key != "out"}}
    report |= {**circumstances(), "usable_cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    print(strict_json(report, indent=1))
    if given.out:
        given.out.write_text(strict_json(report, indent=1) + "\n", encoding="utf-8")
    return 0


def summary(rates: dict[str, list[float]], batch_size: int, workers: list[int]) -> dict[str, Any]:
    """Rates as images per second, and the ratios that count."""

    def ratio(first: str, second: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[first], rates[second], strict=True)), 3)

    speeds = {name: round(statistics.median(values) * batch_size, 1) for name, values in rates.items()}
    pairs = (("ours", "webdataset"), ("ours", "pil"), ("ours", "files"), ("webdataset", "pil"))
    ratios = {f"{a}_to_{b}": {str(n): ratio(f"{a} {n} workers", f"{b} {n} workers") for n in workers} for a, b in pairs}
    return {"images_per_second": speeds, **ratios}


if __name__ == "__main__":
    raise SystemExit(main())
