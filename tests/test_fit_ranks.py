"""The real command on two processes: the scores of one, and one end for both where one of them meets an error."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest
import toy_parts
from nursery import Nursery
from test_fit_errors import BAD, SAMPLES, write
from test_fit_processes import environment, finished, fit

from data_pipelines.shards.writing import write_shards
from umm_zoo.shapes import World, make_sample

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
TWO = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=8")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for split, tasks in (("train", {"captions": 5, "dialogues": 7}), ("val", {"questions": 3, "pairs": 2})):
        for task, count in tasks.items():
            samples = (make_sample(World(), 0, split, task, i).members(World()) for i in range(count))
            write_shards(samples, folder / split, task, samples_per_shard=2)
    return folder


def scores(nursery: Nursery, shards: Path, runs: Path, devices: int) -> dict[str, float]:
    overrides = [f"vars.data={shards}", f"name=ranks{devices}", f"trainer.devices={devices}", "trainer.accelerator=cpu"]
    overrides += ["trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=4", "data.val_batch_size=1"]
    overrides += ["training.optimizer.lr=0.0", "callbacks.validation.max_new_tokens=2"]
    overrides += ["trainer.strategy=ddp"] if devices > 1 else []
    command = [nursery.python, "-m", "umm_zoo.fit", "experiments/llava/shapes.yaml", "--runs", str(runs), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((runs / f"ranks{devices}" / "metrics.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("val/")}


def test_two_processes_with_uneven_shards_score_as_one_does(nursery: Nursery, shards: Path, tmp_path: Path) -> None:
    # 5 validation rows: 3 batches on one rank, 2 on the other
    one, two = (scores(nursery, shards, tmp_path, devices) for devices in (1, 2))
    assert one.keys() == two.keys() and "val/perplexity" in one
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


# -- errors --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    return tmp_path


def trouble(rank: int, bug: bool = False, step: int = 2, closes: bool = False) -> str:
    arguments = {"_target_": "toy_parts.Trouble", "rank": rank, "bug": bug, "step": step, "closes": closes}
    return f"callbacks.trouble={json.dumps(arguments)}"


LINE = "error: toy.yaml: callbacks.trouble: s00005: found a long text, expected a short one"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_user_error_of_one_rank_ends_both_and_rank_0_says_it_once(rank: int, nursery: Nursery, folder: Path) -> None:
    began = time.monotonic()
    codes, said = nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, trouble(rank))
    assert codes == [2, 2] and time.monotonic() - began < 240  # the other rank would wait for half an hour
    assert said[0].count(LINE) == 1 and "runs/toy/checkpoints/step-00000002.ckpt is kept; continue from it" in said[0]
    assert "error: " not in said[1] and not any("Traceback" in text for text in said)
    assert [path.name for path in (folder / "runs").iterdir()] == ["toy"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_connection_that_breaks_says_why_it_has(rank: int, nursery: Nursery, folder: Path) -> None:
    codes, said = nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, trouble(rank, closes=True))
    assert codes == [2, 2] and said[0].count(LINE) == 1 and not any("Traceback" in text for text in said), said


def test_a_port_in_use_is_one_line(nursery: Nursery, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        command = [nursery.python, "-m", "umm_zoo.fit", "toy.yaml", *TWO]
        done = subprocess.run(command, cwd=folder, env=environment(**places), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr  # and no rank holds the pipes
    assert f"error: 127.0.0.1:{places['MASTER_PORT']}: found an address at which the ranks could not meet" in done.stderr


def test_a_bug_of_one_rank_ends_both_and_shows_its_traceback_only(nursery: Nursery, folder: Path) -> None:
    codes, (first, second) = nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, trouble(1, bug=True))
    assert codes == [1, 1] and "Traceback" not in first
    assert second.count("Traceback (most recent call last)") == 1 and "RuntimeError: no user can mend this" in second


def test_what_all_ranks_find_is_said_once(nursery: Nursery, folder: Path) -> None:
    codes, said = nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, "method.body.droput=0.1")
    assert codes == [2, 2] and "".join(said).count("error: toy.yaml: method.body.droput: found an unknown argument") == 1


def test_what_only_rank_0_looks_at_ends_both(nursery: Nursery, folder: Path) -> None:
    codes, said = nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, "ckpt=last")
    assert codes == [2, 2] and "".join(said).count("error: toy.yaml: ckpt: found 'last', but there is no checkpoint in") == 1


def test_a_finished_run_is_left_alone_by_both(nursery: Nursery, folder: Path) -> None:
    assert nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO)[0] == [0, 0]
    codes, said = nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO)
    assert codes == [0, 0] and "".join(said).count("this experiment has finished there") == 1


def test_a_validation_that_was_due_is_made_by_both(nursery: Nursery, folder: Path) -> None:
    crash = json.dumps({"_target_": "toy_parts.CrashAt", "hook": "on_validation_batch_end", "step": 8})
    assert nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, "name=whole")[0] == [0, 0]
    assert nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, f"callbacks.crash={crash}")[0] == [1, 1]
    codes, said = nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, "ckpt=last")
    assert codes == [0, 0], said
    rows = [(folder / "runs" / name / "logs" / "metrics.csv").read_text() for name in ("whole", "toy")]
    assert rows[0] == rows[1] and rows[0].count("\n") == 5


def test_bad_samples_of_one_rank_end_both(nursery: Nursery, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    write("world/a", [{"0.png": BAD[0]} if row in (5, 7, 9) else {} for row in range(SAMPLES)])  # rank 1 reads every other row
    source = {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "world/*.tar"}
    data = {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 8, "batch_size": 2, "window": 0, "max_skips": 2}
    toy_parts.write_yaml(folder / "toy.yaml", toy_parts.toy_experiment() | {"data": data | {"train": {"world": source}}})
    codes, said = nursery.codes_of_ranks(folder, 2, "toy.yaml", *TWO, "metrics.loss=null")
    assert codes == [2, 2] and "".join(said).count("error: ") == 1
    assert "error: toy.yaml: data.max_skips: found 3 bad samples, expected 2" in said[0]


def test_lightnings_launcher_says_it_once_and_leaves_no_process(nursery: Nursery, folder: Path) -> None:
    began = time.monotonic()
    code, out, error = finished(fit(nursery, folder, "toy.yaml", *TWO, trouble(1)))  # reads to the end of what both ranks hold open
    assert code == 2 and time.monotonic() - began < 240
    assert error.count(LINE) == 1 and "Traceback" not in out + error


@pytest.mark.parametrize("bug", [False, True])
def test_torchrun_says_it_once(bug: bool, nursery: Nursery, folder: Path) -> None:
    launch = [nursery.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "umm_zoo.fit"]
    command = [*launch, "toy.yaml", *TWO, trouble(1, bug)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stderr.count(LINE) == (0 if bug else 1)
    assert done.stderr.count("RuntimeError: no user can mend this") == (1 if bug else 0)
    assert "Connection closed" not in done.stderr and "exitcode  : " + ("1" if bug else "2") in done.stderr
