"""A benchmark built with the settings of a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umm_zoo.benchmarks import BENCHMARKS
from umm_zoo.errors import UserError, did_you_mean, locating
from umm_zoo.experiment.file import ENVELOPE, Experiment
from umm_zoo.experiment.layers import overridden
from umm_zoo.experiment.trust import Trust
from umm_zoo.experiment.types import TARGET

#: Where the settings stand, for messages.
PLACE = "benchmark"


@dataclass(frozen=True)
class Words:
    """What stands behind ``--benchmark``, sorted.

    Args:
        settings: of the benchmark, with its class.
        given: of generation, by name.
        overrides: over the experiment of the run.
    """

    settings: dict[str, Any]
    given: dict[str, Any]
    overrides: list[str]


def benchmark_class(name: str) -> Any:
    """The class of a name, or at a dotted path.

    Raises:
        UserError: there is none.
    """
    from umm_zoo.benchmarks.base import Benchmark
    from umm_zoo.experiment.targets import find_target

    if name not in BENCHMARKS and "." not in name:
        raise UserError(
            "--benchmark", f"'{name}'", f"{', '.join(BENCHMARKS)}, or the path of a class", did_you_mean(name, BENCHMARKS)
        )
    with locating(place="--benchmark"):
        found = find_target(BENCHMARKS.get(name, name)).call
    if not (isinstance(found, type) and issubclass(found, Benchmark)):
        raise UserError("--benchmark", f"'{name}'", "a subclass of umm_zoo.benchmarks.base.Benchmark")
    return found


def sort_words(name: str, words: Sequence[str]) -> Words:
    """Settings of a benchmark, settings of generation, and overrides of the experiment, by their first names.

    A word without ``=`` is a file of settings.

    Raises:
        UserError: a name that none of them has.
    """
    from umm_zoo.benchmarks.running import OWN
    from umm_zoo.experiment.targets import find_target
    from umm_zoo.generation import COMMANDS

    kind = benchmark_class(name)
    own = find_target(path := BENCHMARKS.get(name, name)).hints
    generation = {**OWN, **{option: 0 for command in COMMANDS.values() for option in command.options}}
    tree: dict[str, Any] = {PLACE: {TARGET: path}}
    given: dict[str, Any] = {}
    overrides: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        top = key.split(".")[0]
        if not equals:
            tree[PLACE] |= _settings_in(Path(word))
        elif key in generation:
            given[key] = value
        elif top in own:
            tree = overridden(tree, f"{PLACE}.{word}", "", [PLACE], Trust())
        elif top in ENVELOPE and "." in key:
            overrides.append(word)
        else:
            known = [*own, *generation]
            raise UserError(key, f"a setting that {kind.__name__} does not have", ", ".join(known), did_you_mean(top, known))
    return Words(tree[PLACE], given, overrides)


def build_benchmark(words: Words, experiment: Experiment | None = None) -> Any:
    """The benchmark, with what a run gives where the command line says nothing.

    Raises:
        UserError: a setting does not fit, or is missing.
    """
    from umm_zoo.benchmarks.base import Benchmark
    from umm_zoo.experiment.build import build
    from umm_zoo.experiment.check import check_node

    kind = benchmark_class(words.settings[TARGET])
    given = {} if experiment is None else kind.of_run(experiment)
    from_run = {name: value for name, value in given.items() if name not in words.settings}
    node = {**words.settings, **from_run}
    check_node(node, Benchmark, "", experiment.trust if experiment and from_run else Trust())  # a run may be a stranger's
    return build(node, PLACE)


def _settings_in(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # no file, no UTF-8, too deep, no YAML
        raise UserError(file, f"no readable map ({type(error).__name__})", "a YAML file of settings, or key=value") from error
    if not isinstance(found, Mapping) or TARGET in found:
        raise UserError(file, "no map of settings", "the arguments of the benchmark, by name")
    return found
