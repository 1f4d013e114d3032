"""Run folders as a training leaves them, as plain files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


def write_run_files(folder: Path, name: str = "toy", lr: float = 0.1, steps: int = 40, finished: bool = True) -> Path:
    """A run with losses every second step, scores of two validations, two sample grids, a hostile name in its data."""
    experiment = {
        "name": name,
        "seed": 3,
        "method": {"_target_": "my.Painter", "prompt": HOSTILE},
        "training": {"optimizer": {"lr": lr}},
        "metrics": {
            "accuracy": {"_target_": "umm_zoo.metrics.AnswerAccuracy"},
            "guess": {"_target_": "umm_zoo.metrics.LanguagePrior"},
            "image": {"_target_": "umm_zoo.metrics.Reconstruction"},
        },
    }
    for part in ("logs", "samples"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    header = "epoch,step,throughput/data_ms,throughput/forward_backward_ms,throughput/optimiser_ms,train/loss,val/accuracy/colour,"
    lines = [header + "val/accuracy/overall,val/guess/held_out,val/image/psnr,val/image/psnr_ceiling"]
    for step in range(1, steps, 2):
        lines.append(f"0,{step},10,80,10,{lr + 1 / step},,,,,")
    for step, value in ((steps // 2 - 1, 0.25), (steps - 1, 0.75)):
        lines.append(f"0,{step},,,,,{value / 2},{value},0.5,{20 * value},33.5")
    (folder / "logs/metrics.csv").write_text("\n".join(lines) + "\n")
    for step, colour in ((steps // 2, "red"), (steps, "blue")):
        Image.new("RGB", (300, 20), colour).save(folder / f"samples/step-{step:06d}.png")
    ledger = {"samples": 9, "read": 8, "skipped": 1, "epochs": 0.5, "skips": [{"key": "k1", "reason": HOSTILE}]}
    (folder / "data.json").write_text(json.dumps({"train": {HOSTILE: ledger}, "val": {}}))
    facts = {
        "command": "python -m umm_zoo.fit my.yaml",
        "max_steps": 40,
        "parts": [{"name": "paint", "class": "Linear", "trained": 12, "frozen": 3}],
    }
    (folder / "report.json").write_text(json.dumps(facts))
    if finished:
        record: dict[str, Any] = {
            "name": name,
            "experiment": "my.yaml",
            "seed": 3,
            "seconds": 125.4,
            "steps": steps,
            "commit": "abc1234",
        }
        scores = {"val/accuracy/colour": 0.375, "val/accuracy/overall": 0.75, "val/guess/held_out": 0.5, "val/image/psnr": 15.0}
        record |= {
            "metrics": scores | {"val/image/psnr_ceiling": 33.5, "throughput/data_ms": 10.0, "throughput/forward_backward_ms": 80.0}
        }
        record["costs"] = {"parameters": 15.0, "seconds_per_step": lr}
        (folder / "metrics.json").write_text(json.dumps(record))
    return folder
