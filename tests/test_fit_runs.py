"""``fit`` from the command line's entry: run folders, resuming, stopping, curricula."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_parts
import yaml

from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.evaluate import main as evaluate
from umm_zoo.experiment.file import load_experiment
from umm_zoo.fit import main
from umm_zoo.method import Method
from umm_zoo.training.run_folder import RunFolder

TRUSTED = ["--trust", "toy_parts"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    return "toy.yaml"


def losses(file: str) -> list[str]:
    return Path(file).read_text().split("\n")[:-1]


def logged(run: str) -> list[dict[str, str]]:
    with Path(run, "logs", "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def recorded(to: str, **arguments: Any) -> str:
    return f"callbacks.losses={json.dumps({'_target_': 'toy_parts.Losses', 'file': to, **arguments})}"


def report(run: str = "runs/toy") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(run, "metrics.json").read_text())
    return found


def test_run_folder_holds_everything(file: str) -> None:
    assert main([file, "trainer.max_steps=6"]) == 0
    run = Path("runs/toy")
    assert yaml.safe_load((run / "experiment.yaml").read_text())["trainer"]["max_steps"] == 6
    assert (run / "checkpoints" / "LATEST").read_text() == "step-00000006.ckpt\nstep-00000004.ckpt\n" and (run / "samples").is_dir()
    assert list((run / "logs").glob("events.out.tfevents.*"))
    rows = logged("runs/toy")
    assert [row["step"] for row in rows if row["val/loss"]] == ["1", "3", "5"]
    found = report()
    assert (found["steps"], found["processes"], found["seed"], found["resumed_from"]) == (6, 1, 3, None)
    assert found["metrics"]["val/loss"] == pytest.approx(float(rows[-1]["val/loss"]))
    assert found["versions"]["torch"] == torch.__version__ or found["versions"]["torch"] in torch.__version__


def test_checkpoint_is_plain_and_rebuilds_the_method(file: str) -> None:
    assert main([file, "training.trained=[head]"]) == 0
    checkpoint = load_checkpoint("runs/toy")  # weights_only: nothing but plain values and tensors
    assert checkpoint["experiment"]["method"]["head"] == {"_target_": "toy_parts.Head", "in_dim": 3}
    assert set(checkpoint["state_dict"]) == {"head.linear.weight", "head.linear.bias"}
    method = Method.load("runs/toy", trust=["toy_parts"])
    assert isinstance(method, toy_parts.Toy) and not method.training
    torch.testing.assert_close(method.head.linear.weight, checkpoint["state_dict"]["head.linear.weight"])


def test_same_seed_same_losses(file: str) -> None:
    for name in ("a", "b"):
        assert main([file, f"name={name}", recorded(name + ".txt")]) == 0
    assert losses("a.txt") == losses("b.txt") and len(losses("a.txt")) == 4


def test_validating_more_often_changes_no_training_step(file: str) -> None:
    for every in (1, 3):
        assert main([file, f"name=every{every}", f"trainer.val_check_interval={every}", recorded(f"{every}.txt")]) == 0
    assert losses("1.txt") == losses("3.txt")


def test_resumed_run_equals_an_uninterrupted_one(file: str) -> None:
    assert main([file, "name=whole", "trainer.max_steps=7", recorded("whole.txt")]) == 0
    assert main([file, "trainer.max_steps=4", recorded("parts.txt")]) == 0
    assert main([file, "trainer.max_steps=7", "ckpt=last", recorded("parts.txt")]) == 0
    assert main([file, "trainer.max_steps=3", "ckpt=last", recorded("parts.txt")]) == 2  # it would count as one of 3 steps
    assert losses("parts.txt") == losses("whole.txt")
    whole, parts = load_checkpoint("runs/whole"), load_checkpoint("runs/toy")
    for key, value in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][key], value)
    found = report()
    assert found["resumed_from"] == "runs/toy/checkpoints/step-00000004.ckpt" and found["steps"] == 7
    steps = [int(row["step"]) for row in logged("runs/toy")]
    assert steps == sorted(steps) and {1, 3, 5} <= set(steps)  # the rows of before the resume are still there


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("in_validation", [False, True])
def test_signal_saves_says_where_and_resumes_exactly(
    signum: int, code: int, in_validation: bool, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main([file, "name=whole", "trainer.max_steps=6", recorded("whole.txt")]) == 0
    step = 4 if in_validation else 3
    stopping = recorded("parts.txt", signal_at=step, signum=int(signum), in_validation=in_validation)
    capsys.readouterr()
    assert main([file, "trainer.max_steps=6", stopping]) == code
    saved = f"runs/toy/checkpoints/step-{step:08d}.ckpt"
    said = f"stopped by {signal.Signals(signum).name} at step {step}; saved {saved}; continue with ckpt=last"
    assert said in capsys.readouterr().out
    assert not Path("runs/toy/metrics.json").exists()
    assert load_checkpoint("runs/toy")["global_step"] == step
    assert main([file, "trainer.max_steps=6", "ckpt=last", recorded("parts.txt")]) == 0
    assert losses("parts.txt") == losses("whole.txt")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_stop_during_validation_saves_the_weights_of_training(file: str) -> None:
    averaged = "callbacks.ema={_target_: umm_zoo.training.ema.EMA}"
    assert main([file, "name=whole", "trainer.max_steps=2", averaged]) == 0
    stopping = recorded("x.txt", signal_at=2, in_validation=True)
    assert main([file, "trainer.max_steps=2", averaged, stopping]) == 143
    whole, stopped = load_checkpoint("runs/whole")["state_dict"], load_checkpoint("runs/toy")["state_dict"]
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_finished_run_is_left_alone(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file]) == 0
    before = Path("runs/toy/metrics.json").stat().st_mtime_ns  # the text may be equal: same losses, and seconds are rounded
    for argv in ([file], [file, "ckpt=last"]):
        assert main(argv) == 0
        assert "this experiment has finished there; --again runs it again" in capsys.readouterr().out
    assert Path("runs/toy/metrics.json").stat().st_mtime_ns == before
    assert main([file, "--again"]) == 0
    assert Path("runs/toy/metrics.json").stat().st_mtime_ns != before


def test_another_experiment_is_not_overwritten(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file]) == 0
    assert main([file, "seed=4", "training.optimizer.lr=0.5"]) == 2
    error = capsys.readouterr().err
    assert "error: runs/toy: found a run of another experiment (other seed, training.optimizer.lr)" in error
    assert "expected name=… for another folder, --again to start over, ckpt=last to continue it all the same" in error


def test_unfinished_run_asks_what_to_do(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, recorded("x.txt", signal_at=3)]) == 143
    assert main([file, recorded("x.txt", signal_at=3)]) == 2
    assert "runs/toy: found an unfinished run of this experiment, expected ckpt=last to continue it" in capsys.readouterr().err


def test_folder_of_something_else_is_not_touched(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/toy/checkpoints").mkdir(parents=True)
    Path("runs/toy/thesis.tex").write_text("years of work")
    assert main([file, "--again"]) == 2
    assert "runs/toy: found files that no run wrote" in capsys.readouterr().err
    assert Path("runs/toy/thesis.tex").is_file() and Path("runs/toy/checkpoints").is_dir()


def test_a_run_killed_at_its_first_write_begins_again(file: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "toy" / "samples").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "experiment.yaml.partial").write_text("name: t")
    assert RunFolder(tmp_path / "runs" / "toy").decide(load_experiment(file), None, again=False) == "fresh"


def test_a_run_killed_while_it_clears_its_folder_is_still_a_run(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, folder = load_experiment(file), RunFolder(tmp_path / "runs" / "toy")
    folder.begin(experiment)
    folder.metrics_file.write_text("{}")
    monkeypatch.setattr(RunFolder, "begin", lambda self, experiment: None)  # killed right before it
    folder.clear(experiment)
    assert folder.decide(experiment, None, again=False) == "fresh"


def test_a_fresh_run_that_dies_in_its_set_up_may_start_again(file: str, tmp_path: Path) -> None:
    experiment, folder = load_experiment(file), RunFolder(tmp_path / "runs" / "toy")
    folder.clear(experiment)
    (folder.path / "data.json").write_text("{}")  # the data module's, before training begins
    assert folder.decide(experiment, ckpt=None, again=False) == "fresh"


def test_again_removes_only_what_a_run_writes(file: str) -> None:
    assert main([file]) == 0
    Path("runs/toy/notes.md").write_text("mine")
    assert main([file, "name=toy/inner"]) == 0
    assert main([file, "--again", "seed=9"]) == 0
    assert Path("runs/toy/notes.md").is_file() and Path("runs/toy/inner/metrics.json").is_file()


def test_runs_folder_is_an_option_and_a_variable(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([file, "--runs", "elsewhere"]) == 0
    monkeypatch.setenv("UMM_ZOO_RUNS", "third")
    assert main([file]) == 0
    assert Path("elsewhere/toy/metrics.json").is_file() and Path("third/toy/metrics.json").is_file()


def test_after_runs_the_earlier_stage_once_and_starts_from_it(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("stage1.yaml").write_text("base: toy.yaml\ntraining: {trained: [body]}")
    Path("stage2.yaml").write_text("base: toy.yaml\nafter: stage1.yaml\ntraining: {trained: [head]}\nseed: 11")
    assert main(["stage2.yaml"]) == 0
    assert "stage2 comes after stage1, which has not finished: stage1.yaml is run first" in capsys.readouterr().out
    first, second = load_checkpoint("runs/stage1")["state_dict"], load_checkpoint("runs/stage2")["state_dict"]
    assert set(first) == {"body.linear.weight", "body.linear.bias"}
    assert torch.equal(second["body.linear.weight"], first["body.linear.weight"])  # frozen in stage 2, and kept in its checkpoint
    written = Path("runs/stage1/metrics.json").stat().st_mtime_ns
    assert main(["stage2.yaml", "--again"]) == 0
    assert Path("runs/stage1/metrics.json").stat().st_mtime_ns == written
    assert torch.equal(Method.load("runs/stage2", trust=["toy_parts"]).state_dict()["body.linear.bias"], first["body.linear.bias"])


CURRICULUM = "seed=5", "vars.width=6", "training.optimizer.lr=0.02", "trainer.devices=1"


def test_vars_seed_and_place_reach_the_earlier_stages(file: str) -> None:
    Path("stage1.yaml").write_text("base: toy.yaml\ntraining: {trained: [body]}\nvars: {own: 1}")
    Path("stage2.yaml").write_text("base: toy.yaml\nafter: stage1.yaml\nvars: {later: 2}")
    assert main(["stage2.yaml", *CURRICULUM, "vars.later=3"]) == 0
    first, second = (yaml.safe_load(Path(f"runs/{name}/experiment.yaml").read_text()) for name in ("stage1", "stage2"))
    assert (first["seed"], first["vars"]) == (5, {"width": 6, "own": 1}) and second["vars"] == {"width": 6, "later": 3}
    assert (first["training"]["optimizer"]["lr"], second["training"]["optimizer"]["lr"]) == (0.01, 0.02)
    assert load_checkpoint("runs/stage1")["state_dict"]["body.linear.weight"].shape == (6, 4)


def test_a_finished_stage_of_other_vars_is_not_taken(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("stage1.yaml").write_text("base: toy.yaml\ntraining: {trained: [body]}")
    Path("stage2.yaml").write_text("base: toy.yaml\nafter: stage1.yaml")
    assert main(["stage1.yaml"]) == 0
    assert main(["stage2.yaml", "vars.width=6"]) == 2
    error = capsys.readouterr().err
    assert "error: stage2.yaml: after: found in runs/stage1 a run of stage1.yaml with other method.body.out_dim" in error
    assert "expected other run folders for the whole curriculum (--runs DIR), or this stage again: " in error
    assert "python -m umm_zoo.fit stage1.yaml vars.width=6 --again" in error
    assert not Path("runs/stage2").exists() and load_checkpoint("runs/stage1")["state_dict"]["body.linear.weight"].shape == (3, 4)
    assert main(["stage2.yaml", "vars.width=6", "--runs", "six"]) == 0


def test_a_finished_stage_is_taken_wherever_it_ran(file: str) -> None:
    Path("stage1.yaml").write_text("base: toy.yaml\ntraining: {trained: [body]}")
    Path("stage2.yaml").write_text("base: toy.yaml\nafter: stage1.yaml")
    assert main(["stage1.yaml"]) == 0
    written = Path("runs/stage1/metrics.json").stat().st_mtime_ns
    assert main(["stage2.yaml", "trainer.accelerator=auto"]) == 0
    assert Path("runs/stage1/metrics.json").stat().st_mtime_ns == written


def test_after_may_name_a_run_folder_or_a_checkpoint(file: str) -> None:
    assert main([file]) == 0
    weights = load_checkpoint("runs/toy")["state_dict"]
    for number, after in enumerate(("runs/toy", "runs/toy/checkpoints/step-00000004.ckpt")):
        assert main([file, f"name=later{number}", f"after={after}", "training.optimizer.lr=0.0"]) == 0
        later = load_checkpoint(f"runs/later{number}")["state_dict"]
        assert all(torch.equal(later[key], weights[key]) for key in weights)


def test_after_of_another_shape_is_refused(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file]) == 0
    assert main([file, "name=wide", "after=runs/toy", "vars.width=5"]) == 2
    assert "error: toy.yaml: after: 'body.linear.weight' is [3, 4] in the earlier stage, [5, 4] here" in capsys.readouterr().err


def test_resume_into_another_method_is_refused(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "training.trained=[head]"]) == 0
    assert main([file, "ckpt=last", "trainer.max_steps=9"]) == 2
    assert "toy.yaml: training.trained: found ['body', 'head'], expected ['head'], with which this run" in capsys.readouterr().err
    assert Path("runs/toy/metrics.json").is_file()  # the finished run is still what it was
    assert "- body" not in Path("runs/toy/experiment.yaml").read_text()


def test_a_file_that_is_no_checkpoint_is_refused(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, f"ckpt={file}"]) == 2
    assert "toy.yaml: ckpt: toy.yaml: found a file that cannot be read as a checkpoint" in capsys.readouterr().err
    assert main([file, "ckpt="]) == 2
    assert "error: ckpt: found nothing, expected 'last' or the path of a checkpoint" in capsys.readouterr().err


def test_error_within_training_keeps_its_traceback(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, batch: Any) -> dict[str, Any]:
        raise ValueError("a bug, no error of the user")

    monkeypatch.setattr(toy_parts.Toy, "training_losses", broken)
    with pytest.raises(ValueError, match="a bug"):
        main([file])


def test_check_builds_without_memory_and_reports(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [file, "--check", "method.body.in_dim=3000000", "training.trained=[head]", "data.shards=[nowhere.tar]"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "9,000,003" in out
    assert "memory, at least: 34.33 MiB" in out and "not counted: activations" in out
    assert "found no shard at 'nowhere.tar'" in out and "fit will refuse this" in out
    assert "total_steps: 12" in out and not Path("runs").exists()


def test_evaluate_scores_a_finished_run_on_other_data(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "trainer.max_steps=2"]) == 0
    assert evaluate(["runs/toy", *TRUSTED]) == 0
    Path("runs/toy/evaluation-1-kept.json").write_text("{}")  # a user's copy is no number
    assert evaluate(["runs/toy/checkpoints/step-00000002.ckpt", "data.size=20", "method.bias=2.0", *TRUSTED]) == 0
    first, second = (json.loads(Path(f"runs/toy/evaluation-{i}.json").read_text()) for i in (1, 2))
    assert first["metrics"]["val/loss"] == pytest.approx(report()["metrics"]["val/loss"], rel=1e-6)
    assert second["metrics"]["val/loss"] > first["metrics"]["val/loss"]
    assert second["overrides"] == ["data.size=20", "method.bias=2.0"] and second["step"] == 2
    assert "written to runs/toy/evaluation-2.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["runs/none"],
            "step-*.ckpt), expected a run folder or a checkpoint that umm_zoo.fit has written",
        ),
        (["runs/toy", "validatoin"], "found 'validatoin' behind the run, expected key=value"),
        (["runs/toy", "unified-bench"], "expected key=value; a benchmark is --benchmark unified-bench"),
        (["runs/toy", "--benchmark", "unified-bensh"], "or the path of a class; did you mean 'unified-bench'?"),
        (["runs/toy", "data.sise=3"], "data.sise: found an unknown argument 'sise'"),
        (["runs/toy", "vars.width=4"], "vars.width: found a key that has done its work"),
    ],
)
def test_evaluate_refuses(argv: list[str], expected: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "trainer.max_steps=1", "trainer.val_check_interval=1"]) == 0
    assert evaluate([*argv, *TRUSTED]) == 2
    assert expected in capsys.readouterr().err
