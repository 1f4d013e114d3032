"""Plan of a comparison: choices times seeds, each a resolved experiment, and proof that nothing else differs between them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from umm_zoo.errors import Problem, UserError, did_you_mean, locating, say
from umm_zoo.experiment.file import Experiment, earlier_stages, load_experiment
from umm_zoo.experiment.importing import importing
from umm_zoo.experiment.layers import read_map
from umm_zoo.experiment.shipped import located
from umm_zoo.training.run_folder import few

_KINDS: dict[str, type] = {
    **dict.fromkeys(("question", "decision", "base", "vary"), str),
    **dict.fromkeys(("also", "contrasts", "seeds"), list),
    **dict.fromkeys(("choices", "metrics", "set"), dict),
}
#: Which way a metric is better, as a file says it; what has a right value between, or none, is better in neither.
_BETTER = {"higher": True, "lower": False, "neither": None}
_NEEDED = ("question", "base", "vary", "choices", "seeds", "metrics")
_WORDS: dict[type, str] = {str: "text", list: "list", dict: "map"}


@dataclass(frozen=True)
class Step:
    """Training run of a plan, after the stage ``below``; its experiment has the run's name and the run folder of ``after``.

    ``identity`` is a hash of the resolved experiment and of those it stands on, names aside; ``label`` is for progress lines.
    """

    experiment: Experiment
    identity: str
    label: str
    below: Step | None = None

    def stages(self) -> list[Step]:
        """The steps that it stands on, the nearest first."""
        return [] if self.below is None else [self.below, *self.below.stages()]


@dataclass(frozen=True)
class PlannedRun:
    """Choice at a seed: the steps in the order they run, the last one being scored."""

    choice: str
    seed: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """Checked compare file.

    Args:
        metrics: printed name -> (key in metrics.json, whether higher is better; None where neither is).
        runs: choices in the file's order, seeds inside.
        contrasts: pairs of choices whose difference is of interest besides those to the first choice.
    """

    name: str
    file: str
    question: str
    decision: str
    metrics: dict[str, tuple[str, bool | None]]
    runs: tuple[PlannedRun, ...]
    contrasts: tuple[tuple[str, str], ...] = ()

    def steps(self) -> list[Step]:
        """Every step once: seed after seed, so that whole pairs finish first, and inside a seed earlier stages first."""
        seeds = {run.seed: place for place, run in reversed(list(enumerate(self.runs)))}
        staged = [(seeds[run.seed], depth, step) for run in self.runs for depth, step in enumerate(run.steps)]
        return list({step.identity: step for _, _, step in sorted(staged, key=lambda entry: entry[:2])}.values())


def load_plan(file: str | Path, made: Mapping[str, str] | None = None) -> Plan:
    """Read a compare file, resolve every choice at every seed, refuse what differs outside ``vary`` and ``also``.

    ``made`` has the names, by identity, of runs that are finished already, for this comparison or another, and are not made again.
    """
    file = located(file)
    tree = _read(file)
    allowed = [tree["vary"], *tree.get("also", [])]
    choices = {name: _choice_overrides(file, tree, name, choice) for name, choice in tree["choices"].items()}
    runs, reference = [], None
    for name, (experiment, overrides) in choices.items():
        for seed in tree["seeds"]:
            scored = load_experiment(experiment, [*overrides, f"seed={seed}"])
            chain = [*reversed(earlier_stages(scored, planned=True)), scored]
            if reference is None:
                reference = (name, chain)
            if seed == tree["seeds"][0]:
                _refuse_other_differences(file, allowed, reference, (name, chain))
            runs.append(PlannedRun(name, seed, _steps(chain, f"compare/{file.stem}", f"{name}-seed{seed}", made or {})))
    _refuse_equal_choices(file, runs)
    metrics = {str(printed): _metric(file, printed, value) for printed, value in tree["metrics"].items()}
    contrasts = tuple((str(a), str(b)) for a, b in tree.get("contrasts", []))
    return Plan(file.stem, str(file), tree["question"], tree.get("decision", ""), metrics, tuple(runs), contrasts)


def _read(file: Path) -> dict[str, Any]:
    tree = read_map(file, list(_KINDS), "a compare file")
    problems = []
    for key, kind in _KINDS.items():
        if not isinstance(tree.get(key, kind()), kind) or (key in _NEEDED and not tree.get(key)):
            empty = ", not an empty one" if key in _NEEDED else ""
            problems.append(Problem(key, repr(tree.get(key)), f"a {_WORDS[kind]}{empty}"))
    if not problems:
        tree["choices"] = {str(name): choice for name, choice in tree["choices"].items()}
    if not problems and not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in tree["seeds"]):
        problems.append(Problem("seeds", repr(tree["seeds"]), "a list of whole numbers"))
    for place, pair in enumerate(tree.get("contrasts", []) if not problems else []):
        if not isinstance(pair, list) or len(pair) != 2 or any(str(name) not in tree["choices"] for name in pair):
            expected = f"two of the choices {', '.join(map(repr, tree['choices']))}"
            problems.append(Problem(f"contrasts.{place}", repr(pair), expected))
    if not problems and len(tree["choices"]) < 2:
        problems.append(Problem("choices", f"{len(tree['choices'])} choice", "two or more"))
    if problems:
        raise UserError(file, problems)
    return tree


def _choice_overrides(file: Path, tree: Mapping[str, Any], name: str, choice: Any) -> tuple[Path, list[str]]:
    """The experiment file of a choice and its overrides in the order they apply."""
    where = f"choices.{name}"
    fits = isinstance(choice, dict) and choice and set(choice) <= {"experiment", "value", "set"}
    if not fits or not isinstance(choice.get("set", {}), dict):
        expected = "a map with 'value' (put at the varied path), 'experiment' (a file) or 'set' (path: value)"
        raise UserError(file, [Problem(where, repr(choice), expected)])
    settings = list(tree.get("set", {}).items())
    if "value" in choice:
        settings += [(tree["vary"], None), (tree["vary"], choice["value"])]  # a map over null is that map, and merges with nothing
    settings += choice.get("set", {}).items()
    with locating(place=where if "experiment" in choice else "base", file=str(file)):
        experiment = located(str(choice.get("experiment", tree["base"])), file.parent)
    return experiment, [
        f"{path}={yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix('...' + chr(10)).strip()}"
        for path, value in settings
    ]


def _metric(file: Path, printed: str, value: Any) -> tuple[str, bool | None]:
    if isinstance(value, str):
        return value, True
    if isinstance(value, dict) and set(value) == {"key", "better"} and value["better"] in list(_BETTER):
        return str(value["key"]), _BETTER[value["better"]]
    expected = f"a key of metrics.json, or {{key: …, better: {', '.join(_BETTER)}}}"
    raise UserError(file, [Problem(f"metrics.{printed}", repr(value), expected)])


def refuse_unknown_metrics(plan: Plan) -> None:
    """Refuse, before hours of training, a score of validation that no choice makes, as far as their metrics tell.

    Choices may differ in what they score: ROSS's baseline reconstructs nothing. A note says whose places stay empty.

    Raises:
        UserError: names the metrics.
    """
    with importing():  # torch comes in here, after the errors of the files
        from umm_zoo.metrics.scores import logged_names, unknown_score
        from umm_zoo.training.setup import metrics_of

    problems, scored = [], {run.choice: run.steps[-1].experiment for run in plan.runs}
    made = {choice: metrics_of(experiment) for choice, experiment in scored.items()}
    for printed, (key, _) in plan.metrics.items():
        prefix, _, score = key.partition("/")
        if prefix != "val":
            continue
        meant = {choice: guess for choice, metrics in made.items() if (guess := unknown_score(score, metrics)) is not None}
        if len(meant) < len(made):
            if meant:
                say(f"note: metrics.{printed}: not scored by {few(list(meant))}: '-' in the tables", stderr=True)
            continue
        names = dict.fromkeys(f"val/{name}" for metrics in made.values() for name in logged_names(metrics))
        guess = next(filter(None, meant.values()), "")
        expected = ", ".join(names) or "a metric"
        problems.append(
            Problem(f"metrics.{printed}", f"'{key}', which no choice scores", expected, did_you_mean(guess and f"val/{guess}"))
        )
    if problems:
        raise UserError(plan.file, problems)


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _comparable(experiment: Experiment) -> dict[str, Any]:
    """Everything that decides a run's outcome besides its place in the chain."""
    return {key: value for key, value in experiment.resolved().items() if key not in ("name", "after", "vars", "loggers")}


def _refuse_other_differences(
    file: Path, allowed: list[str], first: tuple[str, list[Experiment]], other: tuple[str, list[Experiment]]
) -> None:
    if len(first[1]) != len(other[1]):
        found = f"{len(other[1])} stages in '{other[0]}', {len(first[1])} in '{first[0]}'"
        raise UserError(file, [Problem("choices", found, "choices with equally many stages")])
    missing, problems = object(), []
    for stage, (a, b) in enumerate(zip(first[1], other[1], strict=True)):
        left, right = dict(_flat(_comparable(a))), dict(_flat(_comparable(b)))
        for path in dict.fromkeys([*left, *right]):
            same = left.get(path, missing) == right.get(path, missing)
            if same or any(path == base or path.startswith(base + ".") for base in allowed):
                continue
            values = " and ".join("nothing" if side.get(path, missing) is missing else repr(side[path]) for side in (left, right))
            found = f"{values} in '{first[0]}' and '{other[0]}'" + (f" (stage {stage + 1})" if len(first[1]) > 1 else "")
            expected = f"differences below {', '.join(allowed)} only; list it under 'also' if it is meant"
            problems.append(Problem(path, found, expected))
    if problems:
        raise UserError(file, problems)


def _refuse_equal_choices(file: Path, runs: list[PlannedRun]) -> None:
    """Two names for one experiment are a slip: the difference between them would be exactly zero."""
    names: dict[str, str] = {}
    for run in runs:
        known = names.setdefault(run.steps[-1].identity, run.choice)
        if known != run.choice:
            raise UserError(file, [Problem(f"choices.{run.choice}", f"the same experiment as '{known}'", "choices that differ")])


def _steps(chain: list[Experiment], folder: str, label: str, made: Mapping[str, str]) -> tuple[Step, ...]:
    steps: list[Step] = []
    for depth, experiment in enumerate(chain):
        below = steps[-1] if steps else None
        content = json.dumps([_comparable(experiment), below.identity if below else experiment.after], sort_keys=True)
        identity = hashlib.sha256(content.encode()).hexdigest()[:12]
        stage = label if depth == len(chain) - 1 else Path(experiment.file).stem + f"-seed{experiment.seed}"
        own = f"{folder}/{re.sub(r'[^A-Za-z0-9._-]+', '-', stage)}-{identity}"  # a choice may be called anything
        name = made.get(identity, own)
        after = below.experiment.name if below else experiment.after
        steps.append(Step(replace(experiment, name=name, after=after), identity, stage, below))
    return tuple(steps)
