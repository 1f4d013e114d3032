"""What is trained and how, and which metrics fit a method."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_parts
from torch import nn
from toy_parts import Body, Head, Toy

from umm_zoo.errors import UserError
from umm_zoo.fit import main
from umm_zoo.metrics import PSNR, Means
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup, check_outputs
from umm_zoo.training.sharding import assert_one_dtype


def test_a_setup_freezes_the_rest_and_makes_the_optimiser() -> None:
    method = Toy(Body(4, 3), Head(3))
    TrainingSetup(["head"], AdamW(lr=0.1)).prepare(method)
    assert not any(p.requires_grad for p in method.body.parameters()) and all(p.requires_grad for p in method.head.parameters())
    assert sum(len(group["params"]) for group in method.configure_optimizers().param_groups) == 2


def test_weights_too_coarse_for_small_updates_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    method = Toy(Body(4, 3).bfloat16(), Head(3))
    TrainingSetup(["head"], AdamW(lr=0.1)).prepare(method)
    assert not capsys.readouterr().err
    TrainingSetup(["body", "head"], AdamW(lr=0.1)).prepare(Toy(Body(4, 3).bfloat16(), Head(3)))
    assert "note: training.trained: body in half precision" in capsys.readouterr().err.replace("\n", " ")


def test_a_metric_must_read_what_the_method_makes() -> None:
    method = Toy(Body(4, 3), Head(3))
    check_outputs(method, {"loss": Means(["loss"]), "all": Means()})
    with pytest.raises(UserError, match=r"metrics\.images: found a PSNR, which reads 'generated'; Toy does not make it"):
        check_outputs(method, {"images": PSNR()})
    with pytest.raises(UserError, match=r"metrics\.flow: found a Means, which reads 'flow'"):
        check_outputs(method, {"flow": Means(["flow"])})


def test_check_refuses_the_pair_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = toy_parts.toy_experiment() | {"metrics": {"psnr": {"_target_": "umm_zoo.metrics.PSNR"}}}
    toy_parts.write_yaml(tmp_path / "toy.yaml", tree)
    for argv in (["toy.yaml", "--check"], ["toy.yaml"]):
        assert main(argv) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(
            "error: toy.yaml: metrics.psnr: found a PSNR, which reads 'generated'; Toy does not make it, expected"
        )


def test_an_experiment_of_an_earlier_version_says_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = toy_parts.toy_experiment()
    tree["method"] |= tree.pop("training")
    tree["method"]["optimizer"]["_target_"] = "umm_zoo.optimization.AdamW"
    toy_parts.write_yaml(tmp_path / "old.yaml", tree)
    assert main(["old.yaml", "--check"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        "error: old.yaml: found 4 keys or classes of an earlier version, such as method.trained (it is training.trained now)"
    )
    assert line.endswith("; python tools/migrate_experiment.py FILE rewrites a file")


def test_trained_weights_of_two_dtypes_in_one_sharded_block_are_one_line() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()])
    whole = nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 1)})
    assert_one_dtype(whole, list(layers))
    layers[0].weight.data = layers[0].weight.bfloat16()
    with pytest.raises(UserError, match=r"gathered together, 'layers.0.weight' in bfloat16 and 'layers.0.bias' in float32"):
        assert_one_dtype(whole, list(layers))
    layers[0].weight.requires_grad_(False)
    assert_one_dtype(whole, list(layers))
