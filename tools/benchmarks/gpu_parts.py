"""Parts of the GPU report: what is measured at the paper's size, in which order, and by which numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks import base, paper
from tools.benchmarks.base import Numbers


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Args:
        changes: to the experiment, as on the command line.
        recompute: False keeps all activations.
        precision: ``bf16-mixed``, or ``32-true``, for which matrix products are in TF32.
    """

    changes: tuple[str, ...] = ()
    recompute: bool = True
    precision: str = "bf16-mixed"


PAPER = Variant()
KEPT = Variant(recompute=False)


def compiled(*parts: str) -> Variant:
    """With parts that torch compiles."""
    return Variant((f"training.compile=[{','.join(parts)}]",))


@dataclass(frozen=True)
class Training:
    """A training step of an experiment.

    Args:
        file: the experiment, below ``experiments``.
        side: of the images in pixels.
        kind: of the rows, see ``paper.rows``.
        runs: variant, its name, and the settings ``(rows, words)`` in this order.
        steps: that are timed.
        counts: whether operations are counted, which for thousands of small kernels takes too long.
    """

    file: str
    side: int
    kind: str
    runs: tuple[tuple[str, Variant, tuple[tuple[int, int], ...]], ...]
    steps: int = 3
    counts: bool = True


_BRIDGE_FLOAT = Variant(("vars.decoder.dtype=float32", "vars.codec.dtype=float32"))
TRAININGS = {
    "wemmu-stage1": Training(
        "wemmu/paper/stage1.yaml",
        512,
        "bridge",
        (
            ("paper", PAPER, ((16, 64), (64, 64), (32, 64), (73, 64))),
            ("compiled", compiled("pathway", "connector", "decoder"), ((64, 64),)),
            ("all activations kept", KEPT, ((16, 64), (32, 64))),
            ("decoder and codec in float32", _BRIDGE_FLOAT, ((64, 64),)),
            ("float32 with TF32", Variant(_BRIDGE_FLOAT.changes, True, "32-true"), ((16, 64),)),
        ),
    ),
    "metaquery": Training(
        "metaquery/paper/stage1.yaml",
        512,
        "bridge",
        (
            ("paper", PAPER, ((32, 256), (32, 64), (32, 1024), (64, 256))),
            ("compiled", compiled("connector", "decoder"), ((32, 256),)),
            ("all activations kept", KEPT, ((16, 256),)),
        ),
    ),
    "ross-lora": Training(
        "ross/paper/d-stage2-lora.yaml",
        384,
        "ross",
        (("paper", PAPER, ((8, 64), (32, 64))), ("compiled", compiled("language_model", "head"), ((8, 64),))),
    ),
    "ross-head": Training("ross/paper/d-stage1.yaml", 384, "ross", (("paper", PAPER, ((8, 64), (32, 64))),)),
    "wemmu-stage2": Training("wemmu/paper/stage2.yaml", 1024, "bridge", (("paper", PAPER, ((8, 64), (16, 64), (32, 64))),)),
    "uae-rollout": Training("uae/paper/stage2.yaml", 512, "images", (("paper", PAPER, ((1, 0), (2, 0))),), steps=1, counts=False),
}

#: Told after every result.
Tell = Callable[[str, Numbers], None]


def train(name: str, device: str, done: Callable[[str], bool], tell: Tell) -> None:
    """All settings of a training; on a CPU the first of each variant but the compiled ones, of few layers, with small images."""
    import torch

    own, small = TRAININGS[name], not device.startswith("cuda")
    for label, variant, settings in own.runs:
        if small:
            settings = ((2 if own.kind == "bridge" else 1, settings[0][1]),)
        wanted = {f"{label}, {rows} rows, {words} words": (rows, words) for rows, words in settings}
        wanted = {setting: sizes for setting, sizes in wanted.items() if not done(setting)}
        if not wanted:
            continue
        is_compiled = any("compile" in change for change in variant.changes)  # operations in its graphs are not counted
        if small and is_compiled:
            continue  # minutes of a C++ compiler
        torch.backends.cuda.matmul.allow_tf32 = variant.precision == "32-true"
        try:
            layers = 2 if own.kind == "ross" else 1
            method, _ = paper.method_of(
                f"experiments/{own.file}", device, variant.changes, layers if small else 0, variant.recompute
            )
        except Exception as problem:  # one variant that cannot be built must not cost the others
            for setting in wanted:
                tell(setting, failure(problem))
            continue
        for setting, (rows, words) in wanted.items():
            batch = paper.rows(rows, 128 if small and own.kind != "ross" else own.side, own.kind, words)
            try:
                steps, counts = 0 if small else own.steps, own.counts and not is_compiled
                numbers = paper.training_step(method, batch, device, steps, variant.precision, counts)
                tell(setting, {"rows": float(len(batch)), **numbers})
            except Exception as problem:
                tell(setting, failure(problem))
            method.zero_grad()  # behind the error, which held what the step had made
            if not small:
                torch.cuda.empty_cache()
        del method
        if not small:
            torch.cuda.empty_cache()


def failure(problem: Exception) -> Any:
    """An error as a result."""
    return {"failed": f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"}


def janus(device: str, done: Callable[[str], bool], tell: Tell) -> None:
    """Sampling of images of 384 px by Janus-Pro-1B, with guidance."""
    import torch

    small = not device.startswith("cuda")
    changes = ("vars.unified.dtype=bfloat16",)
    method, _ = paper.method_of("experiments/janus/paper/1b-stage2.yaml", device, changes, 1 if small else 0)
    method.eval()
    for rows in (1,) if small else (8, 32, 128):
        setting = f"sampling, {rows} rows"
        if done(setting):
            continue
        model = next(part for part in method.modules() if hasattr(part, "sample_image"))
        inputs = model.image_prompt([f"a large red circle, number {row}" for row in range(rows)])
        before = base.memory_from_here(device)
        with torch.no_grad():
            seconds = base.timed(partial(model.sample_image, inputs, range(rows), 5.0), 1, device, warmup=0 if small else 1)
        tell(setting, {"rows": float(rows), "seconds": seconds, "memory": base.held(device) - (before if small else 0)})


def loading(device: str, done: Callable[[str], bool], tell: Tell, folder: Path) -> None:
    """Images per second from photographs of 1,000 to 2,000 px to 512 px, by workers; alone, and while the GPU multiplies."""
    import threading
    from argparse import Namespace

    import torch

    from tools.benchmarks import loader

    small = not device.startswith("cuda")
    sizes = {
        "samples": 64 if small else 256,
        "edge": [1000, 2000],
        "image_size": 512,
        "batch_size": 16,
        "shards": 4,
        "buckets": True,
    }
    options = Namespace(**{**loader.SIZES, **sizes, "rounds": 1, "folder": str(folder), "device": device})
    for workers, busy in ((0, False),) if small else ((8, False), (14, False), (14, True)):
        setting = f"{workers} workers" + (" beside products" if busy else "")
        if done(setting):
            continue
        stop = threading.Event()
        factor = torch.randn(4096, 4096, device=device).bfloat16() if busy else torch.empty(0)

        def multiply(factor: Any = factor, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                for _ in range(20):
                    factor @ factor
                torch.cuda.synchronize()

        beside = threading.Thread(target=multiply)
        if busy:
            beside.start()
        numbers = loader.measure(options, f"{workers} workers", "ours")
        stop.set()
        if busy:
            beside.join()
        tell(setting, {"rows": 1.0, "seconds": 1 / numbers["images/s"], "per process": 1 / numbers["seconds"]})
