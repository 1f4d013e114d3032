"""An optimiser step shared out over micro-batches and ranks, with random numbers that are a function of the row alone."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_two_ranks
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.method import Method
from umm_zoo.objectives.step import num_ranks

#: Gradients and other tensors of a step, and its logged terms.
Step = tuple[dict[str, Tensor], dict[str, float]]

DRAWS = ("rand", "randn", "randint", "rand_like", "randn_like", "multinomial")


class RowDraws:
    """Stands in for torch's random functions: the draw of a row depends on its key and on how many draws the row has had.

    ``names`` are those of a batch's samples in the order of its tensors; a tensor of a multiple of them holds them ``copies`` at a
    time (side by side, or one whole batch after the other).
    """

    def __init__(self, side_by_side: bool) -> None:
        self.side_by_side = side_by_side
        self.names: list[str] = []
        self.counts: Counter[str] = Counter()

    @contextmanager
    def of(self, names: list[str]) -> Iterator[None]:
        before, self.names, self.counts = (self.names, self.counts), names, Counter()
        try:
            yield
        finally:
            self.names, self.counts = before

    @contextmanager
    def installed(self) -> Iterator[None]:
        originals = {name: getattr(torch, name) for name in DRAWS}
        try:
            for name, original in originals.items():
                setattr(torch, name, self._stand_in(name, original))
            yield
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)

    def _stand_in(self, name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*given: Any, generator: Any = None, **more: Any) -> Tensor:
            if generator is not None or not self.names:
                return original(*given, generator=generator, **more) if "like" not in name else original(*given, **more)
            self.counts[name] += 1
            first = given[0]
            if name == "multinomial":
                rows = [original(first[i : i + 1], *given[1:], generator=own) for i, own in self._own(name, len(first))]
                return torch.cat(rows)
            if name.endswith("_like"):
                plain = getattr(torch, name.removesuffix("_like"))
                self.counts[name.removesuffix("_like")] += 10  # the stand-in counts too
                return plain(tuple(first.shape), dtype=first.dtype)
            if name == "randint":
                *bounds, size = given
            else:
                bounds, size = [], first if isinstance(first, (tuple, list, torch.Size)) else given
            rows = [original(*bounds, (1, *size[1:]), generator=own, **more) for _, own in self._own(name, size[0])]
            return torch.cat(rows)

        return drawn

    def _own(self, name: str, count: int) -> Iterator[tuple[int, torch.Generator]]:
        copies, rest = divmod(count, len(self.names))
        assert not rest, f"{name}: {count} draws for {len(self.names)} samples"
        for i in range(count):
            row, copy = divmod(i, copies) if self.side_by_side else (i % len(self.names), i // len(self.names))
            seed = zlib.crc32(f"{name} {self.names[row]} {copy} {self.counts[name]}".encode())
            yield i, torch.Generator().manual_seed(seed)


def keys(batch: Batch) -> list[str]:
    return batch.keys


def taken(
    method: Method,
    parts: Sequence[Batch],
    names: Callable[[Batch], list[str]] = keys,
    side_by_side: bool = False,
    tensors: Callable[[Method], dict[str, Tensor]] | None = None,
) -> Step:
    """Gradients and logged terms of one step over this rank's micro-batches, as the trainer takes it."""
    draws = RowDraws(side_by_side)
    for hook in ("roll_out", "training_losses"):
        if hasattr(method, hook):
            _within(method, hook, draws, names)
    count = len(parts)
    with draws.installed():
        method.step.begin(count, method.begin_step(parts) if count > 1 else None, torch.device("cpu"))
        for part in parts:
            with method.step.training(part.stands_in):
                losses = method.step.weighed(method.training_losses(part))
            method.step.add(losses, part.keys)
            (losses["loss"] / count).backward()
    terms = method.step.means(torch.device("cpu"), 1)
    method.on_before_optimizer_step(None)  # type: ignore[arg-type]
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    if num_ranks() > 1:  # as data-parallel training does
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= num_ranks()
    found |= tensors(method) if tensors is not None else {}
    return found, {name: float(value) for name, value in terms.items() if not name.startswith("seconds")}


def _within(method: Method, hook: str, draws: RowDraws, names: Callable[[Batch], list[str]]) -> None:
    original = getattr(method, hook)

    def inner(batch: Batch) -> Any:
        with draws.of(names(batch)):
            return original(batch)

    setattr(method, hook, inner)


def splits(batch: Batch, seed: int, many: int = 2) -> list[list[Batch]]:
    """Random shares of a batch's rows: every row alone, and so many others."""
    chance = random.Random(seed)
    found = [[1] * len(batch)]
    for _ in range(many):
        cuts = sorted(chance.sample(range(1, len(batch)), chance.randint(1, len(batch) - 2)))
        found.append([after - before for before, after in zip([0, *cuts], [*cuts, len(batch)], strict=True)])
    return [shared_out(batch, sizes) for sizes in found]


def shared_out(batch: Batch, sizes: list[int]) -> list[Batch]:
    return [batch.select(places.tolist()) for places in torch.arange(len(batch)).split(sizes)]


def check_same(found: Step, expected: Step, place: str = "", tolerance: float = 1e-5) -> None:
    """The same gradients, beside the largest of them, and terms; a gradient that is not there is one of zeros."""
    scale = max(1.0, *(float(value.abs().max()) for value in expected[0].values()))
    for name in expected[0].keys() | found[0].keys():
        one, other = (step[0].get(name) for step in (found, expected))
        zero = torch.zeros_like(one if one is not None else other)  # type: ignore[arg-type]
        one, other = (zero if value is None else value for value in (one, other))
        difference = float((one - other).abs().max())
        assert difference <= tolerance * scale, f"{place}: {name} is off by {difference:.2g}"
    assert found[1].keys() == expected[1].keys(), place
    for name, value in expected[1].items():
        assert abs(found[1][name] - value) <= tolerance * max(1.0, abs(value)), f"{place}: {name} {found[1][name]} for {value}"


def over_ranks(step_of: Callable[[list[Batch]], Step], shares: list[list[list[Batch]]]) -> list[list[Step]]:
    """The steps of each share, ``[rank][micro-batch]``, on two gloo processes; by rank."""
    return on_two_ranks(lambda rank: [step_of(share[rank]) for share in shares])
