"""A finished run as commands read it: its checkpoint and the experiment inside."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_zoo.checkpoints.folder import checkpoint_path
from umm_zoo.errors import UserError, locating, say, several
from umm_zoo.experiment.file import Experiment, experiment_from
from umm_zoo.experiment.importing import importing
from umm_zoo.experiment.reach import leave_out, say_fetched
from umm_zoo.experiment.trust import users_modules
from umm_zoo.experiment.types import TARGET
from umm_zoo.training.ranks import launched_ranks

if TYPE_CHECKING:
    from umm_zoo.generation.model import Model
    from umm_zoo.method import Method


@dataclass
class FinishedRun:
    """A finished run.

    Args:
        path: the run folder, or the folder of the checkpoint.
        checkpoint: the loaded checkpoint.
        experiment: the experiment inside it, with the overrides of the command line.
        state: the run's weights (see ``weights_of``).
        weights: which they are, ``averaged`` or ``raw``.
    """

    path: Path
    checkpoint: dict[str, Any]
    experiment: Experiment
    state: dict[str, Any]
    weights: str

    def load_method(self) -> Method:
        """Its method with its weights, in evaluation mode; nothing else of the experiment is built.

        Raises:
            UserError: a constructor refused its arguments, or the weights do not fit.
        """
        from umm_zoo.experiment.build import build_method
        from umm_zoo.experiment.trust import trusting

        with locating(self.path), trusting(self.experiment.named_modules):
            method: Method = build_method(self.experiment.method_tree)
            method.load_weights(self.state)
        method.use_data_of({"data": self.experiment.data}, self.path, self.experiment.named_modules)
        return method.eval()

    def load_model(self, device: str = "cpu") -> Model:
        """Its method on a device, ready for requests, as every command puts them to it.

        Raises:
            UserError: see ``load_method``, or there is no such device.
        """
        from umm_zoo.generation.model import Model
        from umm_zoo.generation.similarities import Similarities, encoder_nodes

        method = self.load_method()
        model = Model.of(method, method.run_data, device)
        trust = self.experiment.named_modules
        model.similarities = Similarities(encoder_nodes(self.experiment.metrics), self.path, trust, device)
        return model


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option of a command that builds the experiment of weights."""
    parser.add_argument(
        "--trust",
        metavar="MODULE",
        action="append",
        default=[],
        help="let the experiment inside the weights name classes of this module of yours, which is imported, and so run",
    )


def add_raw_weights(parser: argparse.ArgumentParser) -> None:
    """The option of a command that uses weights of a run."""
    text = "the weights in training, where the run also keeps their averages (the default then, and what its scores are of)"
    parser.add_argument("--raw-weights", action="store_true", help=text)


def load_run(
    source: str | Path, overrides: Sequence[str] = (), trust: Sequence[str] = (), raw_weights: bool = False
) -> FinishedRun:
    """Read a run's checkpoint, and its experiment with ``key=value`` overrides; everything is checked, nothing built.

    Args:
        source: run folder or checkpoint.
        overrides: over the experiment.
        trust: modules beside this package whose classes the experiment may name: they are imported, and so run.
        raw_weights: the weights in training, in place of their averages.

    Raises:
        UserError: no checkpoint there, or an override that does not fit.
    """
    with importing():
        from umm_zoo.checkpoints.files import load_checkpoint, weights_of
        from umm_zoo.experiment.check import check

    several("overrides", overrides)
    several("trust", trust)
    checkpoint = load_checkpoint(source)
    if "experiment" not in checkpoint:
        expected = "a run folder or a checkpoint that umm_zoo.fit has written"
        raise UserError(source, "a checkpoint without its experiment", expected)
    if "exported" in checkpoint and set(checkpoint["experiment"]) == {"method"}:
        expected = "a run, or a whole method that umm_zoo.export has written"
        raise UserError(source, "a codec alone", expected, "load_codec of its method takes it, as its card says")
    for key in (text.partition("=")[0] for text in overrides):
        if key.split(".")[0] in ("vars", "after"):
            raise UserError(f"{source}: {key}", "a key that has done its work", "those that it was filled into")
    named = [path for text in overrides for path in re.findall(rf"{TARGET}\s*[=:]\s*['\"]?([\w.]+)", text)]
    trust = [*trust, *sorted(users_modules([{TARGET: path} for path in named]))]
    experiment = experiment_from(checkpoint["experiment"], source, (), overrides, trust)
    most = {"data.num_workers": os.cpu_count() or 1, "trainer.num_nodes": launched_ranks()}
    leave_out({"data": experiment.data, "trainer": experiment.trainer}, source, overrides, most)
    check(experiment)
    say_fetched({**experiment.method_tree, "data": {"val": experiment.data.get("val")}, "metrics": experiment.metrics}, source)
    is_folder = "exported" in checkpoint or (Path(source) / "checkpoints").is_dir()
    folder = Path(source) if is_folder else checkpoint_path(source).parent
    state, weights = weights_of(checkpoint, raw_weights)
    if weights == "averaged" or raw_weights:
        say(f"{source}: {weights} weights", stderr=True)
    return FinishedRun(folder.parent if folder.name == "checkpoints" else folder, checkpoint, experiment, state, weights)
