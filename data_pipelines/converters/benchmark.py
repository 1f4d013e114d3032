"""``python -m data_pipelines.benchmark NAME OUT [key=value …]``: writer of a benchmark's items as shards to score in training.

``NAME`` and ``key=value`` are as in ``python -m umm_zoo.evaluate RUN --benchmark NAME``; ``OUT/NAME-*.tar`` is a validation set::

    python -m data_pipelines.benchmark pope shards/pope images=coco/val2014 limit=500
    python -m data_pipelines.benchmark geneval shards/geneval detector._target_=… --target-size 512

In an experiment it is a source of ``data.val``, and the benchmark's class a metric: ``metrics.pope: {_target_:
umm_zoo.benchmarks.pope.POPE}``. Where images are to be made nobody has true ones: a grey image stands in for each and says its
size, and losses over these rows mean nothing. Answers are as long as ``callbacks.validation.max_new_tokens`` lets them be.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.command import Parser, run, whole
from data_pipelines.converters.files import stored_image
from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.writing import write_shards
from umm_zoo.conversation import IMAGE_MARKER
from umm_zoo.errors import UserError, locating, say

if TYPE_CHECKING:
    from umm_zoo.benchmarks.base import Benchmark, Item


def samples_of(benchmark: Benchmark, items: list[Item], size: int | None, target_size: int) -> Iterator[dict[str, Any]]:
    """A sample per item; one without an answer asks for an image.

    Raises:
        UserError: an item says nothing, or has an image that cannot be used.
    """
    from umm_zoo.generation.answering import Ask

    grey = _grey(target_size)
    for item in items:
        if not item.text.strip():
            raise UserError(benchmark.name, "items without a text", "a benchmark of questions, prompts or edits")
        marked = item.text if IMAGE_MARKER in item.text else f"{IMAGE_MARKER}\n" * len(item.images) + item.text
        turns = [{"role": "user", "text": marked}]
        asks = isinstance(benchmark.command(item), Ask)
        if asks:
            turns.append({"role": "assistant", "text": item.answer})
        task = "questions" if asks else "editing" if item.images else "text_to_image"
        members = {}
        for place, path in enumerate(item.images):
            try:
                kind, content = stored_image(path.read_bytes(), size)
            except BadSampleError as error:
                raise UserError(path, str(error), "an image") from error
            members[f"{place}.{kind}"] = content
        row = {"task": task, **item.meta, "conversations": turns}
        yield {"__key__": item.key, "json": row, **members, **({} if asks else {"target.png": grey})}


def _grey(size: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (size, size), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


def parser() -> Parser:
    """The command line."""
    made = Parser(__doc__)
    made.add_argument("name", metavar="NAME", help="of the benchmark, or the path of a class of yours")
    made.add_argument("out", type=Path, metavar="OUT", help="folder of the shards")
    made.add_argument("words", nargs="*", metavar="key=value", help="settings of the benchmark; limit=N takes the first N items")
    made.add_argument("--image-size", type=whole(1), metavar="N", help="longest side of a shown image, never enlarged")
    made.add_argument("--target-size", type=whole(1), default=512, metavar="N", help="side of an image to make")
    made.add_argument("--samples-per-shard", type=whole(1), default=1000, metavar="N", help="most samples in a tar")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Write, and say where."""
    from umm_zoo.benchmarks.building import build_benchmark, sort_words
    from umm_zoo.benchmarks.running import OWN

    words = sort_words(arguments.name, arguments.words)
    if other := [*(name for name in words.given if name != "limit"), *(word.partition("=")[0] for word in words.overrides)]:
        raise UserError(other[0], "a setting of generation or of a run", "settings of the benchmark, or limit=N")
    limit = OWN["limit"].read(words.given["limit"], "limit") if "limit" in words.given else None
    benchmark = build_benchmark(words)
    items = benchmark.items()[:limit]
    if there := sorted(arguments.out.glob(f"{benchmark.name}-[0-9]*.tar*")):
        raise UserError(there[0], "shards of an earlier call", "another folder, or none of them: they would be mixed")
    samples = samples_of(benchmark, items, arguments.image_size, arguments.target_size)
    with locating(benchmark.name, refusals=(ValueError,)):  # a key twice
        written = write_shards(samples, arguments.out, benchmark.name, arguments.samples_per_shard)
    say(f"{written.samples:,} samples written to {arguments.out}/{benchmark.name}-*.tar")
    if any(name.startswith("target") for name in written.members):
        say("grey images stand in for the true ones: losses over these rows mean nothing, the scores do")


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_intermixed_args()))
