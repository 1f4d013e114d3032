from pathlib import Path

import pytest

from umm_zoo.comparison.plan import load_plan
from umm_zoo.errors import UserError

BASE = """
name: base
method: {_target_: some.Method, queries: {_target_: some.Learned, num: 4}, width: 8}
data: {_target_: some.Data, seed: "${seed}"}
trainer: {max_steps: 3}
"""
COMPARE = """
question: Which queries?
base: base.yaml
vary: method.queries
choices:
  learned: {value: {_target_: some.Learned, num: 4}}
  noisy: {value: {_target_: some.Noisy}}
seeds: [3, 5]
metrics: {accuracy: val/accuracy, loss: {key: val/loss, better: lower}}
"""


def written(folder: Path, compare: str = COMPARE, **files: str) -> Path:
    (folder / "base.yaml").write_text(BASE)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "queries.yaml").write_text(compare)
    return folder / "queries.yaml"


def test_every_choice_runs_at_every_seed_with_its_value(tmp_path: Path):
    plan = load_plan(written(tmp_path))
    found = [(r.choice, r.seed, r.steps[-1].experiment.method["queries"]["_target_"]) for r in plan.runs]
    assert found == [(c, s, t) for c, t in (("learned", "some.Learned"), ("noisy", "some.Noisy")) for s in (3, 5)]
    assert [r.steps[-1].experiment.data["seed"] for r in plan.runs] == [3, 5, 3, 5]
    assert plan.metrics == {"accuracy": ("val/accuracy", True), "loss": ("val/loss", False)}


def test_identity_follows_content_and_not_the_name(tmp_path: Path):
    first = load_plan(written(tmp_path)).runs[0].steps[-1]
    again = load_plan(written(tmp_path, COMPARE.replace("learned:", "renamed:"))).runs[0].steps[-1]
    other = load_plan(written(tmp_path, COMPARE.replace("num: 4", "num: 6"))).runs[0].steps[-1]
    assert first.identity == again.identity != other.identity


def test_a_choice_may_be_called_anything(tmp_path: Path):
    step = load_plan(written(tmp_path, COMPARE.replace("noisy:", "noisy/1, x^2:"))).runs[-1].steps[-1]
    assert step.experiment.name == f"compare/queries/noisy-1-x-2-seed5-{step.identity}" and step.label == "noisy/1, x^2-seed5"
    numbers = COMPARE.replace("noisy:", "16:") + "contrasts: [[16, learned]]\n"
    assert load_plan(written(tmp_path, numbers)).contrasts == (("16", "learned"),)


def test_another_difference_is_refused_and_named(tmp_path: Path):
    compare = COMPARE.replace("{_target_: some.Noisy}}", "{_target_: some.Noisy}, set: {method.width: 16}}")
    with pytest.raises(UserError, match=r"method\.width: found 8 and 16 in 'learned' and 'noisy'"):
        load_plan(written(tmp_path, compare))


def test_a_difference_under_also_is_allowed(tmp_path: Path):
    compare = COMPARE.replace("{_target_: some.Noisy}}", "{_target_: some.Noisy}, set: {method.width: 16}}")
    plan = load_plan(written(tmp_path, compare + "also: [method.width]\n"))
    assert [run.steps[-1].experiment.method["width"] for run in plan.runs] == [8, 8, 16, 16]


def test_a_difference_in_an_earlier_stage_is_refused(tmp_path: Path):
    stage = "base: base.yaml\nafter: {}.yaml\n"
    files = {"first": BASE, "longer": BASE.replace("max_steps: 3", "max_steps: 9")}
    files |= {"one": stage.format("first"), "two": stage.format("longer")}
    compare = COMPARE.replace("{value: {_target_: some.Learned, num: 4}}", "{experiment: one.yaml}")
    compare = compare.replace("{value: {_target_: some.Noisy}}", "{experiment: two.yaml}")
    with pytest.raises(UserError, match=r"trainer\.max_steps: found 3 and 9 .*stage 1"):
        load_plan(written(tmp_path, compare, **files))


def test_a_shared_earlier_stage_runs_once_per_seed(tmp_path: Path):
    (tmp_path / "first.yaml").write_text(BASE)
    compare = COMPARE.replace("base: base.yaml", "base: second.yaml")
    plan = load_plan(written(tmp_path, compare, second="base: base.yaml\nafter: first.yaml\n"))
    assert [len(run.steps) for run in plan.runs] == [2, 2, 2, 2]
    assert len(plan.steps()) == 2 + 4
    assert plan.runs[0].steps[-1].experiment.after == plan.runs[0].steps[0].experiment.name
    assert [run.steps[0].experiment.seed for run in plan.runs] == [3, 5, 3, 5]


def test_seed_after_seed_and_earlier_stages_first(tmp_path: Path):
    (tmp_path / "first.yaml").write_text(BASE)
    compare = COMPARE.replace("base: base.yaml", "base: second.yaml")
    steps = load_plan(written(tmp_path, compare, second="base: base.yaml\nafter: first.yaml\n")).steps()
    assert [step.label for step in steps] == [f"{name}-seed{seed}" for seed in (3, 5) for name in ("first", "learned", "noisy")]


STAGES = {
    "first": BASE.replace("{_target_: some.Learned, num: 4}", '"${vars.queries}"').replace(
        "max_steps: 3", 'max_steps: "${vars.steps}"'
    )
    + "vars: {width: 6, queries: {_target_: some.Learned, num: 4}, steps: 3}\n",
    "second": "base: first.yaml\nafter: first.yaml\ntrainer: {max_steps: 2}\n",
}
IN_VARS = COMPARE.replace("base: base.yaml", "base: second.yaml").replace(
    "{value: {_target_: some.Noisy}}", '{set: {vars.queries: {_target_: some.Noisy, width: "${vars.width}"}}}'
)


def test_a_variable_of_a_choice_holds_for_its_earlier_stages(tmp_path: Path):
    plan = load_plan(written(tmp_path, IN_VARS, **STAGES))
    found = [[step.experiment.method["queries"] for step in run.steps] for run in plan.runs if run.seed == 3]
    assert found == [[{"_target_": "some.Learned", "num": 4}] * 2, [{"_target_": "some.Noisy", "width": 6}] * 2]


def test_a_variable_hides_no_difference(tmp_path: Path):
    compare = IN_VARS.replace("{vars.queries:", "{vars.steps: 9, vars.queries:")
    with pytest.raises(UserError, match=r"trainer\.max_steps: found 3 and 9 .*stage 1"):
        load_plan(written(tmp_path, compare + "also: [vars]\n", **STAGES))


def test_of_a_choices_other_settings_only_the_place_reaches_earlier_stages(tmp_path: Path):
    plan = load_plan(written(tmp_path, IN_VARS + "set: {trainer.max_steps: 8, trainer.devices: 2}\n", **STAGES))
    trainers = [[step.experiment.trainer for step in run.steps] for run in plan.runs]
    assert trainers == [[{"max_steps": 3, "devices": 2}, {"max_steps": 8, "devices": 2}]] * 4


def test_stages_in_a_circle_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"second\.yaml: after: found a circle second\.yaml \(name second\) -> second\.yaml"):
        load_plan(written(tmp_path, IN_VARS, **STAGES | {"second": "base: first.yaml\nafter: second.yaml\n"}))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{_target_: some.Noisy}", "{_target_: some.Learned, num: 4}", "choices.noisy: found the same experiment as 'learned'"),
        ("vary:", "varry:", "did you mean 'vary'"),
        ("seeds:", "contrasts: [[noisy, lerned]]\nseeds:", r"contrasts\.0: found \['noisy', 'lerned'\], expected two of"),
        ("seeds: [3, 5]", "seeds: [a]", "seeds: found"),
        ("base: base.yaml", "base: bass.yaml", "did you mean 'base.yaml'"),
        ("{value: {_target_: some.Noisy}}", "some.Noisy", "choices.noisy: found 'some.Noisy'"),
        ("better: lower", "better: smaller", "metrics.loss: found"),
        ("  noisy: {value: {_target_: some.Noisy}}\n", "", "choices: found 1 choice"),
    ],
)
def test_user_errors_are_named(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(UserError, match=message):
        load_plan(written(tmp_path, COMPARE.replace(old, new)))
