"""Loading of images: ours against webdataset, LitData and a folder of files, and against PIL alone.

All read the same JPEG files (made from noise and gradients), make the same transform, and end in the same batch: images in bytes,
one behind the other, as they go to the device that makes floats of them, and their captions. With ``buckets`` images of unequal
sizes are brought to aspect-ratio buckets, and ours are dealt out to batches of one bucket each. ``pil`` decodes bytes that lie in
memory and transforms them, in a plain loop of PIL's own calls to the same pixels, in as many processes as the loaders have, and
sends nothing: no loader that decodes the same way can be faster per process. ``pil-files`` reads each of those images from a file
first. Both take the images in our order, for what an image costs depends on its size. ``webdataset-whole`` decodes all pixels of a
file before it is resized, as webdataset does; with all others the decoder shrinks large photographs on the way (``edge=2000
image_size=512``), and their pixels agree with its to a few levels of 255.

``seconds`` is processor time of the processes that decode (the workers, or this one where there are none), which tells what a
worker does with a core of its own also where cores are few or busy; ``images/s`` is on the clock, ``all`` milliseconds of all
processes.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from tools.benchmarks.base import Numbers, Options

UNIT, OWN = "image", ("ours",)
#: ``edge`` of the files in pixels, or least and largest; ``image_size`` of the batch, or of the square with a bucket's area; each
#: of ``rounds`` starts again and times ``batches`` per worker.
SIZES = {"samples": 512, "shards": 8, "edge": [256], "image_size": 224, "buckets": False, "batch_size": 32}
SIZES |= {"rounds": 2, "batches": 4, "workers": [0, 2]}
SMALLEST = {"samples": 24, "shards": 2, "edge": [40], "image_size": 32, "batch_size": 6, "rounds": 1, "batches": 1, "workers": [0]}


def cases(options: Options) -> list[tuple[str, str]]:
    """Numbers of workers."""
    return [(f"{number} workers", arm) for number in options.workers for arm in LOADERS]


def missing(options: Options, arm: str) -> str:
    """Why an arm cannot run."""
    return "pip install litdata" if arm == "litdata" and find_spec("litdata") is None else ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """An image of one arm, in this process and its workers."""
    workers = int(setting.split()[0])
    folder = Path(options.folder) / "-".join(map(str, ("loader", *options.edge, options.samples, options.shards)))
    paths = sorted(str(path) for path in folder.glob("*.tar")) or make_shards(folder, options.samples, options.edge, options.shards)
    make = partial(LOADERS[arm], paths, options.image_size, options.batch_size, workers, options.buckets)
    blocks = [block(make, workers, options.batches) for _ in range(options.rounds)]
    clock, own, everything = (statistics.median(times) / options.batch_size for times in zip(*blocks, strict=True))
    return {"seconds": own, "images/s": 1 / clock, "all": 1000 * everything}


def block(make: Callable[[], Iterator[Tensor]], workers: int, batches: int) -> tuple[float, float, float]:
    """Seconds of a batch on the wall, of the processes that decode, and of all.

    What is ready when the clock starts was taken out before, and each of our workers' buffers has been used once, as in all of a
    training but its first seconds.
    """
    from data_pipelines.shards.buffers import NUM_BUFFERS

    others = {child.pid for child in multiprocessing.active_children()}
    stream = make()
    for _ in range(1 + NUM_BUFFERS * max(1, workers)):  # torch keeps two batches per worker ready
        next(stream)
    helping = [child.pid for child in multiprocessing.active_children() if child.pid and child.pid not in others]
    count = batches * max(1, workers)
    began = _seconds(helping)
    for _ in range(count):
        next(stream)
    ended = _seconds(helping)
    del stream
    gc.collect()
    clock, own, everything = ((last - first) / count for first, last in zip(began, ended, strict=True))
    return clock, own, everything


def _seconds(workers: list[int]) -> tuple[float, float, float]:
    """The time on the wall, processor time of the processes that decode, and of all."""
    mine = time.process_time()
    theirs = sum(time.clock_gettime(~pid << 3 | 2) for pid in workers)  # Linux's number for the clock of another process
    return time.perf_counter(), theirs if workers else mine, mine + theirs


def make_shards(folder: Path, samples: int, edges: Sequence[int], shards: int) -> list[str]:
    """JPEGs of about the size and detail of photos, with sides between the least and the largest edge, and a caption each."""
    from data_pipelines.shards.writing import write_shards

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


def policy(size: int, buckets: bool) -> Any:
    """Squares, or aspect-ratio buckets of sides that are multiples of an eighth."""
    from data_pipelines.transforms.resize import Square
    from data_pipelines.transforms.shaped import Bucket

    return Bucket(multiple=size // 8) if buckets else Square()


def shard_data(paths: list[str], size: int, batch_size: int, workers: int, buckets: bool) -> Any:
    """Our data, shuffled over all shards."""
    from data_pipelines.shards.bucketing import ByShape
    from data_pipelines.shards.data import ShardData, ShardSource
    from data_pipelines.tasks import Captions

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


def plain(
    paths: list[str], size: int, batch_size: int, workers: int, buckets: bool = False, whole: bool = False
) -> Iterator[Tensor]:
    """The usual pipeline of webdataset's documentation, with our transform in place of torchvision's, and perhaps its decoding."""
    import webdataset as wds

    data = (
        wds.WebDataset(paths, shardshuffle=len(paths), empty_check=False, nodesplitter=None)
        .shuffle(1000, initial=batch_size)
        .to_tuple("jpg", "txt", "__key__")
        .map_tuple(
            partial(decoded_whole, size=size, resize=policy(size, buckets)) if whole else decoder(size, buckets), bytes.decode, str
        )
        .batched(batch_size, collation_fn=collate, partial=False)
        .repeat()
    )
    for images, _, _ in DataLoader(data, batch_size=None, num_workers=workers):
        yield images


def decoder(size: int, buckets: bool) -> Callable[[bytes], NDArray[np.uint8]]:
    """Our decoding, in the peers' hands."""
    from data_pipelines.decoding import decode_image

    return partial(decode_image, size=size, resize=policy(size, buckets))


def decoded_whole(content: bytes, size: int, resize: Any) -> NDArray[np.uint8]:
    """Webdataset's decoding: all pixels of the file, whatever becomes of them."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(resize(image.convert("RGB"), size))


class Files(Dataset[Any]):
    """A folder of image files, and their captions in memory."""

    def __init__(self, paths: list[str], decode: Callable[[bytes], Any]) -> None:
        self.files, self.decode = written(paths), decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Any, str, str]:
        file = self.files[number]
        return self.decode(file.read_bytes()), f"An image with the number {number}.", file.stem


def folder(paths: list[str], size: int, batch_size: int, workers: int, buckets: bool = False) -> Iterator[Tensor]:
    """torch's ``DataLoader`` over a folder of files."""
    data = Files(paths, decoder(size, buckets))
    yield from endless(DataLoader(data, batch_size, shuffle=True, num_workers=workers, collate_fn=collate, drop_last=True))


def litdata(paths: list[str], size: int, batch_size: int, workers: int, buckets: bool = False) -> Iterator[Tensor]:
    """LitData's streaming data set of the files' bytes, and its loader."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    chunks, decode = Path(paths[0]).parent / "chunks", decoder(size, buckets)
    if not chunks.exists():
        writer, rows = BinaryWriter(str(chunks), chunk_size=64), written(paths)
        for number, file in enumerate(rows):
            writer[number] = {"jpg": file.read_bytes(), "txt": f"An image with the number {number}."}
        writer.done()
        writer.merge()

    class Rows(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[Any, str, str]:
            row = super().__getitem__(index)
            return decode(row["jpg"]), row["txt"], str(index)

    data = Rows(str(chunks), shuffle=True, drop_last=True)
    yield from endless(StreamingDataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=collate))


def endless(loader: Any) -> Iterator[Tensor]:
    """The images of a loader's batches, epoch after epoch."""
    while True:
        for images, _, _ in loader:
            yield images


def written(paths: list[str]) -> list[Path]:
    """The images of the shards as files."""
    import webdataset as wds

    place = Path(paths[0]).parent / "files"
    if not place.exists():
        place.mkdir()
        for number, row in enumerate(wds.WebDataset(paths, shardshuffle=False, empty_check=False)):
            (place / f"{number:06d}.jpg").write_bytes(row["jpg"])
    return sorted(place.glob("*.jpg"))


def collate(rows: list[tuple[Any, str, str]]) -> tuple[Tensor, list[str], list[str]]:
    """Images stacked, or one behind the other where they are of unequal sizes; texts and keys as lists."""
    images, texts, keys = zip(*rows, strict=True)
    equal = len({image.shape for image in images}) == 1
    whole = np.stack(images) if equal else np.concatenate([image.reshape(-1) for image in images])
    return torch.from_numpy(whole), list(texts), list(keys)


def bare(content: bytes, size: int, resize: Any) -> NDArray[np.uint8]:
    """What ``decode_image`` makes of an upright JPEG of RGB, by PIL's own calls."""
    with Image.open(io.BytesIO(content)) as image:
        columns, rows = resize.output_size(*image.size, size)
        image.draft("RGB", resize.least(*image.size, size))
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(ImageOps.fit(rgb, (columns, rows), resize.resample))


class Decoding(IterableDataset[Tensor]):
    """Decoding and transform of bytes in memory, or each from a file (no loader gets its bytes for nothing); no batch."""

    def __init__(self, data: Any, paths: list[str], from_files: bool) -> None:
        files = written(paths)
        self.data, self.order = data, data.stream.take(0, 4 * len(files)).tolist()
        self.contents: list[bytes | Path] = list(files) if from_files else [file.read_bytes() for file in files]

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
    "ours": ours,
    "webdataset": plain,
    "webdataset-whole": partial(plain, whole=True),
    "litdata": litdata,
    "folder": folder,
    "pil": pil,
    "pil-files": partial(pil, from_files=True),
}
