"""``python -m umm_zoo.evaluate RUN [SUITE] [key=value …]``: score a finished run, on its own validation shards or on others."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umm_zoo.errors import REFUSALS, Problem, UserError, did_you_mean, locating, user_errors
from umm_zoo.experiment.file import Experiment, experiment_from
from umm_zoo.training.ranks import ending_together, is_main_process, join_ranks
from umm_zoo.training.report import circumstances
from umm_zoo.training.run_folder import runs_folder, writing

HELP = """examples:
  python -m umm_zoo.evaluate runs/llava                                   the run's own validation shards
  python -m umm_zoo.evaluate runs/llava data.val.photos.shards=/data/test  other shards
  python -m umm_zoo.evaluate runs/llava trainer.limit_val_batches=10       a part of them
  python -m umm_zoo.evaluate runs/uae/toy/stage2 unified-bench images [encoders.yaml]   caption, redraw, compare

The method is rebuilt from the experiment inside the checkpoint; key=value changes it. Scores are printed and written to
evaluation-<n>.json in the run folder."""

#: Trainer arguments that matter to a validation; the others belong to training.
_TRAINER_KEYS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "limit_val_batches",
    "inference_mode",
    "deterministic",
)


@dataclass
class FinishedRun:
    """A run to be scored.

    Args:
        path: the run folder, or the folder of the checkpoint.
        checkpoint: the loaded checkpoint.
        experiment: the experiment inside it, with the overrides of the command line.
        arguments: words after the name of the suite.
    """

    path: Path
    checkpoint: dict[str, Any]
    experiment: Experiment
    arguments: list[str]


#: Scores of a run by name.
Suite = Callable[[FinishedRun], Mapping[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.evaluate",
        description="Score a finished run.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("words", nargs="*", metavar="SUITE | key=value", help=f"what to score ({', '.join(SUITES)}) and overrides")
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    arguments = parser.parse_intermixed_args(argv)
    with user_errors(arguments.traceback) as outcome, ending_together(runs_folder(), arguments.traceback):
        overrides = [word for word in arguments.words if "=" in word]
        suite, *rest = [word for word in arguments.words if "=" not in word] or ["validation"]
        evaluate(arguments.run, suite, rest, overrides)
    return outcome.code


def evaluate(source: str | Path, suite: str = "validation", arguments: Sequence[str] = (), overrides: Sequence[str] = ()) -> Path:
    """Score a run, print the table, and return the file that was written.

    Raises:
        UserError: no such run or suite, or an override that does not fit.
    """
    if suite not in SUITES:
        raise UserError(source, [Problem("", f"an unknown suite '{suite}'", ", ".join(SUITES), did_you_mean(suite, SUITES))])
    run = load_run(source, overrides)
    run.arguments = list(arguments)
    began = time.monotonic()
    scores = {name: float(value) for name, value in SUITES[suite](run).items()}
    report = {
        "run": run.experiment.name,
        "suite": suite,
        "step": run.checkpoint["global_step"],
        "arguments": list(arguments),
        "overrides": list(overrides),
        "seconds": round(time.monotonic() - began, 2),
        "metrics": scores,
        **circumstances(),
    }
    taken = [path.stem.partition("-")[2] for path in run.path.glob("evaluation-*.json")]
    number = 1 + max((int(text) for text in taken if text.isdecimal()), default=0)  # a user's own copies have other names
    file = run.path / f"evaluation-{number}.json"
    if is_main_process():
        _print_table(f"{run.experiment.name}, step {report['step']}, {suite}", scores)  # first: scoring may have taken hours
        with writing(run.path, "a run folder that can be written"):
            file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {file}")
    return file


def load_run(source: str | Path, overrides: Sequence[str] = ()) -> FinishedRun:
    """Read a run's checkpoint, and its experiment with ``key=value`` overrides; everything is checked, nothing built.

    Raises:
        UserError: no checkpoint there, or an override that does not fit.
    """
    from umm_zoo.checkpoints.files import load_checkpoint
    from umm_zoo.checkpoints.folder import checkpoint_path
    from umm_zoo.experiment.check import check

    checkpoint = load_checkpoint(source)
    if "experiment" not in checkpoint:
        raise UserError(source, "a checkpoint without its experiment", "a run folder or a checkpoint that umm_zoo.fit has written")
    for key in (text.partition("=")[0] for text in overrides):
        if key.split(".")[0] in ("vars", "after"):
            raise UserError(source, [Problem(key, "a key that has done its work", "those that it was filled into")])
    experiment = experiment_from(checkpoint["experiment"], source, checkpoint.get("folders", ()), overrides)
    check(experiment)
    folder = Path(source) if (Path(source) / "checkpoints").is_dir() else checkpoint_path(source).parent
    return FinishedRun(folder.parent if folder.name == "checkpoints" else folder, checkpoint, experiment, [])


def validation(run: FinishedRun) -> dict[str, float]:
    """The experiment's metrics over its validation data, as in training (with averaged weights where training used them)."""
    from lightning import Trainer, seed_everything
    from lightning.pytorch.callbacks import Checkpoint

    from umm_zoo.callbacks.metrics import MetricCallback
    from umm_zoo.experiment.build import build_arguments, build_experiment
    from umm_zoo.experiment.targets import find_target
    from umm_zoo.training.record import RunRecord
    from umm_zoo.training.trainer import quieten

    quieten()
    experiment = run.experiment
    seed_everything(experiment.seed, workers=True, verbose=False)
    built = build_experiment(experiment)
    with locating(experiment.file, refusals=REFUSALS):
        built.method.carry(run.checkpoint["state_dict"])
    record = RunRecord(experiment)
    callbacks: list[Any] = [record, MetricCallback(built.metrics, show_table=False)]
    for callback in built.callbacks.values():
        state = run.checkpoint.get("callbacks", {}).get(callback.state_key)
        if state and not isinstance(callback, Checkpoint):
            callback.load_state_dict(state)
            callbacks.append(callback)
    kept = {key: value for key, value in experiment.trainer.items() if key in _TRAINER_KEYS}
    given = build_arguments(find_target("lightning.Trainer"), kept, "trainer")
    trainer = Trainer(
        **{"use_distributed_sampler": False, **given},
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=run.path,
    )
    join_ranks(trainer)
    with record.judging():
        trainer.validate(built.method, datamodule=built.data, verbose=False)
    return {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}


def unified_bench(run: FinishedRun) -> Mapping[str, float]:
    """See ``umm_zoo.benchmarks.unified_bench``."""
    from umm_zoo.benchmarks.unified_bench import unified_bench as score

    return score(run)


#: What ``evaluate RUN SUITE`` can score; a suite gets the loaded run and the words after its name.
SUITES: dict[str, Suite] = {"validation": validation, "unified-bench": unified_bench}


def _print_table(title: str, scores: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
