"""Shared parts of the benchmarks: clock, memory, floating-point operations, and small models of random weights."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

Options = Namespace
#: ``seconds`` of a unit of work; where measured, ``memory`` at its peak in MiB and ``gflop`` of the unit; more by any name.
Numbers = dict[str, float]


def processor_time(device: str) -> float:
    """Seconds of this process's processor time, which other programs disturb less; of the clock where a GPU does the work."""
    return now(device) if device.startswith("cuda") else time.process_time()


def now(device: str) -> float:
    """The clock, when the device has done all it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def held(device: str, what: str = "VmHWM") -> float:
    """The most held so far in MiB: on the accelerator, or by the process where there is none."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # the system's own count outlives the start of another program: a child begins with its parent's
        return int(status.read_text().partition(f"{what}:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_from_here(device: str) -> float:
    """What is held now, in MiB; the peak is counted again where the system allows it, so that imports are no part of it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return held(device, "VmRSS")


def gflop(work: Callable[[], Any]) -> float:
    """Floating-point operations of a call in 10^9: matrix products, convolutions and attention, forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    aten = torch.ops.aten  # torch counts the attention kernels of GPUs only
    own: dict[Any, Any] = {aten._scaled_dot_product_flash_attention_for_cpu: forward}
    own |= {aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    return counter.get_total_flops() / 1e9


def timed(work: Callable[[], Any], times: int, device: str, warmup: int = 2) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(times + warmup):
        start = processor_time(device)
        work()
        seconds.append(processor_time(device) - start)
    return statistics.median(seconds[warmup:])


def training_step(parameters: Iterable[Any], loss: Callable[[], Any], options: Options, before: float) -> Numbers:
    """Seconds, memory above ``before`` and operations of a training step with AdamW, after two that are not timed."""
    import torch

    optimizer = torch.optim.AdamW([parameter for parameter in parameters if parameter.requires_grad], lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, options.steps, options.device)
    most = held(options.device) - before  # before the operations are counted, which takes memory of its own
    return {"seconds": seconds, "memory": most, "gflop": gflop(step)}


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
