"""Every experiment file of the repository, against the signatures of the classes it names. Nothing is built, no data is needed."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from umm_zoo.comparison import plan as plans
from umm_zoo.comparison.plan import load_plan, refuse_unknown_metrics
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments").rglob("*.yaml"))


@cache
def read(file: str) -> dict[str, object]:
    tree = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    assert isinstance(tree, dict), f"{file}: found no map"
    return tree


@cache
def bases_of(file: str) -> set[str]:
    stated = read(file).get("base") or []
    bases = [re.sub(r"\$\{vars\.\w+\}", "*", base) for base in ([stated] if isinstance(stated, str) else stated)]
    folder = (ROOT / file).parent
    found = [place for base in bases for place in folder.joinpath(base).parent.resolve().glob(Path(base).name)]
    return {place.relative_to(ROOT).as_posix() for place in found}


@cache
def states_a_method(file: str) -> bool:
    method = read(file).get("method")
    own = isinstance(method, dict) and "_target_" in method
    return own or any(states_a_method(base) for base in bases_of(file))


COMPARISONS = [file for file in FILES if {"question", "choices"} & set(read(file))]
#: What other files build on and that names no method is no experiment of its own.
PARTIAL = {base for file in FILES for base in bases_of(file) if not states_a_method(base)}
EXPERIMENTS = [file for file in FILES if file not in COMPARISONS and file not in PARTIAL]
loaded = cache(load_experiment)


@pytest.mark.parametrize("file", EXPERIMENTS)
def test_experiment_passes_the_check(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment = loaded(file)
    check(experiment)
    if experiment.after is not None and Path(experiment.after).suffix == ".yaml":
        assert experiment.after in EXPERIMENTS


@pytest.mark.parametrize("file", COMPARISONS or [pytest.param("", marks=pytest.mark.skip("no compare files"))])
def test_comparison_is_a_plan_of_experiments_that_pass_the_check(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tree = plans._read(ROOT / file)
    monkeypatch.setattr(plans, "_read", lambda _: {**tree, "seeds": tree["seeds"][:1]})  # others change nothing, and take seconds
    plan = load_plan(file)
    refuse_unknown_metrics(plan)
    for step in plan.steps():
        check(step.experiment)


def test_names_are_those_of_one_run_folder_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = [loaded(file).name for file in EXPERIMENTS]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)


def test_every_file_that_git_lists_is_looked_at() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--", "experiments/*.yaml"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    assert {file for file in listed.stdout.split() if (ROOT / file).exists()} <= {*EXPERIMENTS, *COMPARISONS, *PARTIAL}
    assert len(FILES) == len(EXPERIMENTS) + len(COMPARISONS) + len(PARTIAL) > 0
    assert not list((ROOT / "experiments").rglob("*.yml")), "experiment files end in .yaml"
