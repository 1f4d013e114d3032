"""How an experiment comes together: bases, overrides, interpolation."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from umm_zoo.errors import UserError
from umm_zoo.experiment.file import Experiment, earlier_stages, experiment_from, load_experiment
from umm_zoo.experiment.layers import merge


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(
        """
name: big
seed: 5
vars: {width: 8}
method:
  _target_: a.Method
  block: {_target_: a.Block, dim: "${vars.width}", depth: 2}
  sizes: [1, 2, 3]
callbacks: {samples: {_target_: a.Samples}, ema: {_target_: a.EMA, decay: 0.9}}
trainer: {max_steps: 100}
"""
    )
    return tmp_path


def child(folder: Path, text: str, *overrides: str) -> Experiment:
    (folder / "child.yaml").write_text(f"base: base.yaml\n{text}")
    return load_experiment("child.yaml", overrides)


def test_maps_merge_and_lists_are_replaced(folder: Path) -> None:
    method = child(folder, "method: {block: {depth: 4}, sizes: [9]}").method
    assert method == {"_target_": "a.Method", "block": {"_target_": "a.Block", "dim": 8, "depth": 4}, "sizes": [9]}


def test_another_target_replaces_the_node_whole(folder: Path) -> None:
    assert child(folder, "method: {block: {_target_: b.Other, heads: 2}}").method["block"] == {"_target_": "b.Other", "heads": 2}


def test_the_same_target_merges(folder: Path) -> None:
    assert child(folder, "method: {block: {_target_: a.Block, depth: 7}}").method["block"]["dim"] == 8


def test_null_removes_a_callback_and_is_none_as_an_argument(folder: Path) -> None:
    experiment = child(folder, "callbacks: {ema: null}\nmethod: {block: {dim: null}}")
    assert list(experiment.callbacks) == ["samples"]
    assert experiment.method["block"]["dim"] is None


def test_name_is_not_inherited(folder: Path) -> None:
    assert load_experiment("base.yaml").name == "big"
    assert child(folder, "").name == "child"
    assert child(folder, "name: mine").name == "mine"


def test_interpolation_sees_every_layer(folder: Path) -> None:
    assert child(folder, "vars: {width: 16}").method["block"]["dim"] == 16
    assert child(folder, "vars: {width: 16}", "vars.width=32").method["block"]["dim"] == 32
    assert child(folder, "vars: {steps: '${trainer.max_steps}'}", "trainer.max_steps=7").vars["steps"] == 7


def test_later_bases_win(folder: Path) -> None:
    (folder / "fast.yaml").write_text("trainer: {max_steps: 3}\nseed: 1")
    (folder / "both.yaml").write_text("base: [base.yaml, fast.yaml]\nseed: 2")
    both = load_experiment("both.yaml")
    assert (both.trainer["max_steps"], both.seed, both.vars["width"]) == (3, 2, 8)


def test_two_files_may_share_a_base(folder: Path) -> None:
    (folder / "left.yaml").write_text("base: base.yaml\nseed: 1")
    (folder / "right.yaml").write_text("base: base.yaml\nvars: {width: 4}")
    (folder / "both.yaml").write_text("base: [left.yaml, right.yaml]")
    assert load_experiment("both.yaml").vars["width"] == 4


def test_base_and_after_are_relative_to_their_own_file(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "stage.yaml").write_text("base: ../base.yaml\nafter: first.yaml")
    (folder / "top.yaml").write_text("base: deep/stage.yaml")
    top = load_experiment("top.yaml")
    assert top.after == "deep/first.yaml"
    assert top.folders == [str(folder), str(folder / "deep")]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("method.rate=1e-3", 0.001),
        ("method.rate=3", 3),
        ("method.rate=true", True),
        ("method.rate=null", None),
        ("method.rate=[1, a]", [1, "a"]),
        ("method.rate={x: 1}", {"x": 1}),
        ("method.rate=a=b", "a=b"),
        ("method.rate=", None),
        ("method.rate=${seed}", 5),
    ],
)
def test_override_values_are_yaml(override: str, value: object, folder: Path) -> None:
    found = child(folder, "", override).method["rate"]
    assert found == value and type(found) is type(value)


def test_override_may_exchange_a_class_and_then_set_its_arguments(folder: Path) -> None:
    experiment = child(folder, "", "method.block._target_=b.Other", "method.block.heads=3")
    assert experiment.method["block"] == {"_target_": "b.Other", "heads": 3}


def test_another_class_keeps_the_arguments_it_takes_and_the_others_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, stream = "data_pipelines.shards.data.ShardData", "data_pipelines.shards.streaming.StreamData"
    given = f"data: {{_target_: {shards}, image_size: 48, window: 3, cache_gb: 7.5}}"
    experiment = child(folder, given, f"data._target_={stream}", "data.buffer=5")
    assert experiment.data == {"_target_": stream, "image_size": 48, "buffer": 5}
    note = capsys.readouterr().err
    assert "note: data: StreamData in the place of ShardData; what falls away: window, cache_gb" in " ".join(note.split())
    assert child(folder, given, f"data={{_target_: {stream}, seed: 2}}").data == {"_target_": stream, "seed": 2}
    assert "what falls away: image_size, window, cache_gb" in " ".join(capsys.readouterr().err.split())


def test_override_may_add_and_remove_a_callback(folder: Path) -> None:
    experiment = child(folder, "", "callbacks.ema=null", "callbacks.mine={_target_: c.Mine}", "callbacks.mine.file=x")
    assert experiment.callbacks == {"samples": {"_target_": "a.Samples"}, "mine": {"_target_": "c.Mine", "file": "x"}}


def test_what_is_written_reads_back_the_same(folder: Path) -> None:
    experiment = child(folder, "vars: {rate: 1e-5, text: 'on', none: null, word: 'größe'}")
    (folder / "stored.yaml").write_text(experiment.to_yaml())
    assert load_experiment("stored.yaml").resolved() == experiment.resolved()
    assert yaml.safe_load(experiment.to_yaml()) == experiment.resolved()


def test_merge_leaves_its_arguments_alone() -> None:
    old, new = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(old, new) == {"a": {"b": 1, "c": 2}}
    assert (old, new) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_what_the_environment_fills_in_is_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_MINE", "secret")
    monkeypatch.setenv("STEPS", "7")
    text = "vars: {token: '${oc.env:TOKEN_OF_MINE}'}\nmethod: {_target_: a.B, address: 'https://${vars.token}@x'}\n"
    (tmp_path / "e.yaml").write_text(text + "trainer: {max_steps: '${oc.decode:${oc.env:STEPS,3}}'}\n")
    experiment = load_experiment(tmp_path / "e.yaml")
    assert experiment.method["address"] == "https://secret@x" and experiment.trainer["max_steps"] == 7
    assert "secret" not in experiment.to_yaml()
    again = experiment_from(yaml.safe_load(experiment.to_yaml()), "e")
    assert again.method == experiment.method and again.trainer == experiment.trainer


def test_a_base_is_chosen_by_a_value_of_vars(folder: Path) -> None:
    for name, width in (("small", 3), ("large", 9)):
        (folder / f"{name}.yaml").write_text(f"vars: {{width: {width}, more: {name}}}")
    (folder / "middle.yaml").write_text("base: ['${vars.size}.yaml', base.yaml]\nvars: {size: small, width: '${vars.more}'}")
    (folder / "outer.yaml").write_text("base: middle.yaml\nvars: {size: large}")
    assert load_experiment("middle.yaml").vars == {"size": "small", "width": "small", "more": "small"}
    assert load_experiment("outer.yaml").vars["more"] == "large"
    assert load_experiment("outer.yaml", ["vars.size=small"]).vars == {"size": "small", "width": "small", "more": "small"}
    assert load_experiment("middle.yaml", ["vars.size=large"]).method["block"]["dim"] == "large"


def test_an_earlier_stage_has_the_base_that_the_command_line_chooses(folder: Path) -> None:
    for name, width in (("small", 3), ("large", 9)):
        (folder / f"{name}.yaml").write_text(f"vars: {{width: {width}}}")
    (folder / "first.yaml").write_text("base: [base.yaml, '${vars.size}.yaml']\nvars: {size: small}")
    (folder / "second.yaml").write_text("base: first.yaml\nafter: first.yaml")
    experiment = load_experiment("second.yaml", ["vars.size=large"])
    assert [stage.vars["width"] for stage in (experiment, *earlier_stages(experiment))] == [9, 9]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("base: '${vars.size}.yaml'", r"base: found '\$\{vars.size\}.yaml', where vars.size is None"),
        ("base: '${vars.size}.yaml'\nvars: {size: bigg}", "base: found 'bigg.yaml', which is no file, .*did you mean 'base.yaml'"),
        ("base: '${vars.size}.yaml'\nvars: {size: [1]}", r"where vars.size is \[1\]"),
    ],
)
def test_a_base_that_cannot_be_chosen_is_named(folder: Path, text: str, found: str) -> None:
    (folder / "child.yaml").write_text(text)
    with pytest.raises(UserError, match=found):
        load_experiment("child.yaml")
