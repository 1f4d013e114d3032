"""Five families of unified models at toy size (experiments/unified): what an update, and an image from a prompt, cost each."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks import base, fit
from tools.benchmarks.base import Numbers, Options

UNIT, OWN = "update, or image", ("wemmu",)
FAMILIES = ("wemmu", "metaquery", "bagel", "janus", "harmon")
#: ``rows`` of each task on disk; ``images`` are generated at a time, from as many prompts of the shapes world.
SIZES: dict[str, Any] = {"rows": 512, "steps": 20, "warmup": 3, "images": 32}
SMALLEST: dict[str, Any] = {"rows": 48, "steps": 1, "warmup": 1, "images": 2}


def cases(options: Options) -> list[tuple[str, str]]:
    """What is done, by which family."""
    return [(setting, arm) for setting in ("update", "image") for arm in FAMILIES]


def missing(options: Options, arm: str) -> str:
    """Nothing is needed."""
    return ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """Seconds of one update, or of one image of a batch of them."""
    total = options.warmup + options.steps
    data = f"vars.data={shards(options)}"
    experiment = fit.prepare(f"experiments/unified/{arm}.yaml", [data], total)
    if setting == "update":
        moments, _ = fit.looped(experiment, total, options.device)
        took = [end - begin for begin, end in zip(moments[options.warmup :], moments[options.warmup + 1 :], strict=False)]
        return {"seconds": statistics.median(took)}
    from umm_zoo.experiment.build import build_method

    torch.manual_seed(0)
    method = build_method(experiment.method_tree).to(options.device).eval()
    asked = ["top left: a small red circle; bottom right: a large blue square; background: grey"] * options.images
    with torch.no_grad():
        seconds = base.timed(lambda: method.sample(asked), times=3, device=options.device, warmup=1)
    return {"seconds": seconds / options.images}


def shards(options: Options) -> Path:
    """Rows of all tasks."""
    from data_pipelines import shapes

    folder = Path(options.folder) / f"families-{options.rows}"
    if not folder.exists():
        words = f"{folder} --detail none --max-jitter 0 --plain --max-objects 2 --seed 1 --train {options.rows} --val 8 --test 0"
        shapes.main([*words.split(), "--tasks", "captions,questions,text_to_image,geneval,edits"])
    return folder
