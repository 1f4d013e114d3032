"""What an experiment out of weights may reach: no folder is written to where it says, and what it fetches is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import write_run

from data_pipelines.shards.indexing import build_index
from data_pipelines.shards.writing import write_shards
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.errors import UserError
from umm_zoo.evaluate import main
from umm_zoo.experiment.reach import say_fetched, untouched
from umm_zoo.method import Method
from umm_zoo.training.finished_run import load_run

TRUSTED = ["--trust", "toy_parts"]
ONE = {"_target_": "toy_parts.OneWeight"}


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a home of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shard(folder: Path) -> Path:
    """One tar of two samples, without an index."""
    write_shards([{"__key__": str(number), "txt": "a"} for number in range(2)], folder, "s")
    for index in folder.glob("*.json"):
        index.unlink()
    return next(folder.glob("*.tar"))


def test_a_cache_of_weights_is_left_out(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 8, "cache": "victim"}
    run = write_run(at_home / "run", ONE, data=data)
    assert "cache" not in load_run(run, trust=["toy_parts"]).experiment.data
    assert "data.cache 'victim' of its experiment is left out" in capsys.readouterr().err
    assert load_run(run, ["data.cache=mine"], ["toy_parts"]).experiment.data["cache"] == "mine"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("part", "key", "value"), [("data", "num_workers", 900), ("trainer", "num_nodes", 4)])
def test_weights_start_no_more_processes_than_the_machine_bears(
    part: str, key: str, value: int, at_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    parts = {"data": {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 8}, "trainer": {"max_steps": 1}}
    parts[part] = {**parts[part], key: value}
    run = write_run(at_home / "run", ONE, **parts)  # type: ignore[arg-type]
    assert key not in getattr(load_run(run, trust=["toy_parts"]).experiment, part)
    assert f"{part}.{key} {value} of its experiment is left out" in capsys.readouterr().err
    assert getattr(load_run(run, [f"{part}.{key}={value}"], ["toy_parts"]).experiment, part)[key] == value


def test_nothing_is_written_beside_the_data_of_weights(at_home: Path) -> None:
    tar = shard(at_home / "victim")
    with untouched():
        assert Path(build_index(str(tar))).is_relative_to(at_home / "home")
    assert [path.name for path in (at_home / "victim").iterdir()] == [tar.name]
    assert Path(build_index(str(tar), replace=True)).parent == at_home / "victim"


@pytest.mark.parametrize("state", [{"x": 1}, None])
def test_an_evaluation_leaves_its_own_file_alone(at_home: Path, state: Any) -> None:
    tar = shard(at_home / "victim")
    source = {"_target_": "data_pipelines.shards.data.ShardSource", "shards": str(tar)}
    data = {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 8, "val": {"v": source}, "val_batch_size": 2}
    grid = {"samples": {"_target_": "umm_zoo.callbacks.SampleGrid"}}
    run = write_run(at_home / "run", ONE, data=data, callbacks=grid)
    stored = torch.load(run / "checkpoints" / "last.ckpt")
    torch.save({**stored, "callbacks": {"SampleGrid": state}}, run / "checkpoints" / "last.ckpt")
    assert main([str(run), *TRUSTED]) == 0
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "evaluation-1.json"]
    assert [path.name for path in (at_home / "victim").iterdir()] == [tar.name]


def test_what_is_fetched_is_said_without_secrets(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = ["https://me:secret@them/a.tar?token=secret", "s3://b/c.tar", "here.tar"]
    say_fetched(
        {
            "method": {
                "vlm": {"source": "them/model"},
                "own": {"source": str(at_home)},
                "codec": {"source": "umm_zoo:tiny/weights/codec"},
            },
            "data": {"shards": shards},
        },
        "x.ckpt",
    )
    said = capsys.readouterr().err
    assert "'them/model' (method.vlm.source)" in said and "'https://them/a.tar' (data.shards)" in said
    assert "'s3://b/c.tar'" in said and "here.tar" not in said and "secret" not in said and str(at_home) not in said
    assert "umm_zoo:" not in said  # what ships is here


WRONG = {
    "state_dict": {"state_dict": [1]},
    "no tensors": {"state_dict": {"layer.weight": 3}},
    "keys": {"state_dict": {3: torch.zeros(1)}},
    "callbacks": {"callbacks": [1]},
    "averages": {"callbacks": {"EMA": {"averages": [3]}}},
    "averages that are no tensors": {"callbacks": {"EMA": {"averages": {"layer.weight": 3}}}},
    "experiment": {"experiment": "x"},
    "global_step": {"global_step": "x"},
    "history": {"history": 7},
}


@pytest.mark.parametrize("name", WRONG)
def test_entries_of_another_kind_are_one_line(name: str, at_home: Path) -> None:
    run = write_run(at_home / "run", ONE)
    file = run / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(file), **WRONG[name]}, file)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_checkpoint(run)


def test_weights_without_a_step_are_scored_all_the_same(at_home: Path) -> None:
    file = write_run(at_home / "run", ONE) / "checkpoints" / "last.ckpt"
    torch.save({key: value for key, value in torch.load(file).items() if key != "global_step"}, file)
    assert main([str(file), *TRUSTED]) == 0
    (report,) = file.parent.parent.glob("evaluation-*.json")
    assert json.loads(report.read_text())["step"] is None


def test_weights_that_load_themselves_are_refused(at_home: Path) -> None:
    node = {"_target_": "umm_zoo.method.Method.load", "source": "x.ckpt"}
    torch.save({"experiment": {"method": node}, "state_dict": {}, "global_step": 1}, "x.ckpt")
    with pytest.raises(UserError, match="loads them themselves"):
        Method.load("x.ckpt")


def test_weights_name_no_base(at_home: Path) -> None:
    file = write_run(at_home / "run", ONE, base="other.yaml") / "checkpoints" / "last.ckpt"  # type: ignore[arg-type]
    with pytest.raises(UserError, match="base: found an unknown key"):
        load_run(file, trust=["toy_parts"])


def test_a_tokenizer_with_a_program_beside_it_is_refused(at_home: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "umm_zoo" / "assets" / "tokenizer", "own")
    config = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    Path("own", "tokenizer_config.json").write_text(json.dumps(config))
    Path("own", "theirs.py").write_text("open('ran', 'w')\n")
    with pytest.raises(FileNotFoundError, match="own"):
        load_tokenizer("own")
    assert not Path("ran").exists()
