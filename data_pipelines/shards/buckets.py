"""Buckets of the samples of opened sources, by the measures in their indexes, and what there is to say of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from data_pipelines.shards.bucketing import Bucketing, Key, Outline
from data_pipelines.shards.index import ShardIndex
from data_pipelines.shards.measures import digest_of, is_image, narrow
from data_pipelines.shards.sources import OpenSource
from data_pipelines.tasks import SampleTask
from data_pipelines.transforms.image_transform import ImageTransform
from umm_zoo.errors import UserError, printable

#: Samples that are looked at before a training, for the report.
_LOOKED_AT = 100_000
#: Buckets in the table; the rest is one row.
_LISTED = 24


@dataclass
class BucketShare:
    """Bucket of a training: its name, how many of the samples looked at it has, and its share of the training stream.

    ``lost`` is the mean share of an image that its policy cuts away: of the image to generate, or of the first input image; None
    where there is none.
    """

    bucket: str
    samples: int
    share: float
    lost: float | None


class SampleBuckets:
    """Buckets of samples, numbered through several sources; an index is read when one of its samples is first asked for.

    Args:
        sources: opened, with measures.
        bucketing: makes the keys.
        transform: of the images.
    """

    def __init__(self, sources: Sequence[OpenSource], bucketing: Bucketing, transform: ImageTransform) -> None:
        self.sources, self.bucketing, self.transform = sources, bucketing, transform
        self._shards = [(source.task, index) for source in sources for index in source.indexes]
        self._ends = np.cumsum([len(index) for _, index in self._shards])
        self._kept: dict[int, tuple[list[Key], NDArray[Any]]] = {}  # one or two bytes a sample

    def __call__(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the bucket of each sample, from 0 on in the order of the keys of these very samples."""
        shards = np.searchsorted(self._ends, samples, side="right")
        keys: dict[Key, int] = {}
        found = np.empty(len(samples), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            own, numbers = self._shard(shard)
            chosen = shards == shard
            places = samples[chosen] - (int(self._ends[shard]) - len(numbers))
            found[chosen] = np.asarray([keys.setdefault(key, len(keys)) for key in own])[numbers[places]]
        ranks = np.empty(len(keys), dtype=np.int64)
        ranks[[keys[key] for key in in_order(keys)]] = np.arange(len(keys))
        return np.unique(ranks[found], return_inverse=True)[1]

    def _shard(self, shard: int) -> tuple[list[Key], NDArray[Any]]:
        """The keys of a shard, and the number of each sample's."""
        if shard not in self._kept:
            numbers: dict[Key, int] = {}
            keys = (self.bucketing.key(outline, self.transform) for outline in outlines(*self._shards[shard]))
            of_samples = np.asarray([numbers.setdefault(key, len(numbers)) for key in keys])
            self._kept[shard] = list(numbers), narrow(of_samples)
        return self._kept[shard]

    def digest(self) -> str:
        """What tells the measures of all samples from others."""
        return digest_of(index.measured for _, index in self._shards)

    def shares(self, shares: Sequence[float]) -> tuple[list[BucketShare], int]:
        """The buckets in their order, and of how many samples: all, or those of shards that are spread evenly.

        Args:
            shares: of the sources in the training stream.
        """
        counts, lost = Counter[Key](), defaultdict[Key, list[float]](list)
        weights = defaultdict[Key, float](float)
        first = 0
        for source, share in zip(self.sources, shares, strict=True):
            own = Counter[Key]()
            for shard in self._spread(source, first):
                keys, numbers = self._shard(shard)
                for outline, number in zip(outlines(*self._shards[shard]), numbers.tolist(), strict=True):
                    own[keys[number]] += 1
                    if (cut := self._lost(outline)) is not None:
                        lost[keys[number]].append(cut)
            counts += own
            for key, count in own.items():
                weights[key] += share * count / own.total()
            first += len(source.indexes)
        rows = [BucketShare(self.bucketing.describe(key), counts[key], weights[key], _mean(lost[key])) for key in in_order(counts)]
        return rows, counts.total()

    def _spread(self, source: OpenSource, first: int) -> list[int]:
        """Shards of a source, the first of which has the number ``first``, that are looked at for the report."""
        most = max(1, round(_LOOKED_AT / len(self.sources) / (len(source) / len(source.indexes))))
        places = np.linspace(0, len(source.indexes) - 1, min(most, len(source.indexes)))
        return [first + round(place) for place in places.tolist()]

    def _lost(self, outline: Outline) -> float | None:
        policy, size = self.transform.inputs, next(iter(outline.inputs), None)
        if outline.target is not None:
            policy, size = self.transform.targets, outline.target
        return None if size is None or min(size) < 1 else policy.crop(*size).lost


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Sorted keys; a ``UserError`` where a bucketing of one's own makes some that cannot be compared."""
    try:
        return sorted(keys)
    except TypeError as error:
        raise UserError("data.bucketing", f"keys that cannot be ordered ({error})", "numbers, texts, or tuples of them") from error


def outlines(task: SampleTask, index: ShardIndex) -> list[Outline]:
    """The outline of each sample of a shard, as its task understands the names of the members."""
    measures = index.measures()
    sizes = list(zip(measures.widths.tolist(), measures.heights.tolist(), strict=True))
    places = []
    for names in measures.layouts:
        images = [name for name in names if is_image(name)]
        inputs, target = task.image_names(names)
        shown = [images.index(name) for name in inputs if name in images]
        places.append((shown, images.index(target) if target in images else None))
    columns = (measures.layout.tolist(), measures.starts.tolist(), measures.lengths.tolist())
    made = []
    for layout, start, length in zip(*columns, strict=True):
        shown, target_place = places[layout]
        target_size = None if target_place is None else sizes[start + target_place]
        made.append(Outline(tuple(sizes[start + place] for place in shown), target_size, length))
    return made


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def bucket_table(rows: Sequence[BucketShare], looked_at: int, samples: int, size: int, pure: tuple[int, int]) -> Group:
    """The buckets of a training.

    Args:
        rows: of the buckets.
        looked_at: number of samples that they are counted of.
        samples: number of all samples.
        size: samples that should be of one bucket.
        pure: number of groups of that size that are, and of all groups, of the stretch that the training begins in.
    """
    columns = (Column(name, justify="right") for name in ("samples", "share", "cut away"))
    some = f" ({looked_at:,} of {samples:,} samples looked at)" if looked_at < samples else ""
    table = Table("bucket", *columns, title=f"buckets{some}")
    listed = {id(row) for row in sorted(rows, key=lambda row: -row.share)[:_LISTED]}
    for row in rows:
        if id(row) in listed:
            cut = "" if row.lost is None else f"{row.lost:.1%}"
            table.add_row(printable(row.bucket), f"{row.samples:,}", f"{row.share:.1%}", cut)
    if rest := [row for row in rows if id(row) not in listed]:
        table.add_row(f"{len(rest)} more", f"{sum(row.samples for row in rest):,}", f"{sum(row.share for row in rest):.1%}", "")
    mixed = "" if pure[0] == pure[1] else ", the others of neighbours"
    return Group(table, Text(f"{pure[0]} of the first {pure[1]} groups of {size} samples are of one bucket{mixed}"))
