"""Which weights a run has, by one rule: averages where it keeps them, raw ones when asked for, said in every record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tools.consolidate import consolidate
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.errors import UserError
from umm_zoo.evaluate import main as evaluate
from umm_zoo.fit import main as fit
from umm_zoo.method import Method
from umm_zoo.training.finished_run import load_run

TRUST = ["toy_parts"]
TRUSTED = ["--trust", "toy_parts"]
METHOD = {
    "_target_": "toy_parts.Toy",
    "body": {"_target_": "toy_parts.Body", "in_dim": 4, "out_dim": 3},
    "head": {"_target_": "toy_parts.Head", "in_dim": 3},
}
TRAINING = {"trained": ["body", "head"], "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 0.1}}
TRAINER = {"max_steps": 6, "val_check_interval": 6, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}


def experiment(name: str, **changes: Any) -> str:
    content = {
        "name": name,
        "method": METHOD,
        "training": TRAINING,
        "data": {"_target_": "toy_parts.ToyData"},
        "metrics": {"m": {"_target_": "umm_zoo.metrics.means.Means", "names": ["loss"]}},
        "trainer": TRAINER,
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return f"{name}.yaml"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Six steps of a rate at which the weights leave their averages behind."""
    monkeypatch.chdir(tmp_path)
    assert fit([experiment("first", callbacks={"ema": {"_target_": "umm_zoo.training.ema.EMA", "decay": 0.9}})]) == 0
    return "runs/first"


def weights(run: str) -> dict[str, dict[str, Tensor]]:
    checkpoint = load_checkpoint(run)
    found = {"raw": checkpoint["state_dict"], "averaged": checkpoint["callbacks"]["EMA"]["averages"]}
    assert not torch.allclose(found["raw"]["head.linear.weight"], found["averaged"]["head.linear.weight"], atol=1e-3)
    return found


def assert_are(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


@pytest.mark.parametrize("which", ["averaged", "raw"])
def test_every_way_to_a_run_takes_the_same_weights(which: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected, raw = weights(run)[which], which == "raw"
    assert_are(dict(Method.load(run, TRUST, raw).state_dict()), expected)
    loaded = load_run(run, trust=TRUST, raw_weights=raw)
    assert loaded.weights == which and f"{run}: {which} weights" in capsys.readouterr().err
    assert_are(dict(loaded.load_method().state_dict()), expected)
    assert consolidate(Path(run), Path("all.safetensors"), raw=raw)[2] == which
    assert_are(dict(Method.load("all.safetensors", TRUST).state_dict()), expected)


@pytest.mark.parametrize("which", ["averaged", "raw"])
def test_a_later_stage_starts_from_them(which: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    still = {"trained": ["body", "head"], "optimizer": {**TRAINING["optimizer"], "lr": 1e-12}, "weights": which}  # type: ignore[dict-item]
    assert fit([experiment("second", after=run, training=still, trainer={**TRAINER, "max_steps": 1, "val_check_interval": 1})]) == 0
    started = load_checkpoint("runs/second")["state_dict"]
    for key, value in weights(run)[which].items():
        torch.testing.assert_close(started[key], value, atol=1e-6, rtol=0)
    assert ("starts from the averaged weights of runs/first" in capsys.readouterr().out) == (which == "averaged")


def test_scores_are_of_the_weights_that_the_record_names(run: str) -> None:
    trained = json.loads(Path(run, "metrics.json").read_text())
    assert evaluate([run, *TRUSTED]) == 0
    assert evaluate([run, *TRUSTED, "--raw-weights"]) == 0
    own, raw = (json.loads(Path(run, f"evaluation-{number}.json").read_text()) for number in (1, 2))
    assert (trained["weights"], own["weights"], raw["weights"]) == ("averaged", "averaged", "raw")
    assert own["metrics"]["val/m/loss"] == pytest.approx(trained["metrics"]["val/m/loss"], rel=1e-5)
    assert raw["metrics"]["val/m/loss"] != pytest.approx(trained["metrics"]["val/m/loss"], rel=1e-3)


def test_consolidated_averages_have_no_raw_weights(run: str) -> None:
    consolidate(Path(run), Path("all.safetensors"))
    with pytest.raises(UserError, match="found a file that holds the averaged weights alone"):
        Method.load("all.safetensors", TRUST, raw_weights=True)


def test_a_resumed_run_goes_on_from_the_raw_ones(run: str) -> None:
    Path("runs/whole").mkdir(parents=True)
    ema = {"ema": {"_target_": "umm_zoo.training.ema.EMA", "decay": 0.9}}
    file = experiment("whole", callbacks=ema, trainer={**TRAINER, "max_steps": 9})
    assert fit([file]) == 0
    part = experiment("part", callbacks=ema, trainer={**TRAINER, "max_steps": 6})
    assert fit([part]) == 0
    assert fit([part, "trainer.max_steps=9", "ckpt=last"]) == 0
    assert_are(load_checkpoint("runs/part")["state_dict"], load_checkpoint("runs/whole")["state_dict"])
    assert_are(weights("runs/part")["averaged"], weights("runs/whole")["averaged"])


def test_a_run_without_averages_has_raw_weights_and_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit([experiment("plain")]) == 0
    assert json.loads(Path("runs/plain/metrics.json").read_text())["weights"] == "raw"
    assert load_run("runs/plain", trust=TRUST).weights == "raw"
    assert "weights" not in capsys.readouterr().err


def test_a_checkpoint_of_another_version_is_named(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import umm_zoo

    assert load_checkpoint(run)["version"] == umm_zoo.__version__
    monkeypatch.setattr(umm_zoo, "__version__", "9.9.9")
    assert fit(["first.yaml", "trainer.max_steps=7", "ckpt=last"]) == 0
    assert "the checkpoint is of umm_zoo 0.1.0, this is 9.9.9" in capsys.readouterr().err
