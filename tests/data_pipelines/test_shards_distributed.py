"""Two processes over gloo read the same shards; what they saw, put together, is what one process sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
from test_shards import Recorder, data_of, ShardSource
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

world, out, steps, devices, accumulate, workers, resume = json.loads(sys.argv[1])
data = data_of(Path(world), val={"a": ShardSource(world)}, val_batch_size=3, num_workers=workers)
model = Recorder()
trainer = Trainer(max_steps=steps, accumulate_grad_batches=accumulate, default_root_dir=out, accelerator="cpu", devices=devices,
    strategy="ddp" if devices > 1 else "auto", logger=False, enable_progress_bar=False, enable_model_summary=False,
    val_check_interval=steps * accumulate, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    callbacks=[ModelCheckpoint(out, filename="at-{step}", every_n_train_steps=1, save_top_k=-1)])
trainer.fit(model, data, ckpt_path=resume)
Path(out, f"rank{trainer.global_rank}.json").write_text(json.dumps([model.seen, model.validated]))
"""


def fit(world: Path, out: Path, steps: int, devices: int, accumulate: int = 1, workers: int = 0, resume: Path | None = None):
    """Keys seen in training, put together in the order of the global batches, and each rank's keys seen in validation."""
    out.mkdir(parents=True)
    (out / "run.py").write_text(SCRIPT)
    settings = [str(world), str(out), steps, devices, accumulate, workers, resume and str(resume)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(out / "run.py"), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=240,
        env={"PYTHONPATH": f"{root}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(out)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(devices)]
    size = 8 // (devices * accumulate)
    micro_batches = len(ranks[0][0]) // size
    together = [key for m in range(micro_batches) for seen, _ in ranks for key in seen[m * size : (m + 1) * size]]
    return together, [validated for _, validated in ranks]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    from test_shards import write_world

    return write_world(tmp_path_factory.mktemp("world"), [5, 9, 1, 7, 3])


def test_two_ranks_then_one_then_two_see_what_one_sees_straight(world, tmp_path):
    straight, [validated] = fit(world, tmp_path / "straight", 9, devices=1)
    first, parts = fit(world, tmp_path / "a", 3, devices=2, accumulate=2, workers=1)
    second, _ = fit(world, tmp_path / "b", 6, devices=1, accumulate=4, resume=tmp_path / "a/at-step=3.ckpt")
    third, _ = fit(world, tmp_path / "c", 9, devices=2, resume=tmp_path / "b/at-step=6.ckpt")
    assert first + second + third == straight
    assert sorted(parts[0] + parts[1]) == sorted(validated) and len(set(validated)) == 25  # complete, disjoint, nothing padded
    assert (len(parts[0]), len(parts[1])) == (13, 12)
