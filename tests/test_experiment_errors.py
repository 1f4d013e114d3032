"""Every error of a user in an experiment is one helpful line on stderr and exit code 2, and nothing is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_parts
import yaml

from umm_zoo.errors import UserError
from umm_zoo.experiment.targets import find_target
from umm_zoo.fit import main


def around(tree: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The map that holds what a path leads to, and its key there."""
    *parents, last = path.split(".")
    for part in parents:
        tree = tree[part]
    return tree, last


def change(tree: dict[str, Any], path: str, value: Any) -> None:
    inner, key = around(tree, path)
    inner[key] = value


#: name -> (path, value), expected parts of the one line
ERRORS: dict[str, tuple[tuple[str, Any], list[str]]] = {
    "misspelt envelope key": (
        ("metod", {}),
        ["metod: found an unknown key 'metod'", "expected name, seed,", "did you mean 'method'?"],
    ),
    "misspelt argument": (
        ("method.body.droput", 0.1),
        ["method.body.droput: found an unknown argument 'droput'", "toy_parts.Body: in_dim, out_dim", "did you mean 'dropout'?"],
    ),
    "wrong class in a slot": (
        ("method.head", {"_target_": "toy_parts.Body", "in_dim": 3, "out_dim": 3}),
        ["method.head: found a node of toy_parts.Body", "expected a node of a toy_parts.Head"],
    ),
    "class that is no more": (
        ("method.head", {"_target_": "umm_zoo.blocks.connectors.TransformerConnector", "in_dim": 3}),
        ["method.head._target_: found 'umm_zoo.blocks.connectors.TransformerConnector'", "metaquery_connector.MetaQueryConnector"],
    ),
    "abstract class": (
        ("training.optimizer._target_", "umm_zoo.training.optimization.OptimizerFactory"),
        [
            "training.optimizer._target_: found 'umm_zoo.training.optimization.OptimizerFactory', an abstract class",
            "umm_zoo.training.optimization.AdamW",
        ],
    ),
    "plain value in a class slot": (
        ("method.head", "big"),
        ["method.head: found 'big' (text), expected a node of a toy_parts.Head"],
    ),
    "wrong value type": (("method.body.in_dim", "four"), ["method.body.in_dim: found 'four' (text), expected a whole number"]),
    "boolean for a number": (
        ("method.body.in_dim", True),
        ["method.body.in_dim: found true (true or false), expected a whole number"],
    ),
    "fraction for a whole number": (
        ("method.body.in_dim", 4.0),
        ["method.body.in_dim: found 4.0 (a number), expected a whole number; did you mean '4'?"],
    ),
    "quoted number": (
        ("method.body.dropout", "0.5"),
        ["method.body.dropout: found '0.5' (text), expected a number; did you mean '0.5, without quotes'?"],
    ),
    "not one of the options": (
        ("method.head.kind", "plane"),
        ["method.head.kind: found 'plane' (text), expected one of 'plain', 'squared'; did you mean 'plain'?"],
    ),
    "tuple of another length": (
        ("method.head.scales", [1.0, 2.0, 3.0]),
        ["method.head.scales: found a list of 3, expected a list of 2 (a number, a number)"],
    ),
    "wrong element": (("training.trained", ["body", 7]), ["training.trained[1]: found 7 (a whole number), expected text"]),
    "unknown module": (
        ("method.body._target_", "toy_partz.Body"),
        ["method.body._target_: found 'toy_partz.Body', but module 'toy_partz' is neither installed", "did you mean 'toy_parts'?"],
    ),
    "unknown submodule": (
        ("training.optimizer._target_", "umm_zoo.training.optimisation.AdamW"),
        [
            "'umm_zoo.training.optimisation.AdamW', but umm_zoo.training has no 'optimisation'",
            "did you mean 'umm_zoo.training.optimization'?",
        ],
    ),
    "unknown class": (
        ("method.body._target_", "toy_parts.Boddy"),
        ["method.body._target_: found 'toy_parts.Boddy', but toy_parts has no 'Boddy'", "did you mean 'toy_parts.Body'?"],
    ),
    "function as target": (
        ("method.head._target_", "toy_parts.make_head"),
        ["method.head._target_: found 'toy_parts.make_head', which is a function, expected a class or a classmethod"],
    ),
    "map in the place of a list": (
        ("training.trained", {"body": 1}),
        ["training.trained: found a map of body, expected a list of text"],
    ),
    "list in the place of a map": (
        ("metrics", [{"_target_": "toy_parts.MeanLoss"}]),
        ["metrics: found a list of 1, expected a map from names to nodes"],
    ),
    "not a metric": (
        ("metrics.loss", {"_target_": "toy_parts.Head", "in_dim": 2}),
        ["metrics.loss: found a node of toy_parts.Head, expected a node of a torchmetrics.metric.Metric"],
    ),
    "misspelt trainer argument": (
        ("trainer.max_stps", 5),
        [
            "trainer.max_stps: found an unknown argument 'max_stps'",
            "lightning.pytorch.trainer.trainer.Trainer",
            "did you mean 'max_steps'?",
        ],
    ),
    "trainer argument of the command": (
        ("trainer.callbacks", []),
        ["trainer.callbacks: found 'callbacks', which the command sets, expected the map 'callbacks' of the experiment"],
    ),
    "interpolation to nothing": (
        ("method.body.out_dim", "${vars.widht}"),
        ["method.body.out_dim: found '${vars.widht}', which leads to nothing", "did you mean 'vars.width'?"],
    ),
    "interpolation in a circle": (("vars.depth", "${vars.depth}"), ["vars.depth: found '${vars.depth}', which leads to nothing"]),
    "value still to be given": (("seed", "???"), ["seed: found ??? (still to be given), expected a value, for instance", "seed=…"]),
    "missing after": (
        ("after", "stage1.yaml"),
        ["after: found '", "stage1.yaml', which does not exist, expected an experiment file, a run folder or a checkpoint"],
    ),
    "missing base": (
        ("base", "experment_base.yaml"),
        ["base: found 'experment_base.yaml', which is no file", "did you mean 'experiment.yaml'?"],
    ),
    "circular base": (("base", "experiment.yaml"), ["base: found a circle experiment.yaml -> experiment.yaml"]),
    "run folder outside": (("name", "../up"), ["name: found '../up', expected letters, digits"]),
    "missing shards": (
        ("data.shards", ["train-000.tar"]),
        ["data: train: found no shard at 'train-000.tar', expected a tar file"],
    ),
    "mismatched dimensions": (
        ("method.head.in_dim", 5),
        ["method: toy_parts.Toy: body.out_dim is 3 and head.in_dim is 5, they must be equal"],
    ),
    "unknown part": (
        ("training.trained", ["body", "haed"]),
        ["training.trained: found 'haed', expected ['body', 'head']; did you mean 'head'?"],
    ),
    "trainer refuses": (("trainer.accelerator", "abacus"), ["trainer: ", "abacus"]),
}


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line of a refused command."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ERRORS)
def test_a_user_error_is_one_helpful_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path, value), expected = ERRORS[name]
    tree = toy_parts.toy_experiment()
    change(tree, path, value)
    line = refused(capsys, [str(toy_parts.write_yaml(folder / "experiment.yaml", tree))])
    assert line.startswith(f"error: {folder / 'experiment.yaml'}: ")
    for part in expected:
        assert part in line
    assert not list(folder.glob("runs/*/checkpoints"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("method.body.in_dim", "method.body.in_dim: found nothing, expected a whole number (toy_parts.Body needs it)"),
        ("method", "method: found nothing, expected a node of a umm_zoo.method.Method"),
        ("trainer.max_steps", "trainer.max_steps: found nothing, expected a whole number (the training loader never ends)"),
    ],
)
def test_what_is_missing_is_named(path: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = toy_parts.toy_experiment()
    inner, key = around(tree, path)
    del inner[key]
    assert expected in refused(capsys, [str(toy_parts.write_yaml(folder / "e.yaml", tree))])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainr.max_steps=3", "trainr: found an unknown key 'trainr', expected name, seed, vars"),
        ("vars.widht=3", "vars.widht: found an unknown key 'widht', expected width; did you mean 'width'?"),
        ("metrics.los.reduce=3", "metrics.los: found an unknown key 'los', expected loss; did you mean 'loss'?"),
        ("method.body.dim=3", "method.body.dim: found an unknown argument 'dim'"),
        (
            "training.trained.0=head",
            "training.trained.0: found the element '0' of a list at training.trained, expected the whole list",
        ),
        ("max_steps", "found 'max_steps' on the command line, expected key=value"),
        ("seed=[1", "seed: found '[1' on the command line, expected a YAML value"),
        ("ckpt=last", "ckpt: found 'last', but there is no checkpoint in runs/e/checkpoints"),
        ("base=other.yaml", "base: found an unknown key 'base'"),
    ],
)
def test_override_is_refused(override: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = toy_parts.write_yaml(folder / "e.yaml", toy_parts.toy_experiment())
    assert expected in refused(capsys, [str(file), override])


def test_every_problem_is_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = toy_parts.toy_experiment()
    change(tree, "method.body.droput", 1)
    change(tree, "method.head.in_dim", "3")
    change(tree, "data._target_", "toy_parts.NoData")
    assert main([str(toy_parts.write_yaml(folder / "e.yaml", tree))]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split(": ")[2] for line in lines] == ["method.body.droput", "method.head.in_dim", "data._target_"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "found text that is not YAML in line 2"),
        ("- name: a", "found a list, expected a map with the keys name, seed"),
        ("seed: 1\nseed: 2\n", "found text that is not YAML in line 2 (found duplicate key seed)"),
        ("seed: ${vars.\n", "seed: found an interpolation that cannot be read"),
    ],
)
def test_broken_file_is_refused(text: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "e.yaml").write_text(text)
    assert expected in refused(capsys, ["e.yaml"])


def test_missing_file_suggests_its_neighbour(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "stage1.yaml").write_text("seed: 1")
    assert (
        refused(capsys, ["stagel.yaml"])
        == "error: stagel.yaml: found no such file, expected an experiment file; did you mean 'stage1.yaml'?"
    )


def test_module_that_fails_on_import_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken_block.py").write_text("raise RuntimeError('half\\nwritten')")
    tree = toy_parts.toy_experiment()
    change(tree, "method.head._target_", "broken_block.Head")
    line = refused(capsys, [str(toy_parts.write_yaml(folder / "e.yaml", tree))])
    assert "module broken_block fails on import (RuntimeError: half written)" in line


def test_circle_of_stages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for own, after in (("one", "two"), ("two", "one")):
        toy_parts.write_yaml(folder / f"{own}.yaml", {**toy_parts.toy_experiment(), "after": f"{after}.yaml"})
    assert "after: found a circle one.yaml (name one) -> two.yaml (name two) -> one.yaml (name one)" in refused(
        capsys, ["one.yaml"]
    )


@pytest.mark.processes
def test_command_exits_with_2_and_no_traceback(folder: Path) -> None:
    tree = toy_parts.toy_experiment()
    tree["metod"] = tree.pop("method")
    (folder / "e.yaml").write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-m", "umm_zoo.fit", "e.yaml"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: e.yaml: metod: found an unknown key 'metod'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("mypi.Body", ""),  # near mypy, pip, numpy: none holds anything that an experiment names
        ("yamll.Body", ""),
        ("jason.Body", ""),
        ("umm_zo.metrics.Perplexity", "did you mean 'umm_zoo'?"),
        ("data_pipeline.tasks.Edit", "did you mean 'data_pipelines'?"),
        ("torchmetric.Metric", "did you mean 'torchmetrics'?"),
        ("my_blokcs.Body", "did you mean 'my_blocks'?"),
        ("data_pipelines.transforms.Square", "did you mean 'data_pipelines.transforms.resize.Square'?"),
        ("data_pipelines.transforms.Sqare", "did you mean 'data_pipelines.transforms.resize.Square'?"),
        ("umm_zoo.methods.ross.WeMMU.load", "did you mean 'umm_zoo.methods.wemmu.WeMMU.load'?"),
    ],
)
def test_a_module_is_suggested_where_a_user_can_mean_it(path: str, hint: str, tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "my_blocks.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        find_target(path)
    assert error.value.problems[0].hint == hint
