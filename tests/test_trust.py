"""What the experiment inside weights may name: a stranger's checkpoint runs no program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from umm_zoo.blocks.connectors import MLPConnector
from umm_zoo.errors import UserError
from umm_zoo.evaluate import main as evaluate
from umm_zoo.experiment.build import build_embedded
from umm_zoo.experiment.check import check_node
from umm_zoo.experiment.file import experiment_from
from umm_zoo.experiment.trust import Trust, trusting
from umm_zoo.generate import main as generate
from umm_zoo.method import Method
from umm_zoo.methods.llava import LLaVA
from umm_zoo.training.finished_run import load_run

PROGRAM = {"_target_": "subprocess.Popen", "args": ["touch", "ran"]}
VLM = "umm_zoo.backbones.llava.LlavaBackbone.from_config"


def llava(node: Any) -> dict[str, Any]:
    """A method with something in an open map."""
    return {"_target_": "umm_zoo.methods.llava.LLaVA", "vlm": {"_target_": VLM, "config": {"extra": node}}}


ATTACKS = {
    "open map": llava(PROGRAM),
    "list in an open map": llava([{"deep": [PROGRAM]}]),
    "method itself": PROGRAM,
    "typed slot": {"_target_": "umm_zoo.methods.llava.LLaVA", "vlm": PROGRAM},
    "unknown argument": {**llava(1), "more": PROGRAM},
    "partial": llava({"_target_": "functools.partial", "func": PROGRAM}),
    "methodcaller": llava({"_target_": "operator.methodcaller", "name": "x"}),
    "path": llava({"_target_": "pathlib.Path", "args": "x"}),
    "file": llava({"_target_": "_io.FileIO", "file": "ran", "mode": "w"}),
    "own class without a role": llava({"_target_": "umm_zoo.errors.UserError"}),
    "own class that writes": llava({"_target_": "umm_zoo.comparison.run.Popen"}),
    "through an own module's imports": llava({"_target_": "umm_zoo.errors.json.JSONDecoder"}),
    "own module, library class": llava({"_target_": "umm_zoo.training.ranks.subprocess.Popen", "args": ["touch", "ran"]}),
    "inherited loader of pickles": llava({"_target_": "umm_zoo.methods.llava.LLaVA.load_from_checkpoint", "checkpoint_path": "x"}),
    "hub": llava({"_target_": "torch.hub.HubLoader"}),
    "stranger's module": llava({"_target_": "stranger.Block"}),
    "lightning beside callbacks": llava({"_target_": "lightning.pytorch.cli.LightningCLI"}),
    "torch, no module": llava({"_target_": "torch.nn.modules.module.OrderedDict"}),
    "other weights, whose modules it allows itself": {
        "_target_": "umm_zoo.method.Method.load",
        "source": "inner.ckpt",
        "trust": ["subprocess"],
    },
    "the same, in one word": {"_target_": "umm_zoo.method.Method.load", "source": "inner.ckpt", "trust": "stranger"},
    "library's loader of networks by name": llava({"_target_": "torchmetrics.text.infolm.InfoLM"}),
    "one that runs a program beside them": llava({"_target_": "torchmetrics.multimodal.clip_score.CLIPScore"}),
    "no text": llava({"_target_": ["subprocess", "Popen"]}),
}


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with a module whose import leaves a file."""
    (tmp_path / "stranger.py").write_text("open('ran', 'w').close()\nfrom torch import nn\nclass Block(nn.Identity): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize("name", ATTACKS)
def test_weights_name_no_class_of_others(name, beside):
    with pytest.raises(UserError) as error:
        check_node(ATTACKS[name], Method, "method", Trust(embedded=True), "weights.ckpt")
    assert all(line.startswith("weights.ckpt: method") for line in error.value.lines())
    assert not (beside / "ran").exists() and "stranger" not in sys.modules


def test_a_trusted_module_is_imported(beside):
    node = llava({"_target_": "stranger.Block"})
    with pytest.raises(UserError, match="--trust stranger allows it"):
        check_node(node, Method, "method", Trust(embedded=True))
    check_node(node, Method, "method", Trust(embedded=True, modules=("stranger",)))
    with trusting(["stranger"]):
        check_node(node, Method, "method", Trust(embedded=True))


def test_weights_pass_on_the_modules_that_the_user_allows(beside):
    node = {"_target_": "umm_zoo.method.Method.load", "source": "inner.ckpt", "trust": ["stranger"]}
    check_node(node, Method, "method", Trust(embedded=True, modules=("stranger",)))
    check_node(node, Method, "method", Trust())


def test_an_override_that_names_a_library_allows_nothing_more_of_it(beside):
    experiment = {"name": "x", "method": llava(1), "data": {"_target_": "data_pipelines.shards.data.ShardData"}}
    experiment |= {"metrics": {"m": {"_target_": "torch.utils.data.dataset.TensorDataset"}}, "trainer": {"max_steps": 1}}
    torch.save({"experiment": experiment, "state_dict": {}, "global_step": 1}, "x.ckpt")
    with pytest.raises(UserError, match=r"TensorDataset' in the experiment of the weights"):
        load_run("x.ckpt", ["callbacks.own={_target_: lightning.pytorch.callbacks.Timer}", "method.vlm._target_=torch.nn.Identity"])


@pytest.mark.parametrize(
    "text",
    [
        "https://them/${oc.env:TOKEN}",
        "${vars.them}${oc.env:TOKEN}",
        "${oc.env:NONE,https://them/}${oc.env:TOKEN}",
        "http{:,:}//them/${oc.env:TOKEN}",
        "${oc.env:NONE,${oc.env:TOKEN}}",
        "https://them/${oc.decode:${oc.env:TOKEN}}",
    ],
)
def test_weights_take_no_secret_elsewhere(text, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    tree = {"name": "x", "vars": {"them": "https://them/"}, "data": {"_target_": "a.B", "shards": [text]}}
    with pytest.raises(UserError, match="may take a secret elsewhere") as error:
        experiment_from(tree, "weights.ckpt", trusted=[])
    assert "secret'" not in str(error.value) and "data.shards=" in str(error.value)
    assert "secret" in experiment_from(tree, "mine.yaml").data["shards"][0]
    assert experiment_from(tree, "weights.ckpt", overrides=[f"data.shards=[{text!r}]"], trusted=[]).data["shards"]


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${oc.env:PLACE}/x.tar", "s3://mine/x.tar"),
        ("/data/${oc.env:WHO}/x.tar", "/data/me/x.tar"),
        ("${oc.env:NONE,4}", "4"),
        ("${oc.decode:${oc.env:COUNT}}", 3),
    ],
)
def test_weights_know_places_from_the_environment(text, filled, monkeypatch):
    for name, value in {"PLACE": "s3://mine", "WHO": "me", "COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    assert experiment_from({"name": "x", "vars": {"v": text}}, "weights.ckpt", trusted=[]).vars["v"] == filled


def test_load_fills_in_what_a_run_took_from_the_environment(tmp_path, monkeypatch):
    part = {"_target_": "umm_zoo.blocks.connectors.MLPConnector", "in_dim": 2, "out_dim": "${oc.decode:${oc.env:WIDTH}}"}
    monkeypatch.setenv("WIDTH", "3")
    assert build_embedded(part, MLPConnector, "method", tmp_path).out.out_features == 3
    with pytest.raises(UserError, match="leads to nothing"):
        monkeypatch.delenv("WIDTH")
        build_embedded(part, MLPConnector, "method", tmp_path)


@pytest.mark.parametrize("target", ["torch.nn.Identity", "torchmetrics.MeanMetric", "lightning.pytorch.callbacks.Timer"])
def test_roles_of_the_libraries_are_allowed(target):
    check_node(llava({"_target_": target}), Method, "method", Trust(embedded=True))


@pytest.mark.parametrize("command", ["generate", "evaluate", "load"])
def test_no_command_builds_what_a_checkpoint_should_not_name(command, beside, capsys):
    experiment = {"name": "x", "method": llava(PROGRAM), "data": {"_target_": "data_pipelines.shards.data.ShardData"}}
    experiment |= {"trainer": {"max_steps": 1}, "training": {"trained": [], "optimizer": PROGRAM}}
    torch.save({"experiment": experiment, "state_dict": {}, "global_step": 1, "folders": [str(beside)]}, beside / "evil.ckpt")
    if command == "load":
        with pytest.raises(UserError, match=r"subprocess\.Popen"):
            LLaVA.load(beside / "evil.ckpt")
    else:
        run = generate if command == "generate" else evaluate
        assert run(["evil.ckpt", *(["ask", "no.png", "x"] if command == "generate" else [])]) == 2
        assert "subprocess.Popen" in capsys.readouterr().err or command == "generate"
    assert not (Path.cwd() / "ran").exists()


@pytest.mark.parametrize("target", ["subprocess.Popen", "functools.partial", "logging.FileHandler", "pathlib.Path"])
def test_a_file_names_modules_callbacks_metrics_and_classes_of_its_own(target):
    with pytest.raises(UserError, match=f"'{target}', a class of"):
        check_node(llava({"_target_": target}), Method, "method", Trust())
