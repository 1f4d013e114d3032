"""Check that a reward is worth optimising: ``python tools/check_reward.py RUN EXPERIMENT``, before any reinforcement.

RUN is a finished first stage of UAE on the shapes world, EXPERIMENT the file of the second, whose reward is looked at. Images of
true captions of held-out scenes are generated from several seeds; then of the same captions with one small object left out, one
small object of another colour, one large object left out. Each must lower the reward by more than the decoder's noise moves it, or
reinforcement would learn the noise. Exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError, user_errors
from umm_zoo.experiment.file import load_experiment
from umm_zoo.experiment.trust import trusting
from umm_zoo.methods.requests import request_batch
from umm_zoo.outputs import Draws
from umm_zoo.training.finished_run import add_trust, load_run

Objects = list[Mapping[str, Any]]
COLOURS = ("red", "green", "blue", "yellow")


def caption(objects: Objects, background: str) -> str:
    """All that is told of a scene."""
    clauses = [f"{item['cell']}: a {item['size']} {item['colour']} {item['shape']}" for item in objects]
    return "; ".join([*clauses, f"background: {background}"])


def changed(objects: Objects, size: str, recoloured: bool = False) -> Objects | None:
    """The first object of a size left out or of another colour; None where there is none, or nothing would be left."""
    found = next((item for item in objects if item["size"] == size), None)
    if found is None or (len(objects) == 1 and not recoloured):
        return None
    if recoloured:
        other = COLOURS[(COLOURS.index(found["colour"]) + 1) % len(COLOURS)]
        return [{**item, "colour": other} if item is found else item for item in objects]
    return [item for item in objects if item is not found]


CHANGES: dict[str, Callable[[Objects], Objects | None]] = {
    "small object left out": partial(changed, size="small"),
    "small object recoloured": partial(changed, size="small", recoloured=True),
    "large object left out": partial(changed, size="large"),
}


@torch.no_grad()
def rewards(method: Draws, reward: Any, batch: Batch, captions: Sequence[str], seeds: int) -> Tensor:
    """``[B, seeds]``."""
    requests = request_batch(captions)
    columns = [reward(method.generate(requests, [1000 * k + row for row in range(len(batch))]), batch) for k in range(seeds)]
    return torch.stack(columns, dim=1)


def drops(method: Draws, reward: Any, batch: Batch, seeds: int) -> dict[str, tuple[float, int]]:
    """Mean drop of each change with the number of scenes it applies to; under ``noise`` the mean deviation over seeds."""
    scenes = [meta["scene"] for meta in batch.meta]
    full = rewards(method, reward, batch, [caption(scene["objects"], scene["background"]) for scene in scenes], seeds)
    found = {"noise": (full.std(dim=1).mean().item(), len(batch))}
    for name, change in CHANGES.items():
        objects = [change(scene["objects"]) for scene in scenes]
        kept = [row for row, own in enumerate(objects) if own is not None]
        if kept:
            texts = [caption(own or scene["objects"], scene["background"]) for own, scene in zip(objects, scenes, strict=True)]
            lowered = (full - rewards(method, reward, batch, texts, seeds)).mean(dim=1)[kept]
            found[name] = (lowered.mean().item(), len(kept))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 the reward sees all changes, 1 it does not, 2 a user error."""
    parser = argparse.ArgumentParser(prog="tools/check_reward.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("experiment", metavar="EXPERIMENT")
    parser.add_argument("--scenes", type=int, default=128, metavar="N", help="held-out scenes (default: 128)")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="images of each caption (default: 4)")
    add_trust(parser)
    arguments = parser.parse_args(argv)
    with user_errors() as outcome, trusting(arguments.trust):
        from umm_zoo.experiment.build import build
        from umm_zoo.experiment.check import check
        from umm_zoo.training.setup import build_data

        run = load_run(arguments.run)
        method = run.load_method()
        if not isinstance(method, Draws):
            raise UserError(arguments.run, f"a {type(method).__name__}", "a method that generates images from text")
        check(experiment := load_experiment(arguments.experiment))
        reward = build(experiment.method["reward"], "method.reward")
        data: Any = build_data(run.experiment)
        data.val_batch_size = arguments.scenes
        data.setup("validate")
        batch = next(islice(data.val_dataloader(), 1))
        found = drops(method, reward, batch, arguments.seeds)
        noise = found["noise"][0]
        for name, (value, count) in found.items():
            verdict = "" if name == "noise" else "  seen" if value > noise else "  NOT seen above the noise"
            print(f"{name:26s} {value:8.4f}  ({count} scenes){verdict}")
        outcome.code = int(any(value <= noise for name, (value, _) in found.items() if name != "noise"))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
