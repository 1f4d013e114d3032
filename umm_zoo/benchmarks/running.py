"""Evaluation of a finished run on a benchmark: results made once, verdicts beside them, by one process or several, gone on with."""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_zoo.backbones.devices import own_device
from umm_zoo.benchmarks.base import Benchmark, Item, Verdict
from umm_zoo.benchmarks.card import write_card
from umm_zoo.benchmarks.interval import interval
from umm_zoo.benchmarks.leakage import said, training_overlap
from umm_zoo.benchmarks.results import Made, Results, Row
from umm_zoo.errors import UserError, did_you_mean, printable, say
from umm_zoo.generation.abilities import own_sampling
from umm_zoo.generation.base import Command
from umm_zoo.generation.images import open_image
from umm_zoo.generation.options import Option, settings_in, whole
from umm_zoo.generation.progress import progress
from umm_zoo.generation.requests import Request
from umm_zoo.training.finished_run import FinishedRun
from umm_zoo.training.ranks import is_main_process, launched_ranks
from umm_zoo.training.report import circumstances

if TYPE_CHECKING:
    from torch import Tensor

    from umm_zoo.generation.model import Model

_POLL = 0.5  # seconds between two looks at what the other processes have done


def yes_or_no(value: Any) -> bool:
    """The truth value of a word."""
    found = {"yes": True, "true": True, "no": False, "false": False}.get(str(value).lower())
    if found is None:
        raise ValueError
    return found


#: Settings of every evaluation, beside those of the commands that its items need.
OWN: Mapping[str, Option] = {
    "batch_size": whole("items at a time", 1, 100_000, 16),
    "limit": whole("items, the first ones; a part of a benchmark is none that compares", 1, 10**9),
    "overlap": Option("look for the prompts in the training texts of the run", "yes|no", "yes or no", yes_or_no, True),
}


def settings_of(benchmark: Benchmark, given: Mapping[str, Any], items: Sequence[Item]) -> dict[str, Any]:
    """Settings of generation, checked; what is not said is a command's own default.

    Raises:
        UserError: a setting that no command of these items has, or that cannot be.
    """
    options = options_of(benchmark, items)
    for name in given:
        if name not in options:
            raise UserError(name, "a setting that this benchmark does not have", ", ".join(options), did_you_mean(name, options))
    read = settings_in(options, given, lambda name: name)
    if "num" in options and given.get("num") is None:
        read["num"] = benchmark.per_item
    return read


def options_of(benchmark: Benchmark, items: Sequence[Item]) -> dict[str, Option]:
    """What may be set of an evaluation."""
    commands = {type(command): command for command in map(benchmark.command, items)}
    return {**OWN, **{name: option for command in commands.values() for name, option in command.options.items()}}


def run_benchmark(
    run: FinishedRun, benchmark: Benchmark, given: Mapping[str, Any], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Put all items to a run, or what an earlier call left of them; every process takes its share, and the first one sums up.

    Args:
        run: the run.
        benchmark: built.
        given: settings of generation by name, see ``settings_of``.
        overrides: of the run's experiment.

    Returns:
        What the card says, with the scores by name under ``scores``; empty on other processes than the first.

    Raises:
        UserError: the method lacks a capability, or an item cannot be put to it.
    """
    items = benchmark.items()
    if twice := [key for key, count in Counter(item.key for item in items).items() if count > 1]:
        expected = "different keys: files are named after them"
        raise UserError(benchmark.name, f"the key '{printable(twice[0])}' of two items", expected)
    settings = settings_of(benchmark, given, items)
    batch_size, limit, looks = (settings.pop(name) for name in OWN)
    some = items[:limit]
    inputs = {path: _content(path) for item in some for path in item.images}
    first, count = settings.pop("seed", 0), settings.pop("num", 1)
    rows = [Row(item, first + number, inputs) for item in some for number in range(count)]
    weights, protocol = _weights(run), benchmark.protocol()
    folder = run.path / "benchmarks" / benchmark.name
    scoring = {"protocol": protocol, "rows": [row.id for row in rows]}
    results = Results(folder, {**settings, "weights": weights, "overrides": list(overrides)}, scoring)
    overlap: dict[str, Any] = {"unknown": "it was not looked for"}
    if looks and is_main_process():
        overlap = training_overlap(run, some, folder)
        say(said(overlap, len({item.text for item in some})), stderr=True)
    benchmark.to(own_device())
    seconds = _do(run, benchmark, rows, settings, results, batch_size)
    if not is_main_process():
        return {}
    verdicts, made = _all_verdicts(benchmark, rows, results), results.made()
    said_so = {name: value for name, value in settings.items() if value is not None}
    about = {
        "run": run.experiment.name,
        "benchmark": benchmark.name,
        "headline": benchmark.headline,
        **_scored(benchmark, rows, verdicts),
        "items": len(some),
        "seeds": list(range(first, first + count)),
        "generation": {**results.settings(), **said_so},
        "image_sizes": results.image_sizes(made[row.id] for row in rows),
        "protocol": protocol,
        "weights": weights,
        "overrides": list(overrides),
        "overlap": {key: value for key, value in overlap.items() if key != "prompts"},
        "processes": launched_ranks(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        **circumstances(),
    }
    if found := overlap.get("prompts"):
        without = [row for row in rows if row.item.text not in set(found)]
        about["scores_without_overlap"] = _values(benchmark, without, verdicts)
    partial = f"{len(some)} of {len(items)} items: not the benchmark's score" if len(some) < len(items) else ""
    marked = f"{len(found)} prompts stand in training texts of the run" if found else ""
    about["warnings"] = [text for text in (partial, marked, *benchmark.warnings()) if text]
    write_card(results, about, rows, made, verdicts)
    return {**about, "folder": str(results.path)}


def _do(
    run: FinishedRun, benchmark: Benchmark, rows: list[Row], settings: dict[str, Any], results: Results, batch_size: int
) -> dict[str, float]:
    """Make and judge this process's share of what is missing; rows are dealt out by their place, whatever is there already."""
    rank, ranks = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))), launched_ranks()
    made, judged = results.made(), results.verdicts()
    there = {id for id, verdict in judged.items() if not verdict.again}
    missing = [row for row in rows[rank::ranks] if row.id not in there or row.id not in made]
    if done := len(rows[rank::ranks]) - len(missing):
        say(f"{benchmark.name}: {done} of {len(rows[rank::ranks])} are there already", stderr=True)
    seconds = {"generating": 0.0, "judging": 0.0}
    model: Model | None = None
    with progress(len(missing)) as advance:
        for some in _groups(benchmark, missing, made, batch_size):
            began = time.monotonic()
            if some[0].id not in made:
                if model is None:
                    model = _model(run)
                    results.keep_settings(own_sampling(model.method))
                made |= dict(zip([row.id for row in some], _make(run, benchmark, model, some, settings, results), strict=True))
            middle = time.monotonic()
            _judge(benchmark, some, made, results)
            seconds["generating"] += middle - began
            seconds["judging"] += time.monotonic() - middle
            for _ in some:
                advance()
    return seconds


def _groups(benchmark: Benchmark, rows: list[Row], made: Mapping[str, Made], size: int) -> Iterator[list[Row]]:
    """Runs of at most ``size`` rows of one command, made already or not."""
    for _, group in groupby(rows, lambda row: (type(benchmark.command(row.item)), row.id in made)):
        some = list(group)
        yield from (some[start : start + size] for start in range(0, len(some), size))


def _make(
    run: FinishedRun, benchmark: Benchmark, model: Model, rows: list[Row], settings: dict[str, Any], results: Results
) -> list[Made]:
    """What the run makes of some rows, kept."""
    from umm_zoo.generation.running import run_batch

    command: Command = benchmark.command(rows[0].item)
    known = {name: settings.get(name) for name in command.options}
    requests = [
        Request(row.item.images, row.item.text, {**known, "seed": row.seed}, f"{benchmark.name} {row.item.key}") for row in rows
    ]
    found = run_batch(model, command, requests, run.path)
    return results.add_made(rows, [one.answer for one in found], [next(iter(one.images.values()), None) for one in found])


def _judge(benchmark: Benchmark, rows: list[Row], made: Mapping[str, Made], results: Results) -> None:
    """Verdicts over what was made of some rows, kept."""
    import torch

    from umm_zoo.batch import IMAGE_MARKER, Turn
    from umm_zoo.generation.tensors import from_pil
    from umm_zoo.methods.requests import request_batch
    from umm_zoo.outputs import Outputs

    texts = [row.item.text if benchmark.sees_inputs else row.item.text.replace(IMAGE_MARKER, "") for row in rows]
    shown = [[from_pil(open_image(path)) for path in row.item.images if benchmark.sees_inputs] for row in rows]
    batch = request_batch(texts, shown)
    batch.keys, batch.meta = [row.item.key for row in rows], [dict(row.item.meta) for row in rows]
    for row, turns in zip(rows, batch.conversations, strict=True):
        if row.item.answer:
            turns.append(Turn(role="assistant", text=row.item.answer))
    own = [made[row.id] for row in rows]
    answers = [one.answer for one in own if one.answer is not None]
    files = [results.images / one.file for one in own if one.file is not None]
    outputs = Outputs(
        answers=answers if len(answers) == len(rows) else None,
        generated=[from_pil(open_image(file)).to(benchmark.device) for file in files] if len(files) == len(rows) else None,
    )
    with torch.no_grad():
        results.add_verdicts((rows[place], verdict) for place, verdict in benchmark.verdicts(outputs, batch.to(benchmark.device)))


def _all_verdicts(benchmark: Benchmark, rows: list[Row], results: Results) -> dict[str, Verdict]:
    """Verdicts over all rows, once every process has written its own."""
    while missing := {row.id for row in rows} - set(verdicts := results.verdicts()):
        if launched_ranks() == 1:
            raise UserError(benchmark.name, f"no verdict over {len(missing)} rows, such as {min(missing)}", "one over each")
        time.sleep(_POLL)
    return verdicts


def _values(benchmark: Benchmark, rows: Sequence[Row], verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """Scores over the verdicts of some rows, in their order."""
    if not rows:
        return {}
    return {name: float(value) for name, value in benchmark.values_of(_records(benchmark, rows, verdicts)).items()}


def _records(benchmark: Benchmark, rows: Sequence[Row], verdicts: Mapping[str, Verdict]) -> Tensor:
    import torch

    return torch.tensor([list(verdicts[row.id].record) for row in rows], dtype=benchmark.record_dtype)


def _scored(benchmark: Benchmark, rows: Sequence[Row], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """The scores, and the interval of the first among them."""
    scores = _values(benchmark, rows, verdicts)
    units, kinds = [benchmark.unit(row.item) for row in rows], [verdicts[row.id].kind for row in rows]
    ends = interval(benchmark.values_of, _records(benchmark, rows, verdicts), units, kinds, benchmark.headline)
    return {"scores": scores, "interval": list(ends)}


def _model(run: FinishedRun) -> Model:
    """The run's method, ready for use on this process's device."""
    from umm_zoo.generation.model import Model

    method = run.load_method()
    return Model.of(method, method.run_data, own_device())


@cache
def _content(path: Path) -> str:
    """What stands for the content of a file, which is looked at before anything is made of it."""
    open_image(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _weights(run: FinishedRun) -> dict[str, Any]:
    """What stands for the weights of a run: its step, which they are, and a sample of their numbers."""
    import torch

    sampled = 0
    for name in sorted(run.state):
        if isinstance(tensor := run.state[name], torch.Tensor) and tensor.numel():
            some = tensor.flatten()[:: max(1, tensor.numel() // 64)].float().cpu().contiguous()
            sampled = zlib.crc32(some.numpy().tobytes(), zlib.crc32(name.encode(), sampled))
    return {"step": run.checkpoint.get("global_step"), "weights": run.weights, "numbers": f"{sampled:08x}"}
