"""What one request, and all of them together, may ask of a server. Nothing here imports torch."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from umm_zoo.generation.options import number, whole


def _limit(default: int, help: str, most: int = 10**9) -> Any:
    return field(default=default, metadata={"option": whole(help, 1, most, default)})


@dataclass(frozen=True)
class Limits:
    """Limits of requests; all defaults are our choice.

    Every field is an option of the command line, ``--max-body`` and so on.
    """

    max_body: int = _limit(32, "MiB of one request's body")
    max_memory: int = _limit(1024, "MiB of all requests' bodies and opened images at a time")
    max_images: int = _limit(16, "images of one request")
    max_pixels: int = _limit(2**25, "pixels of one image that is sent")
    max_made: int = _limit(2**22, "pixels of one image that is made")
    max_prompt: int = _limit(100_000, "characters of all texts of one request")
    max_n: int = _limit(16, "answers or images of one request", 10_000)
    max_tokens: int = _limit(4096, "tokens of one answer: of more, as many are given", 100_000)
    max_steps: int = _limit(250, "steps of a sampler", 1000)
    max_queue: int = _limit(256, "answers and images that wait")
    timeout: float = field(
        default=600.0, metadata={"option": number("seconds of one request, its wait included", 0.1, 10**6, 600.0)}
    )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """An option per field."""
        for one in fields(cls):
            option = one.metadata["option"]
            assert one.default is not MISSING
            help = f"{option.help} (default: {one.default})"
            parser.add_argument(f"--{one.name.replace('_', '-')}", dest=one.name, default=one.default, metavar="N", help=help)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Limits:
        """Those of the command line; a ``UserError`` where one cannot be."""
        read = {f.name: f.metadata["option"].read(getattr(arguments, f.name), f"--{f.name.replace('_', '-')}") for f in fields(cls)}
        return cls(**read)
