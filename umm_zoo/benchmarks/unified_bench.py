"""Unified-Bench's first protocol: caption, reconstruct from the caption, compare under several encoders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.batch import Batch
from umm_zoo.benchmarks.base import Benchmark, Item, Verdict
from umm_zoo.errors import UserError, note
from umm_zoo.experiment.file import Experiment
from umm_zoo.generation.generating import CaptionAndReconstruct
from umm_zoo.generation.images import open_image
from umm_zoo.generation.options import MAX_SEED, whole
from umm_zoo.generation.similarities import encoder_nodes
from umm_zoo.metrics.rows import required
from umm_zoo.metrics.unified_score import UnifiedScore
from umm_zoo.outputs import Outputs

if TYPE_CHECKING:
    pass

#: Of every image's initial noise, as in the released demo.
SEED = 42
TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jpe", ".jfif", ".jp2", ".ppm")
_LISTED = 20


class FromSeed42(CaptionAndReconstruct):
    """The command from the seed of the released demo, where none is said."""

    options = {"seed": whole("of the noise", 0, MAX_SEED, SEED)}


class UnifiedBench(Benchmark):
    """UAE's Unified-Score over a folder of images, see ``metrics.UnifiedScore``.

    Captions are the likeliest ones under the method's own prompt, images are generated from seed 42. A file is described in its own
    shape, where the model takes any, and each pair is scored in its own shapes and in 8 bits: nothing is cut off before the
    encoders' own processors. An image that cannot be read ends the command: a mean over what is left would be another benchmark.
    Every file is looked at before the first is described, and files of other suffixes are named.

    Args:
        encoders: by the name of their column; in a command those of the run's own Unified-Score, where none are given.
        images: folder of images; needed to put them to a run.
    """

    name = "unified-bench"
    headline = "unified"
    reads = ("answers", "generated")
    record_dtype = torch.float64

    def __init__(self, encoders: dict[str, FeatureEncoder], images: str | None = None) -> None:
        super().__init__()
        self.score, self.folder = UnifiedScore(encoders), images
        self.scores = self.score.scores

    @classmethod
    def of_run(cls, experiment: Experiment) -> dict[str, Any]:
        """The encoders of its own Unified-Score."""
        nodes = encoder_nodes(experiment.metrics)
        return {"encoders": nodes} if nodes else {}

    def items(self) -> list[Item]:
        """One per image, in alphabetical order."""
        return image_items(self.folder)

    def command(self, item: Item) -> FromSeed42:
        """See there."""
        return FromSeed42()

    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        """The cosines of each image and what was made of its caption; their mean is the score."""
        images, originals = required(outputs, "generated", self), batch.images
        cosines = self.score.cosines(images, originals).double().T  # [B, number of encoders]
        for row, own in enumerate(cosines.tolist()):
            columns = {name: round(value, 5) for name, value in zip(self.score.encoders, own, strict=True)}
            yield row, Verdict(own, sum(own) / len(own), "", "", columns)

    def protocol(self) -> dict[str, Any]:
        """The encoders."""
        return {"encoders": {name: type(encoder).__name__ for name, encoder in self.score.encoders.items()}}

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """One score per encoder and their mean, ``unified``."""
        return self.score.values_of(records)


def image_items(folder: str | None) -> list[Item]:
    """An item without a text for each image of a folder, in alphabetical order; files of other suffixes are named.

    Raises:
        UserError: there is no image, two have one name, or one cannot be read.
    """
    source = Path(folder or "")
    found = sorted(source.iterdir()) if folder and source.is_dir() else []
    files = [path for path in found if path.suffix.lower() in TYPES]
    if not files:
        raise UserError("images", f"no images in '{folder or ''}'", f"images=FOLDER with {', '.join(TYPES)}")
    keys = {path: re.sub(r"[^\w-]+", "_", path.stem, flags=re.ASCII) for path in files}
    if twice := [a for a, b in pairwise(sorted(files, key=keys.__getitem__)) if keys[a] == keys[b]]:
        found_twice = f"two images of one name ('{twice[0].stem}')"
        raise UserError(source, found_twice, "different names: what is made of them is kept under their names")
    _check_images(source, files)
    if others := [path.name for path in found if path not in files]:
        note(f"{source}: {len(others)} of {len(found)} are no images by their suffix and are left out: {_few(others)}")
    return [Item(keys[path], "", (path,)) for path in files]


def _check_images(source: Path, files: Sequence[Path]) -> None:
    """Decode every image, so that hours of describing do not end at the last one; one error for all that cannot be read."""
    unreadable = []
    for file in files:
        try:
            open_image(file)
        except UserError as error:
            unreadable.append(f"{file.name} ({error.problems[0].found})")
    if unreadable:
        problem = f"{len(unreadable)} of {len(files)} images that cannot be read: {_few(unreadable)}"
        raise UserError(source, problem, "readable ones alone", "take the others away, or repair them")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
