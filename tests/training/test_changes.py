"""A run that is continued with another experiment: what comes into force, what is said, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_parts

from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.fit import main
from umm_zoo.training.optimization import WarmupCosine
from umm_zoo.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiment and its finished run, for copies."""
    folder = tmp_path_factory.mktemp("trained")
    toy_parts.write_yaml(folder / "toy.yaml", toy_parts.toy_experiment())
    with pytest.MonkeyPatch.context() as there:
        there.chdir(folder)
        assert main(["toy.yaml"]) == 0
    return folder


@pytest.fixture
def file(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return "toy.yaml"


def resumed(file: str, *changes: str) -> dict[str, Any]:
    """The checkpoint of one step more."""
    assert main([file, "ckpt=last", "trainer.max_steps=5", *changes]) == 0
    return load_checkpoint("runs/toy")


def groups(checkpoint: dict[str, Any], *names: str) -> dict[str, tuple[Any, ...]]:
    return {group["name"]: tuple(group[name] for name in names) for group in checkpoint["optimizer_states"][0]["param_groups"]}


OPTIMIZER = "training.optimizer"


def test_every_group_has_the_new_settings(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [f"{OPTIMIZER}.lr=0.02", f"{OPTIMIZER}.weight_decay=0.3", f"{OPTIMIZER}.betas=[0.8,0.9]"]
    found = resumed(file, *changes, f"{OPTIMIZER}.part_lr={{head: 0.05}}")
    factor = WarmupCosine(12).factor(5)
    rates = {"body": 0.02, "body (vectors)": 0.02, "head": 0.05, "head (vectors)": 0.05}
    for name, (rate, first, decay, betas) in groups(found, "lr", "initial_lr", "weight_decay", "betas").items():
        assert rate == pytest.approx(rates[name] * factor) and first == rates[name]
        assert (decay, list(betas)) == (0.0 if "vectors" in name else 0.3, [0.8, 0.9])
    said = capsys.readouterr().err
    for line in ("lr 0.02 (was 0.01)", "weight_decay 0.3 (was nothing)", "betas [0.8, 0.9] (was nothing)"):
        assert f"resumes with {OPTIMIZER}.{line}\n" in said
    assert "resumes with trainer.max_steps 5 (was 4)" in said and "vars" not in said


@pytest.mark.parametrize(
    ("change", "rate"),
    [
        ("training.schedule.total_steps=100", 0.01 * WarmupCosine(100).factor(5)),
        ("training.schedule.final_factor=0.5", 0.01 * WarmupCosine(12, final_factor=0.5).factor(5)),
        ("training.schedule={_target_: umm_zoo.training.optimization.Constant, warmup_steps: 20}", 0.01 * 6 / 20),
        ("training.schedule=null", 0.01),
    ],
)
def test_another_schedule_goes_on_at_this_step(change: str, rate: float, file: str) -> None:
    for (found,) in groups(resumed(file, change), "lr").values():
        assert found == pytest.approx(rate)


def test_a_schedule_where_there_was_none_starts_at_this_step(file: str) -> None:
    assert main([file, "--again", "training.schedule=null"]) == 0
    for (found,) in groups(resumed(file), "lr").values():
        assert found == pytest.approx(0.01 * WarmupCosine(12).factor(5))


def test_without_a_change_nothing_is_said_or_set(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "--again", "trainer.max_steps=9"]) == 0
    Path("runs/toy/metrics.json").unlink()
    capsys.readouterr()
    assert main([file, "ckpt=last", "trainer.max_steps=9"]) == 0
    assert "resumes with" not in capsys.readouterr().err and len(RunFolder("runs/toy").history()) == 1


def test_a_callbacks_new_argument_wins_over_its_state(file: str) -> None:
    stop = "callbacks.stop={{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: {}}}"
    assert main([file, "--again", stop.format(3)]) == 0
    states = resumed(file, stop.format(7))["callbacks"]
    assert [state["patience"] for name, state in states.items() if name.startswith("EarlyStopping")] == [7]


REFUSED = [
    ("method.body.dropout=0.1", "method.body.dropout: found 0.1, expected 0.5, with which this run was trained so far"),
    ("vars.width=5", "method.body.out_dim: found 5, expected 3, with which this run was trained so far"),
    ("seed=4", "seed: found 4, expected 3, with which"),
    ("training.trained=[head]", "training.trained: found ['head'], expected ['body', 'head'], with which"),
    (f"{OPTIMIZER}={{_target_: toy_parts.Sgd, lr: 0.1}}", f"{OPTIMIZER}._target_: found toy_parts.Sgd, expected umm_zoo"),
    (f"{OPTIMIZER}.decay_vectors=true", f"{OPTIMIZER}.decay_vectors, trainer.max_steps"),
    (
        "training.schedule={_target_: toy_parts.StepDown, total_steps: 9}",
        "found a change under a StepLR, which goes on from",
    ),
]


@pytest.mark.parametrize(("change", "line"), REFUSED)
def test_what_changes_the_meaning_of_weights_is_refused_by_key(
    change: str, line: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("runs/toy/metrics.json").read_bytes()
    assert main([file, "ckpt=last", "trainer.max_steps=5", change]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert any(line.split(", trainer")[0] in error for error in errors), errors
    assert Path("runs/toy/metrics.json").read_bytes() == before


def test_the_record_tells_what_was_used_from_which_step_on(file: str) -> None:
    assert main([file, "ckpt=last", "trainer.max_steps=5", f"{OPTIMIZER}.lr=0.02"]) == 0
    assert main([file, "ckpt=last", "trainer.max_steps=6", f"{OPTIMIZER}.lr=0.02"]) == 0
    first, second, third = RunFolder("runs/toy").history()
    assert first["from_step"] == 0 and first["experiment"]["training"]["optimizer"]["lr"] == 0.01
    assert (second["from_step"], third["from_step"]) == (4, 5)
    assert second["changed"] == {
        "trainer.max_steps": {"was": 4, "now": 5},
        "training.optimizer.lr": {"was": 0.01, "now": 0.02},
    }
    assert set(third["changed"]) == {"trainer.max_steps"}
    report = json.loads(Path("runs/toy/metrics.json").read_text())
    assert report["history"] == [second, third] == load_checkpoint("runs/toy")["history"][1:]


def test_an_earlier_checkpoint_has_its_own_history(file: str) -> None:
    assert main([file, "ckpt=last", "trainer.max_steps=6", f"{OPTIMIZER}.lr=0.02"]) == 0
    assert (
        main([file, "ckpt=runs/toy/checkpoints/step-00000004.ckpt", "name=other", f"{OPTIMIZER}.lr=0.03", "trainer.max_steps=5"])
        == 0
    )
    assert [entry["from_step"] for entry in RunFolder("runs/other").history()] == [0, 4]
    assert RunFolder("runs/other").history()[1]["changed"]["training.optimizer.lr"] == {"was": 0.01, "now": 0.03}


# -- the user's own code -------------------------------------------------------------------------------------------------------

BLOCKS = "import my_numbers\nfrom toy_parts import Head\n\n\nclass MyHead(Head):\n    gain = my_numbers.GAIN\n"


@pytest.fixture
def own(file: str, monkeypatch: pytest.MonkeyPatch) -> str:
    Path("my_heads.py").write_text(BLOCKS)
    Path("my_numbers.py").write_text("GAIN = 2\n")
    toy_parts.write_yaml(Path("own.yaml"), {"base": "toy.yaml", "method": {"head": {"_target_": "my_heads.MyHead", "in_dim": 3}}})
    monkeypatch.syspath_prepend(Path.cwd())
    for name in ("my_heads", "my_numbers"):  # of another test
        sys.modules.pop(name, None)
    assert main(["own.yaml"]) == 0
    return "own.yaml"


@pytest.mark.parametrize("edited", ["my_heads", "my_numbers"])
@pytest.mark.parametrize("ckpt", [[], ["ckpt=last"]])
def test_edited_code_is_another_run(edited: str, ckpt: list[str], own: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Path(f"{edited}.py").open("a") as stream:
        stream.write("OTHER = 1\n")
    assert main([own, *ckpt]) == 2
    assert f"runs/own: found a run of other code ({edited} has changed since), expected" in (said := capsys.readouterr().err)
    assert "--again" in said
    assert main([own, "--again"]) == 0 and main([own]) == 0
    assert "this experiment has finished there" in capsys.readouterr().out


def test_the_record_names_modules_and_their_commit(own: str) -> None:
    code = json.loads(Path("runs/own/metrics.json").read_text())["code"]
    assert {"my_heads", "my_numbers", "toy_parts"} <= set(code["modules"])
    assert not any(name.split(".")[0] in ("torch", "umm_zoo", "lightning", "typing") for name in code["modules"])
    assert len(next(iter(code["commits"].values()))) >= 40  # that of toy_parts


def test_a_run_continued_with_edited_code_says_so(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("my_numbers.py").open("a") as stream:
        stream.write("OTHER = 1\n")
    assert main([own, "ckpt=last", "trainer.max_steps=5"]) == 0
    assert "resumes with my_numbers as its file is now" in capsys.readouterr().err
    first, second = RunFolder("runs/own").history()
    assert first["code"]["modules"]["my_numbers"] != second["code"]["modules"]["my_numbers"] and second["from_step"] == 4


def test_a_stage_of_edited_code_is_not_taken(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    toy_parts.write_yaml(Path("later.yaml"), {"base": "own.yaml", "after": "own.yaml"})
    Path("my_numbers.py").write_text("GAIN = 3\n")
    assert main(["later.yaml"]) == 2
    assert "found in runs/own a run of own.yaml with other my_numbers" in capsys.readouterr().err


def test_another_method_is_one_line_of_the_check_too(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file]) == 0
    other = "method={_target_: toy_parts.OneWeight}"
    for check in (["--check"], []):
        assert main([file, other, "ckpt=last", *check]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "method._target_: found toy_parts.OneWeight, expected toy_parts.Toy" in line
