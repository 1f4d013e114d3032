"""Parts that metrics share: the choice of rows by their ground truth, and records of rows that meet again at ``compute``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from umm_zoo.batch import Batch, stacked
from umm_zoo.errors import UserError, printable, several
from umm_zoo.outputs import FIELDS, Outputs

#: A name is kept in a record as this many 64-bit words of UTF-8.
NAME_WORDS = 4

#: Entries of a metric that no kind may be called.
RESERVED = ("overall", "held_out", "in_set_bound")


def required(outputs: Outputs, name: str, metric: Metric) -> Any:
    """The field ``name``.

    Raises:
        UserError: the method's validation step did not make it.
    """
    if (value := getattr(outputs, name)) is None:
        made = sorted([*outputs.scalars, *(field for field in FIELDS if getattr(outputs, field) is not None)])
        raise UserError(f"metrics.{type(metric).__name__}", f"the outputs {made}", f"'{name}' among what validation_step returns")
    return value


def generated_pairs(
    outputs: Outputs, batch: Batch, metric: Metric, same_size: bool = True
) -> tuple[list[Tensor], list[Tensor]] | None:
    """``generated`` and what it should be, B images each; None where nothing was generated for the batch.

    Raises:
        UserError: there is nothing to compare with, or as many images as rows are not there, or those of a row differ in size
            (only with ``same_size``: encoders bring both to their own).
    """
    if outputs.generated is None:
        return None
    images, references = outputs.generated, outputs.references_of(batch)
    if references is None:
        raise UserError(f"metrics.{type(metric).__name__}", "no true images", "rows with KEY.target.png, or 'references'")
    if not len(images) == len(references) == len(batch):
        found = f"{len(images)} images generated, {len(references)} to compare with, {len(batch)} rows"
        raise UserError(f"metrics.{type(metric).__name__}", found, "two images per row")
    if same_size:
        same_sizes(metric, batch, generated=images, true=references)
    return images, references


def same_sizes(metric: Metric, batch: Batch, **images: Sequence[Tensor]) -> None:
    """Refuse rows whose images, given by what they are, differ in size.

    Raises:
        UserError: names the row and the sizes.
    """
    for key, own in zip(batch.keys, zip(*images.values(), strict=True), strict=True):
        if len({image.shape for image in own}) > 1:
            sizes = [f"{name} {image.shape[-2]} x {image.shape[-1]} px" for name, image in zip(images, own, strict=True)]
            raise UserError(f"metrics.{type(metric).__name__}", f"{key}: {', '.join(sizes)}", "images of one size in each row")


def rows_by_size(function: Callable[..., Tensor], *columns: Sequence[Tensor]) -> Tensor:
    """What ``function`` makes of the images of each row, ``[rows, ...]``, for R images in each column.

    It is called once per size, with a stack ``[r, 3, H, W]`` of each column, and treats rows alone.
    """
    places: dict[tuple[torch.Size, ...], list[int]] = {}
    for row, images in enumerate(zip(*columns, strict=True)):
        places.setdefault(tuple(image.shape for image in images), []).append(row)
    results = dict[int, Tensor]()
    for rows in places.values():
        results.update(zip(rows, function(*(stacked([column[row] for row in rows]) for column in columns)), strict=True))
    return torch.stack([results[row] for row in range(len(results))]) if results else torch.empty(0)


def chosen_rows(batch: Batch, kinds: list[str] | None, tasks: list[str] | None = None) -> list[int]:
    """Rows whose ``meta`` has one of the given kinds and one of the given tasks; None takes all."""
    return [
        row
        for row, meta in enumerate(batch.meta)
        if (kinds is None or meta.get("kind") in kinds) and (tasks is None or meta.get("task") in tasks)
    ]


def checked_names(what: str, names: list[str] | None) -> list[str] | None:
    """Names of kinds or tasks; a ``UserError`` where one stands alone, for every part of its spelling would be taken for it."""
    several(what, names or ())
    return names


def kind_of(meta: Mapping[str, Any]) -> str:
    """The kind of a row, its task where it has none.

    Raises:
        UserError: it is the name of a mean.
    """
    kind = printable(str(meta.get("kind") or meta.get("task") or "other"))
    if kind in RESERVED:
        raise UserError("metrics", f"a sample of the kind '{kind}'", f"another name: {', '.join(RESERVED)} are means over kinds")
    return kind


def digest(text: str) -> int:
    """A 64-bit number that stands for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def name_to_words(name: str) -> list[int]:
    """A short name as ``NAME_WORDS`` 64-bit numbers, so that it can travel between ranks and be read on all of them.

    Raises:
        UserError: it is longer than 32 bytes.
    """
    raw = name.encode()
    if len(raw) > 8 * NAME_WORDS:
        raise UserError("metrics", f"the kind '{name}' of {len(raw)} bytes", f"at most {8 * NAME_WORDS}")
    raw = raw.ljust(8 * NAME_WORDS, b"\0")
    return [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8)]


def words_to_name(words: list[int]) -> str:
    """The inverse of ``name_to_words``."""
    return b"".join(word.to_bytes(8, "little", signed=True) for word in words).rstrip(b"\0").decode()


def _join(parts: list[Tensor]) -> Tensor:
    """Ranks without rows have no width either, so their empty records are left out."""
    filled = [part for part in parts if len(part)]
    return torch.cat(filled) if filled else parts[0]


class RowMetric(Metric):
    """Metric over groups of rows (a kind, a pair, a question, the whole set) that may be spread over batches and ranks.

    ``update`` keeps one record of a few numbers per row (a subclass yields them in ``_records_of``, or overrides ``update``),
    ``values_of`` makes the values of all records. torchmetrics' own list states fail between ranks when one of them has no rows
    (it sends a float vector where the others send a matrix), so ``sync`` joins the records of a rank into one matrix first.

    Args:
        kinds, tasks: count rows of these only, by ``meta["kind"]`` and ``meta["task"]``; None counts all.

    Attributes:
        reads: names of what ``update`` needs of a batch's outputs, fields and scalars alike.
        scores: names of the values of a metric that gives several, with ``*`` for names that the data gives; None does not say.
        record_dtype: of the records.
        of_rows: what the last batch alone is worth, ``row -> name -> value``, for sample grids; empty where a metric gives none.
    """

    reads: tuple[str, ...] = ()
    scores: tuple[str, ...] | None = None
    record_dtype = torch.int64
    full_state_update = False
    rows: list[Tensor] | Tensor

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__()
        self.of_rows: dict[int, dict[str, float]] = {}
        self.kinds, self.tasks = checked_names("kinds", kinds), checked_names("tasks", tasks)
        self.add_state("rows", default=[], dist_reduce_fx=_join)

    def chosen(self, batch: Batch) -> list[int]:
        """The rows that count."""
        return chosen_rows(batch, self.kinds, self.tasks)

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Keep the records of the rows that count; a batch without any need not have what the metric reads."""
        if self.chosen(batch):
            self.add_rows(list(self._records_of(outputs, batch)))

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        raise NotImplementedError

    def add_rows(self, records: list[list[int]] | Tensor) -> None:
        """Keep records ``[rows, width]``."""
        if len(records) and isinstance(self.rows, list):
            self.rows.append(torch.as_tensor(records, dtype=self.record_dtype, device=self.device))

    def records(self) -> Tensor:
        """All records, ``[rows, width]``; of all ranks while ``compute`` runs. ``[0, 0]`` where there are none."""
        if isinstance(self.rows, Tensor):
            return self.rows
        return _join([torch.empty(0, 0, dtype=self.record_dtype, device=self.device), *self.rows])

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Values by name, of one record or more."""
        raise NotImplementedError

    def compute(self) -> Any:
        """``values_of`` all records; empty without any."""
        records = self.records()
        return self.values_of(records) if len(records) else {}

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> None:
        """Join this rank's records, then exchange them as torchmetrics does."""
        if isinstance(self.rows, list):
            self.rows = [self.records()]
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)


def rates_by_name(hits: Tensor, words: Tensor) -> dict[str, Tensor]:
    """Mean of ``hits`` [rows] over the rows of each name, given as ``words`` [rows, NAME_WORDS]; in alphabetical order."""
    names, group = torch.unique(words, dim=0, return_inverse=True)
    rates = {words_to_name(name.tolist()): hits[group == i].double().mean() for i, name in enumerate(names)}
    return dict(sorted(rates.items()))
