"""Outcome of a comparison as a table (Markdown), rows (CSV), a record (JSON) and a plot, all from the same rows."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.plain_files import NOT_FINITE, strict_json
from umm_zoo.comparison.statistics import Interval, holm, interval, paired_difference

#: Costs measured for every run beside its metrics: key in the row -> (heading, factor to the printed unit).
COSTS = {
    "trained_parameters": ("trained M", 1e-6),
    "parameters": ("total M", 1e-6),
    "seconds_per_step": ("ms / step", 1e3),
    "peak_memory_bytes": ("peak GiB", 2**-30),
}

DIFFERENCES = (
    "Paired differences (same seed, same data order), to {first} where no other choice is named, with their 95 % interval; "
    "t, the mean in standard errors; p of the paired t-test, Holm-adjusted per metric over this table."
)

#: Adjusted p below which a difference is called resolved.
LEVEL = 0.05

VERDICTS = f"By the paired t-test alone (Holm-adjusted p below {LEVEL:g}); what that means for the question is for the rule to say."

#: Heads of columns, and rows of cells.
Table = tuple[list[str], list[list[str]]]

#: Panels of a plot beside each other.
_PANELS = 4


@dataclass
class Row:
    """Finished run: a choice at a seed."""

    choice: str
    seed: int
    metrics: dict[str, float | None]
    costs: dict[str, float]
    run: str
    experiment: str


@dataclass
class Unfinished:
    """Run that has no scores: it failed with this line, or without one was not run."""

    choice: str
    seed: int
    line: str = ""

    def __str__(self) -> str:
        return f"failed: {self.line}" if self.line else "not run"


@dataclass
class Results:
    """All rows of a comparison, one per choice and seed, and what is needed to read them.

    Fields are as in ``umm_zoo.comparison.plan.Plan``; ``source`` is the path of the compare file, ``provenance`` has the commit,
    the machine, versions of libraries and the command.
    """

    name: str
    question: str
    source: str
    metrics: dict[str, tuple[str, bool | None]]
    rows: list[Row]
    provenance: dict[str, Any] = field(default_factory=dict)
    decision: str = ""
    contrasts: list[tuple[str, str]] = field(default_factory=list)
    unfinished: list[Unfinished] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def choices(self) -> list[str]:
        """Names of the choices that have been run, also in vain, in the order of the compare file."""
        known = dict.fromkeys([*(row.choice for row in self.rows), *(run.choice for run in self.unfinished)])
        return [name for name in self.order if name in known] or list(known)

    def of(self, choice: str, metric: str) -> dict[int, float]:
        """Seed -> value of a printed metric; a run without the metric, or whose metric counted no row, is left out."""
        key = self.metrics[metric][0]
        values = {row.seed: row.metrics.get(key) for row in self.rows if row.choice == choice}
        return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}

    def mean(self, choice: str, metric: str) -> Interval | None:
        """Interval of a metric over the seeds of a choice."""
        values = list(self.of(choice, metric).values())
        return interval(values) if values else None

    def difference(self, choice: str, metric: str, other: str) -> Interval | None:
        """Paired interval of a choice minus another; None without a common seed."""
        return paired_difference(self.of(choice, metric), self.of(other, metric))

    def differences(self) -> list[tuple[str, str]]:
        """The pairs whose difference is printed: every choice and the first one, then the contrasts that have been run."""
        first, *others = self.choices()
        known = [(a, b) for a, b in self.contrasts if {a, b} <= {first, *others} and b != first]
        return [(choice, first) for choice in others] + known

    def cost(self, choice: str, key: str) -> float | None:
        """Mean of a cost over the seeds of a choice."""
        values = [row.costs[key] for row in self.rows if row.choice == choice and key in row.costs]
        return sum(values) / len(values) if values else None

    def write(self, folder: Path) -> list[Path]:
        """Write ``<name>.md/.csv/.json/.png/.tex`` into ``folder`` and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}{suffix}" for suffix in (".md", ".csv", ".json", ".png", ".tex")]
        paths[0].write_text(self.markdown())
        self._write_csv(paths[1])
        paths[2].write_text(strict_json(asdict(self), indent=1, sort_keys=True) + "\n")
        self._plot(paths[3])
        paths[4].write_text(self.latex())
        return paths

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what ``write`` put into the JSON file."""
        record = json.loads(path.read_text())
        record.pop(NOT_FINITE, None)
        record["rows"] = [Row(**row) for row in record["rows"]]
        record["unfinished"] = [Unfinished(**run) for run in record.get("unfinished", [])]
        record["contrasts"] = [(choice, other) for choice, other in record.get("contrasts", [])]
        record["metrics"] = {name: (key, higher) for name, (key, higher) in record["metrics"].items()}
        return cls(**record)

    def markdown(self) -> str:
        """Question, table of means with intervals, table of paired differences, costs, provenance."""
        lines = [f"# {self.name}", "", self.question.strip(), ""]
        if self.decision:
            status = self.provenance.get("rule", "written before the final seeds ran")  # records of before it was looked up
            lines += [f"**Decision rule, {status}.** {self.decision.strip()}", ""]
        lines += ["Mean over seeds ± half-width of the 95 % interval (Student's t).", ""]
        lines += self._table(*self.mean_table())
        if self.unfinished:
            lines += ["", "Without scores:", ""]
            lines += [f"- {run.choice}, seed {run.seed}: {run}" for run in self.unfinished]
        if self.differences():
            lines += ["", DIFFERENCES.format(first=f"`{self.choices()[0]}`"), "", *self._table(*self.difference_table())]
        if costs := self.cost_table():
            lines += ["", *self._table(*costs)]
        lines += ["", f"![{self.name}]({self.name}.png)", "", f"Compare file: `{self.source}`."]
        lines += [f"- {key}: {value}" for key, value in self.provenance.items() if key != "rule"]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Means with intervals as a table of LaTeX (package ``booktabs``), with the number of seeds."""
        head, rows = self.mean_table()
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in (head, *rows)]
        columns = "lr" + "c" * len(self.metrics)
        caption = r"% Mean over n seeds $\pm$ half-width of the 95\,\% interval (Student's t)."
        body = [r"\toprule", lines[0].replace("seeds", "$n$"), r"\midrule", *lines[1:], r"\bottomrule"]
        return "\n".join([caption, rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]) + "\n"

    def mean_table(self) -> Table:
        """Means over the seeds of every choice."""
        return ["choice", "seeds", *self.metrics], [self._mean_cells(choice) for choice in self.choices()]

    def difference_table(self) -> Table:
        """Paired differences."""
        first, adjusted = self.choices()[0], {metric: self._adjusted(metric) for metric in self.metrics}
        rows = [
            [
                a if b == first else f"{a} - {b}",
                *(self._difference_cell((a, b), metric, adjusted[metric]) for metric in self.metrics),
            ]
            for a, b in self.differences()
        ]
        return ["choice", *self.metrics], rows

    def verdict_table(self) -> Table:
        """Differences in words: better, worse, or not resolved; higher and lower where neither is better."""
        adjusted = {metric: self._adjusted(metric) for metric in self.metrics}
        rows = [
            [f"{a} against {b}", *(self._verdict((a, b), metric, adjusted[metric]) for metric in self.metrics)]
            for a, b in self.differences()
        ]
        return ["", *self.metrics], rows

    def cost_table(self) -> Table | None:
        """Mean costs of every choice; None where none was recorded."""
        if not (present := [key for key in COSTS if self.cost(self.choices()[0], key) is not None]):
            return None
        rows = [[choice, *(self._cost_cell(choice, key) for key in present)] for choice in self.choices()]
        return ["choice", *(COSTS[key][0] for key in present)], rows

    def _mean_cells(self, choice: str) -> list[str]:
        seeds = {row.seed for row in self.rows if row.choice == choice}
        lines = [run.line for run in self.unfinished if run.choice == choice]
        failed, waiting = sum(map(bool, lines)), lines.count("")
        more = [f"{failed} failed"] * bool(failed) + [f"{waiting} not run"] * bool(waiting)
        cells = [self._mean_cell(choice, metric) for metric in self.metrics]
        return [choice, ", ".join([str(len(seeds)), *more]), *cells]

    def _mean_cell(self, choice: str, metric: str) -> str:
        """The mean, and the seeds that have no value."""
        scored = {row.seed for row in self.rows if row.choice == choice and self.metrics[metric][0] in row.metrics}
        without = sorted(scored - set(self.of(choice, metric)))
        noted = f" (no row counted at seed {', '.join(map(str, without))})" if without else ""
        return f"{self.mean(choice, metric) or ('nan' if scored else '-')}{noted}"

    def _adjusted(self, metric: str) -> dict[tuple[str, str], float]:
        found = {pair: self.difference(pair[0], metric, pair[1]) for pair in self.differences()}
        tested = {pair: d.p_value for pair, d in found.items() if d is not None and d.num > 1}
        return dict(zip(tested, holm(list(tested.values())), strict=True))

    def _difference_cell(self, pair: tuple[str, str], metric: str, adjusted: Mapping[tuple[str, str], float]) -> str:
        difference = self.difference(pair[0], metric, pair[1])
        if difference is None:
            return "-"
        sign = "+" if difference.mean >= 0 else "-"
        text = f"{sign}{replace(difference, mean=abs(difference.mean))}"
        if pair not in adjusted:
            return text
        t = difference.t
        return f"{text} (t {t:.1f}, p {adjusted[pair]:.2g})" if abs(t) < 1000 else f"{text} (t above 1000)"

    def _verdict(self, pair: tuple[str, str], metric: str, adjusted: Mapping[tuple[str, str], float]) -> str:
        difference = self.difference(pair[0], metric, pair[1])
        if difference is None or pair not in adjusted:
            return "one seed" if difference else "-"
        if not adjusted[pair] < LEVEL:
            return "not resolved"
        higher, better = difference.mean > 0, self.metrics[metric][1]
        words = ("higher", "lower") if better is None else ("better", "worse")
        return words[higher is (better is False)]

    def title(self, metric: str) -> str:
        """The name of a metric with an arrow in the direction that is better."""
        better = self.metrics[metric][1]
        return metric if better is None else f"{metric} {'↑' if better else '↓'}"

    def _cost_cell(self, choice: str, key: str) -> str:
        value = self.cost(choice, key)
        return "-" if value is None else f"{value * COSTS[key][1]:.3g}"

    @staticmethod
    def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        head, *lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
        return [head, "|---" * len(header) + "|", *lines]

    def _write_csv(self, path: Path) -> None:
        keys = [key for key, _ in self.metrics.values()]
        costs = [key for key in COSTS if any(key in row.costs for row in self.rows)]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["choice", "seed", *keys, *costs, "run", "experiment"])
            for run in self.unfinished:
                writer.writerow([run.choice, run.seed, *[""] * len(keys + costs), str(run), ""])
            for row in self.rows:
                values = [row.metrics.get(key, "") for key in keys] + [row.costs.get(key, "") for key in costs]
                writer.writerow([row.choice, row.seed, *values, row.run, row.experiment])

    def _plot(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        choices, num = self.choices(), len(self.metrics)
        rows = -(-num // _PANELS)
        columns = -(-num // rows)
        size = (max(3.2 * columns, 4), (0.45 * len(choices) + 1.2) * rows + 0.4)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axis in axes.flat[num:]:
            axis.set_visible(False)
        for axis, metric in zip(axes.flat, self.metrics, strict=False):
            for place, choice in enumerate(choices):
                values = list(self.of(choice, metric).values())
                if not values:
                    continue
                mean = interval(values)
                error = None if mean.half != mean.half else [[mean.half], [mean.half]]
                axis.errorbar(mean.mean, place, xerr=error, fmt="o", color=f"C{place}", capsize=4)
                axis.plot(values, [place - 0.18] * len(values), "|", color=f"C{place}", alpha=0.6)
            axis.set_title(self.title(metric), fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(axis="x", alpha=0.3)
        axes[0][0].set_yticks(range(len(choices)), choices)  # for all: they share the axis
        axes[0][0].invert_yaxis()
        figure.suptitle(f"{self.name}: mean and 95 % interval over seeds (ticks: single runs)", fontsize=9)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _latex(text: str) -> str:
    """Text of a cell with what LaTeX would read as commands written out."""
    odd = {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", **{letter: f"\\{letter}" for letter in "&%$#_{}"}}
    written = "".join(odd.get(letter, letter) for letter in text)
    return written.replace("±", r"$\pm$").replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$")
