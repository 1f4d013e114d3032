"""Shared parts of the benchmarks: arms in turns, each turn in a process of its own, medians, memory, and small models."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Case = TypeVar("Case")
Numbers = dict[str, float]


def parser(doc: str | None, steps: tuple[int, str], **sizes: tuple[int, str]) -> argparse.ArgumentParser:
    """The options of a benchmark: sizes (default, help), and how often, how long and where it runs."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in {**sizes, "steps": steps, "repeats": (3, "turns of every arm")}.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text} (default {default})")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    return made


def in_turns(
    measure: Callable[[argparse.Namespace, Case], Numbers], options: argparse.Namespace, cases: Iterable[Case]
) -> dict[Case, Numbers]:
    """Medians of ``measure(options, case)`` over turns, each in a new process; other load on the machine meets all cases."""
    turns: dict[Case, list[Numbers]] = {case: [] for case in cases}
    for case in [*turns] * options.repeats:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            turns[case].append(process.submit(measure, options, case).result())
    return {case: {name: statistics.median(turn[name] for turn in own) for name in own[0]} for case, own in turns.items()}


def memory(device: str) -> float:
    """The most held so far in MiB: on the accelerator, or by the process where there is none."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def now(device: str) -> float:
    """The clock, when the device has done all it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_step(method: Any, loss: Callable[[], Any], steps: int, device: str) -> float:
    """Seconds of a training step with AdamW, the median of ``steps`` after two that are not timed."""
    import torch

    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)
    method.train()
    seconds = []
    for _ in range(steps + 2):
        start = now(device)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(device) - start)
    return statistics.median(seconds[2:])


def small_qwen(width: int, layers: int, heads: int, kv_heads: int, vision_width: int, vision_layers: int) -> Any:
    """A Qwen2.5-VL of random weights, with patches of 4 pixels."""
    from umm_zoo.backbones.qwen2_5_vl import Qwen25VL

    half = width // heads // 2
    rest = half - half // 4  # M-RoPE gives a quarter of a head's frequencies to time, the rest to rows and columns
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half // 4, rest - rest // 2, rest // 2]}
    text: dict[str, Any] = {"vocab_size": 1024, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_parameters": rope}
    vision = {"depth": vision_layers, "hidden_size": vision_width, "intermediate_size": 3 * vision_width, "num_heads": 2}
    vision |= {"patch_size": 4, "window_size": 32, "out_hidden_size": width}
    blocks = {"fullatt_block_indexes": [*range(1, vision_layers, 2)] or [0]}
    config = {"tie_word_embeddings": True, "text_config": text, "vision_config": {**vision, **blocks}}
    return Qwen25VL.from_config(config, system_prompt=None)


def small_codec(channels: int, widths: list[int], groups: int) -> Any:
    """A KL codec of random weights that halves the sides once for every width but the first."""
    from umm_zoo.backbones.codecs import KLCodec

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths)}
    sizes = {"latent_channels": channels, "layers_per_block": 1, "norm_num_groups": groups}
    return KLCodec.from_config({**sizes, **blocks, "block_out_channels": widths})
