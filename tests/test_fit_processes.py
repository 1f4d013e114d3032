"""What only a process of its own can show: start-up time, signals from outside, two ranks, a user's own folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_parts
import yaml
from nursery import Nursery

from umm_zoo.checkpoints.files import load_checkpoint

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def fit(nursery: Nursery, folder: Path, *argv: str) -> subprocess.Popen[str]:
    command = [nursery.python, "-m", "umm_zoo.fit", *argv]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    return tmp_path


@pytest.mark.parametrize(("argument", "said"), [("--help", "python -m umm_zoo.fit"), ("seed=x", "seed: found 'x' (text)")])
def test_help_and_errors_of_the_envelope_import_no_torch(argument: str, said: str, folder: Path) -> None:
    code = (
        "import sys, umm_zoo.fit as f\n"
        f"try: f.main(['toy.yaml', '{argument}'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, check=True)
    assert said in done.stdout + done.stderr and done.stdout.endswith("[]\n")


def test_help_of_every_command_is_fast_and_imports_no_large_library() -> None:
    packages = [ROOT / name for name in ("umm_zoo", "data_pipelines")]
    files = [file for package in packages for file in package.rglob("*.py") if is_command(file)]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sorted(files)]
    assert {"umm_zoo.fit", "umm_zoo.export", "umm_zoo.new.__main__", "data_pipelines.converters.coco"} < {*names}
    code = """if True:
        import contextlib, io, runpy, sys, time
        took, said = {}, []
        for name in sys.argv[1:]:
            began, sys.argv, text = time.process_time(), [name, "--help"], io.StringIO()
            try:
                with contextlib.redirect_stdout(text):
                    runpy.run_module(name, run_name="__main__")
            except SystemExit as end:
                assert not end.code and "usage: python -m " in text.getvalue(), name
            took[name] = time.process_time() - began
        large = sorted({"torch", "lightning", "transformers", "diffusers", "torchmetrics", "scipy"} & {*sys.modules})
        began = time.process_time()
        import torch
        print(large, took["umm_zoo.fit"] <= (time.process_time() - began) / 2)
    """
    run = subprocess.run([sys.executable, "-c", code, *names], env=environment(), capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[] True\n", "")


def is_command(file: Path) -> bool:
    return 'if __name__ == "__main__"' in file.read_text() and file.parent.name != "release"  # a script that is written out


def test_the_check_of_a_toy_imports_what_its_file_names(folder: Path) -> None:
    code = (
        "import sys, umm_zoo.fit as f\n"
        "assert f.main(['toy.yaml', '--check']) == 0\n"
        "print(sorted({'diffusers', 'scipy.stats', 'peft', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_two_ranks_are_stopped_from_outside_and_resume(nursery: Nursery, folder: Path) -> None:
    watched = "callbacks.losses={_target_: toy_parts.Losses, file: losses.txt}"
    many = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.val_check_interval=${trainer.max_steps}", watched]
    process = fit(nursery, folder, "toy.yaml", "trainer.max_steps=100000", *many)
    deadline = time.monotonic() + 180
    while not (folder / "losses.txt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, out, error = finished(process)
    assert code == 143, error
    assert "stopped by SIGTERM at step" in out and "saved runs/toy/checkpoints/step-" in out and "continue with ckpt=last" in out
    checkpoint = load_checkpoint(folder / "runs" / "toy")
    first, second = checkpoint["random_states"]
    assert not torch.equal(first["torch"], second["torch"])  # dropout and noise differ between ranks
    more = checkpoint["global_step"] + 2
    code, out, error = finished(fit(nursery, folder, "toy.yaml", f"trainer.max_steps={more}", *many, "ckpt=last"))
    assert code == 0, error
    assert out.count("scores in runs/toy/metrics.json") == 1
    report = json.loads((folder / "runs" / "toy" / "metrics.json").read_text())
    assert (report["processes"], report["steps"]) == (2, more)
    assert [path.name for path in (folder / "runs").iterdir()] == ["toy"]


def test_a_rank_that_is_stopped_before_the_first_batch_leaves_none_behind(nursery: Nursery, folder: Path) -> None:
    slow = {"_target_": "toy_parts.SlowStart", "file": "started.txt"}
    toy_parts.write_yaml(folder / "slow.yaml", {"base": "toy.yaml", "callbacks": {"slow": slow}})
    process = fit(nursery, folder, "slow.yaml", "trainer.devices=2", "trainer.strategy=ddp")
    while not (folder / "started.txt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, _, error = finished(process)  # reads to the end of the pipes, which the second rank holds too
    assert code == 143 and "stopped at once by SIGTERM; nothing was saved" in error


def test_block_in_a_users_own_folder(nursery: Nursery, folder: Path) -> None:
    mine = folder / "elsewhere" / "mine"
    mine.mkdir(parents=True)
    (mine / "my_blocks.py").write_text(
        "from torch import Tensor\nfrom toy_parts import Head\n\n\n"
        "class LoudHead(Head):\n"
        "    def __init__(self, in_dim: int, gain: float) -> None:\n"
        "        super().__init__(in_dim)\n"
        "        self.gain = gain\n\n"
        "    def forward(self, x: Tensor) -> Tensor:\n"
        "        return self.gain * super().forward(x)\n"
    )
    changed = {"base": "../../toy.yaml", "method": {"head": {"_target_": "my_blocks.LoudHead", "in_dim": 3, "gain": 2.0}}}
    (mine / "loud.yaml").write_text(yaml.safe_dump(changed))
    code, _, error = finished(fit(nursery, folder, "elsewhere/mine/loud.yaml"))
    assert code == 0, error
    assert (folder / "runs" / "loud" / "metrics.json").is_file()
    # and it is found again from anywhere, without the file, by who trusts the modules and says where they lie
    program = "import sys; from umm_zoo.method import Method; sys.path.append(sys.argv[2]); "
    program += "print(Method.load(sys.argv[1], trust=['my_blocks', 'toy_parts']).head.gain)"
    command = [nursery.python, "-c", program, str(folder / "runs" / "loud"), str(mine)]
    assert subprocess.run(command, cwd="/", env=environment(), capture_output=True, text=True, check=True).stdout == "2.0\n"
