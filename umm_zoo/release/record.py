"""What a card says of a run: recipe, costs, data, scores, and what its parts were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import umm_zoo
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build
from umm_zoo.experiment.file import load_experiment
from umm_zoo.experiment.trust import trusting
from umm_zoo.release.card import licence_of, world_of
from umm_zoo.release.parts import LibraryPart
from umm_zoo.training.finished_run import FinishedRun, load_run
from umm_zoo.training.validation import validate


def report_of(run: FinishedRun, source: Path) -> dict[str, Any]:
    """The record of a finished run; of a checkpoint that is named itself what it says of itself.

    Raises:
        UserError: the run has not finished, or its scores are of other weights than its checkpoint holds.
    """
    step = run.checkpoint.get("global_step")
    file = run.path / "metrics.json"
    if not source.is_dir():  # whoever names a checkpoint wants it, finished or not
        experiment = run.experiment
        return {"experiment": str(experiment.file), "steps": step, "seed": experiment.seed, "seconds": None, "metrics": {}}
    if "exported" in run.checkpoint:
        raise UserError(source, "an exported method", "the run that it was made from")
    if not file.is_file():
        advice = "go on with ckpt=last, or name one of its checkpoints, whose card then states no scores"
        raise UserError(source, "no metrics.json", "a run that has finished", advice)
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if step is not None and report.get("steps") not in (None, step):
        found = f"scores of step {report['steps']} and weights of step {step}"
        raise UserError(source, found, "a run that has finished", "go on with ckpt=last")
    return report


def earlier(experiment: Mapping[str, Any], runs: Path) -> list[dict[str, Any]]:
    """Costs of the stages before this one, the first one first, as far as they are files with runs beside this one."""
    after = experiment.get("after")
    if not after or Path(after).suffix not in (".yaml", ".yml") or not Path(after).is_file():
        return []
    stage = load_experiment(after)
    report = runs / stage.name / "metrics.json"
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    return [*earlier(stage.resolved(), runs), *([{key: found[key] for key in ("experiment", "steps", "seconds")}] if found else [])]


def sources_of(data: Mapping[str, Any], run: Path) -> list[dict[str, Any]]:
    """The shards of a run, and how many samples of them it has read."""
    file = run / "data.json"
    counts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = []
    for split in ("train", "val"):
        for name, source in (data.get(split) or {}).items():
            if not isinstance(source, Mapping) or "shards" not in source:  # left out here, or data of another kind
                continue
            numbers = counts.get(split, {}).get(name, {})
            read = {key: numbers.get(key) for key in ("samples", "read")}
            found.append({"split": split, "name": name, "shards": source["shards"], **read})
    return found


def test_shards(data: Mapping[str, Any]) -> dict[str, str]:
    """The test split's shards of each validation source.

    Raises:
        UserError: a source has no folder ``val`` to be replaced.
    """
    found = {}
    for name, source in (data.get("val") or {}).items():
        shards = str(source["shards"])
        if "/val/" not in shards:
            raise UserError(f"data.val.{name}.shards", f"'{shards}'", "for --test a path with /val/ in it")
        found[name] = shards.replace("/val/", "/test/")
    return found


def test_scores(run: FinishedRun, source: Path, stored: Mapping[str, Any], trust: Sequence[str], raw: bool) -> dict[str, Any]:
    """Scores on the test split of the weights as they are stored, by their keys in the method.

    Raises:
        UserError: there is no test split.
    """
    shards = test_shards(run.experiment.data)
    loaded = load_run(source, [f"data.val.{name}.shards={pattern}" for name, pattern in shards.items()], trust, raw)
    with trusting(loaded.experiment.named_modules):
        nodes = {name: build(node) for name, node in loaded.experiment.data["val"].items()}
    samples = sum(len(node.open(name)) for name, node in nodes.items())
    loaded.state = {**loaded.state, **stored}
    return {"samples": samples, "metrics": named(validate(loaded))}


def named(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The validation scores among a run's metrics, without their prefix."""
    return {name.removeprefix("val/"): value for name, value in sorted(metrics.items()) if name.startswith("val/")}


def part_record(part: LibraryPart, folder: str) -> dict[str, Any]:
    """What the card says of one folder."""
    network = type(part.network)
    library = network.__module__.partition(".")[0]
    return {
        "folder": folder,
        "class": f"{type(part.module).__module__}.{type(part.module).__qualname__}",
        "network": f"{library}.{network.__name__}",
        "parameters": sum(p.numel() for p in part.module.parameters()),
        "made_from": part.source,
        "licence": licence_of(part.source),
    }


def run_record(run: FinishedRun, source: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe, costs, circumstances, scores and data of a run."""
    experiment = run.experiment
    sources = sources_of(experiment.data, run.path)
    depth = len(Path(experiment.name).parts)
    folders = run.path.resolve().parents
    stages = earlier(run.checkpoint["experiment"], folders[depth - 1]) if source.is_dir() and depth <= len(folders) else []
    worlds = {str(Path(found["shards"]).parent.parent): world_of(found["shards"]) for found in sources}
    file, seconds = report.get("experiment"), report.get("seconds")
    command = f"python -m umm_zoo.fit {file}"
    shipped = Path(str(file)).parent.as_posix() == "experiments/tiny"
    tiny = f"bash tools/train_tiny.sh {Path(str(file)).stem.removesuffix('-decoder')}"
    return {
        "recipe": {
            "experiment": file,
            "command": command,
            "again": tiny if shipped else f"{command} --again",
            "steps": report.get("steps"),
            "batch_size": experiment.data.get("batch_size"),
            "seed": report.get("seed"),
            "after": stages,
        },
        "seconds": None if seconds is None else round(seconds + sum(stage["seconds"] for stage in stages), 1),
        "commit": report.get("commit", "not stated"),
        "versions": report.get("versions", {"umm_zoo": umm_zoo.__version__}),
        "machine": report.get("machine", {"system": "a machine that is not stated", "cpus": "?", "threads": "?"}),
        "scores": {
            "val": {
                "samples": sum(found["samples"] or 0 for found in sources if found["split"] == "val"),
                "metrics": named(report.get("metrics", {})),
            }
        },
        "probes": [],
        "worlds": [world for world in worlds.values() if world],
        "sources": sources,
    }
