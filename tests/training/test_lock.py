"""One process per run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import toy_parts
from nursery import Nursery

from umm_zoo.errors import UserError
from umm_zoo.training import lock
from umm_zoo.training.lock import NAME, Holder, locked

ENDED = Holder(Holder.this().host, Holder.this().space, 2**22 + 7, "1", "x")
ELSEWHERE = replace(Holder.this(), host="node7", token="y")


def hold(folder: Path, holder: Holder | str, age: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / NAME
    file.write_text(holder if isinstance(holder, str) else json.dumps(asdict(holder)))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_a_lock_is_given_back_with_its_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "a"):
        assert (tmp_path / "a" / NAME).is_file()
        with pytest.raises(UserError, match=f"found a run in progress \\(process {os.getpid()} on "), locked(tmp_path / "a"):
            pass
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("holder", "age", "free"),
    [
        (ENDED, 0.0, True),
        (replace(Holder.this(), began="7"), 0.0, True),  # its number has been used again
        (Holder.this(), 9000.0, False),  # a laptop was asleep
        (ELSEWHERE, 30.0, False),
        (ELSEWHERE, 90.0, True),
        (replace(Holder.this(), space="another container"), 30.0, False),
        ("", 90.0, True),
        ("{", 30.0, False),
    ],
)
def test_only_a_stale_lock_is_taken_over(
    holder: Holder | str, age: float, free: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = hold(tmp_path / "a", holder, age)
    if not free:
        with pytest.raises(UserError, match="a run in progress"), locked(tmp_path / "a"):
            pass
        assert file.is_file()
        return
    with locked(tmp_path / "a"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert f"note: {tmp_path / 'a'}: took over the lock " in capsys.readouterr().err


def test_a_takeover_that_was_killed_blocks_nobody(tmp_path: Path) -> None:
    hold(tmp_path / "a", ENDED)
    guard = tmp_path / "a" / f"{NAME}-taking-over"
    guard.touch()
    os.utime(guard, (time.time() - 90,) * 2)
    with locked(tmp_path / "a"):
        assert not guard.exists()


def test_a_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with locked(tmp_path / "a"):
        os.utime(tmp_path / "a" / NAME, (0, 0))
        time.sleep(0.5)
        assert (tmp_path / "a" / NAME).stat().st_mtime > time.time() - 5


@pytest.mark.processes
def test_of_many_that_take_over_one_wins(tmp_path: Path) -> None:
    hold(tmp_path / "a", ENDED)
    code = (
        "import sys\nfrom pathlib import Path\nfrom umm_zoo.errors import UserError\nfrom umm_zoo.training.lock import locked\n"
        "try:\n  with locked(Path(sys.argv[1])):\n    print('won', flush=True)\n    sys.stdin.read()\n"
        "except UserError:\n  print('lost', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    many = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = [process.stdout.readline().strip() for process in many if process.stdout]
    for process in many:
        process.communicate("")
    assert sorted(said) == ["lost"] * 5 + ["won"]


@pytest.mark.processes
def test_the_second_fit_on_a_folder_ends_with_one_line(nursery: Nursery, tmp_path: Path) -> None:
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    slow = {"_target_": "toy_parts.SlowStart", "file": "started.txt"}
    first = nursery.start(tmp_path, "toy.yaml", f"callbacks.slow={json.dumps(slow)}", log="first.txt")
    while not (tmp_path / "started.txt").exists():
        time.sleep(0.05)
    for more in ([], ["--again"]):
        code, said = nursery.run(tmp_path, "toy.yaml", *more)
        assert code == 2 and "error: runs/toy: found a run in progress (process" in said and said.count("\n") == 1, said
    os.kill(first, signal.SIGKILL)
    nursery.wait(first)
    code, said = nursery.run(tmp_path, "toy.yaml")
    assert code == 0 and f"note: runs/toy: took over the lock of process {first} on" in said
    assert not (tmp_path / "runs" / "toy" / NAME).exists()
