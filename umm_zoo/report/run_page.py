"""The page of one run, and that of several runs over each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.plain_files import strict_json, write_whole
from umm_zoo.errors import lasting
from umm_zoo.experiment.plain_yaml import yaml_text
from umm_zoo.report.curves import charts_of_run, charts_of_runs, shown
from umm_zoo.report.html import Markup, block, command, element, embedded_if_sound, folded, number, page, table
from umm_zoo.report.run_files import RunFiles
from umm_zoo.training.run_folder import differences

#: Sample grids that a page holds at most, and the bytes that they may take together.
GRIDS, ROOM = 24, 2_000_000

#: Parts of a step's time, in the order in which they follow each other.
PHASES = {"data_ms": "data", "forward_backward_ms": "forward and backward", "optimiser_ms": "optimiser"}


def write_run_page(folder: Path) -> Path:
    """Write the page of a run into its folder, whole or not at all; returns its path.

    Raises:
        UserError: it is no run folder.
    """
    run = RunFiles.read(folder)
    write_whole(run.folder.page_file, run_page(run))
    return run.folder.page_file


def run_page(run: RunFiles) -> str:
    """The page of one run."""
    return page(run.name, *_head(run), *_body(run), scripts=["page.js"])


def runs_page(runs: Sequence[RunFiles]) -> str:
    """The page of several runs: curves over each other, differences of their experiments, scores and costs side by side."""
    labels = labels_of(runs)
    pairs = list(zip(labels, runs, strict=True))
    rows = [[label, run.method, state_of(run), run.steps, _duration(run), run.commit[:9]] for label, run in pairs]
    parts: list[Any] = [element("h1", f"{len(runs)} runs"), table(rows, ["run", "method", "state", "steps", "time", "commit"])]
    parts += [element("h2", "Curves"), shown(charts_of_runs(runs, labels))]
    parts += [element("h2", "Differences of the experiments"), _differences(runs, labels)]
    parts += [element("h2", "Scores"), _beside([run.scores for run in runs], labels, "val/")]
    parts += [element("h2", "Costs"), _beside([run.record.get("costs", {}) for run in runs], labels)]
    for label, run in pairs:
        parts += [element("h2", label), command(run.command), *_samples(run, ROOM // len(runs))]
    return page(" · ".join(labels), *parts, scripts=["page.js"])


def labels_of(runs: Sequence[RunFiles]) -> list[str]:
    """Names of runs, and folders where two have one name."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder.path) for name, run in zip(names, runs, strict=True)]


def state_of(run: RunFiles) -> Markup:
    """Finished, running or stopped, as a mark."""
    return element("span", run.state, class_=f"state {run.state}")


def _head(run: RunFiles) -> Iterator[Any]:
    yield element("h1", run.name, " ", state_of(run))
    whole = run.facts.get("max_steps")
    at = time.strftime("%Y-%m-%d %H:%M")
    progress = f"{run.steps:,} of {whole:,} steps" if isinstance(whole, int) and whole > 0 else f"{run.steps:,} steps"
    yield element("p", f"{run.method}: {progress}{f' in {_duration(run)}' if run.record else ''}; written {at}", class_="faint")
    yield element("h2", "Made with")
    yield command(run.command)
    machine, versions = run.record.get("machine", {}), run.record.get("versions", {})
    rows = [
        ["experiment", run.record.get("experiment") or str(run.folder.experiment_file)],
        ["commit", run.commit],
        ["seed", str(run.experiment.get("seed", ""))],
        ["machine", _plain(machine or run.facts.get("machine", {}))],
        ["libraries", _plain(versions or run.facts.get("versions", {}))],
    ]
    if run.record.get("resumed_from"):
        rows.append(["continued from", run.record["resumed_from"]])
    if run.record.get("weights") == "averaged":
        rows.append(["scored with", "averaged weights"])
    yield table([row for row in rows if row[1]])


def _body(run: RunFiles) -> Iterator[Any]:
    if scores := [name for name in run.scores if name.startswith("val/") and name not in run.references]:
        yield element("h2", "Scores")
        yield _scores(run, scores)
    for path, card in run.benchmarks:
        headline = number(card.get("scores", {}).get(card.get("headline")))
        link = element("a", card.get("benchmark"), href=path.relative_to(run.folder.path).as_posix())
        yield element("p", "benchmark ", link, f": {headline} ({card.get('headline')})")
    if charts := charts_of_run(run):
        yield element("h2", "Curves")
        yield element("p", "Drag to zoom, double-click to come back; a click on a name hides its curve.", class_="faint")
        yield shown(charts)
    if run.samples:
        yield element("h2", "Samples")
        yield from _samples(run, ROOM)
    if parts := run.facts.get("parts"):
        yield element("h2", "Parts")
        yield table(
            [[row.get(key) for key in ("name", "class", "trained", "frozen")] for row in parts],
            ["part", "class", "trained", "frozen"],
        )
    if run.ledger:
        yield element("h2", "Data")
        yield from _ledger(run.ledger)
    if speed := {name.removeprefix("throughput/"): value for name, value in run.scores.items() if name.startswith("throughput/")}:
        yield element("h2", "Speed")
        yield from _speed(speed)
    yield element("h2", "Experiment")
    for entry in run.history[1:]:
        changed = ", ".join(map(str, entry.get("changed", {}))) or "nothing changed"
        yield element("p", f"from step {entry.get('from_step')}: {changed}", class_="faint")
    yield folded("everything filled in", element("pre", block(yaml_text(run.experiment, sort_keys=False, allow_unicode=True))))


def _scores(run: RunFiles, names: Sequence[str]) -> Markup:
    rows = []
    for name in names:
        reference, curve = run.reference(name), run.curves.get(name, [])
        against = "" if reference is None else f"{reference.name} {number(reference.value)}"
        ends = f"{number(curve[0][1])} at step {curve[0][0]:,}" if len(curve) > 1 else ""
        rows.append([name.removeprefix("val/"), run.scores[name], against, ends])
    return table(rows, ["score", "last", "read against", "first"])


def _samples(run: RunFiles, room: int) -> Iterator[Markup]:
    """A slider over sample grids: as many as there is room for, evenly chosen, the first and the last among them."""
    kept: list[tuple[int, str]] = []
    end = len(run.samples) - 1
    for count in range(min(GRIDS, len(run.samples)), 0, -1):
        places = sorted({end - round(number * end / max(1, count - 1)) for number in range(count)})
        chosen = [(run.samples[place][0], embedded_if_sound(run.samples[place][1])) for place in places]
        kept = [(step, address) for step, address in chosen if address is not None]
        if sum(len(address) for _, address in kept) <= room:
            break
    images = [element("img", src=address, alt=f"step {step:,}") for step, address in kept]
    last = len(images) - 1
    slider = element("input", type="range", min=0, max=last, value=last, step=1, aria_label="step")
    label = element("output", f"step {kept[-1][0]:,}") if kept else ""
    left = len(run.samples) - len(kept)
    more = element("span", f" · {left} more in {run.folder.path / 'samples'}", class_="faint") if left else ""
    yield element("div", element("p", label, more), slider if last > 0 else "", *images, class_="samples")


def _ledger(ledger: Mapping[str, Any]) -> Iterator[Markup]:
    columns = ["samples", "read", "skipped", "repeated", "substituted", "epochs"]
    rows, skips = [], []
    for split in ("train", "val"):
        for source, counts in (ledger.get(split) or {}).items():
            rows.append([f"{split}/{source}", *(counts.get(column, "") for column in columns)])
            skips += [[f"{split}/{source}", _plain(skip)] for skip in counts.get("skips", ())]
    yield table(rows, ["source", *columns])
    if skips:
        yield folded(f"{len(skips)} skipped samples, with reasons", table(skips, ["source", "sample"]))
    if again := ledger.get("tried again"):
        yield element("p", f"requests tried again: {_plain(again)}", class_="faint")


def _speed(values: Mapping[str, float | None]) -> Iterator[Markup]:
    known = {name: values.get(name) or 0.0 for name in PHASES}
    if whole := sum(known.values()):
        pieces = [
            element(
                "span",
                f"{PHASES[name]} {100 * part / whole:.0f} %",
                style=f"background: var(--c{place}); width: {100 * part / whole:.2f}%",
            )
            for place, (name, part) in enumerate(known.items())
        ]
        yield element("div", *pieces, class_="split", title="; ".join(f"{PHASES[n]} {number(p)} ms" for n, p in known.items()))
    yield table([[name.replace("_", " "), value] for name, value in values.items() if value is not None])


def _beside(values: Sequence[Mapping[str, Any]], labels: Sequence[str], start: str = "") -> Markup:
    """A line per name that begins with ``start``, a column per run."""
    names = list(dict.fromkeys(name for own in values for name in own if name.startswith(start)))
    return table(
        [[name.removeprefix(start).replace("_", " "), *(own.get(name, "") for own in values)] for name in names], ["", *labels]
    )


def _differences(runs: Sequence[RunFiles], labels: Sequence[str]) -> Markup:
    first, *others = (run.experiment for run in runs)
    keys = sorted({key for other in others for key in differences(first, other)} - {"name"})
    rows = [[element("code", key), *(element("code", _plain(_at(run.experiment, key))) for run in runs)] for key in keys]
    return table(rows, ["", *labels]) if rows else element("p", "none but the name", class_="faint")


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return "-"
        tree = tree[name]
    return tree


def _plain(value: Any) -> str:
    if isinstance(value, dict) and not any(isinstance(own, dict) for own in value.values()):
        return ", ".join(f"{key} {own}" for key, own in value.items())
    return value if isinstance(value, str) else strict_json(value, ensure_ascii=False)


def _duration(run: RunFiles) -> str:
    seconds = run.record.get("seconds")
    if not isinstance(seconds, int | float):
        return ""
    return lasting(seconds)
