"""What this machine can do at most: matrix products, reading and writing of memory, decoding of images."""

from __future__ import annotations

import io
from typing import Any

from tools.benchmarks.base import Numbers, timed


def limits(device: str = "cpu", size: int = 1536, megabytes: int = 256, dtype: str = "float32") -> Numbers:
    """``gflops`` of a square product, ``gbytes`` per second copied (read and written), ``pil`` JPEGs of 256 px decoded per second.

    One thread; the best of some tries, for a limit is not slowed by others.
    """
    import torch

    first, second = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    product = min(timed(lambda: first @ second, 3, device) for _ in range(3))
    copy = min(timed(lambda: target.copy_(source), 3, device) for _ in range(3))
    decode = min(timed(decoding(), 9, "cpu") for _ in range(3))
    return {"gflops": 2 * size**3 / product / 1e9, "gbytes": 2 * source.nbytes / copy / 1e9, "pil": 16 / decode}


def decoding() -> Any:
    """Decodes sixteen times a JPEG of 256 px with the noise of a photograph."""
    import numpy as np
    from PIL import Image

    rng, file = np.random.default_rng(0), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 12, (256, 256, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(file, "JPEG", quality=90)

    def decode() -> None:
        for _ in range(16):
            np.asarray(Image.open(io.BytesIO(file.getvalue())))

    return decode
