"""Bucketings: which samples go well into one batch, by the sizes of their images and the lengths of their texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_pipelines.transforms.image_transform import ImageTransform
from umm_zoo.errors import UserError, several

#: What a bucketing makes of a sample: a number, a text or a tuple of these; keys of one bucketing can be ordered.
Key = Any
#: The longest text that ``ByLength`` tells from longer ones where it is given no edges, in characters.
LONGEST = 65_536
_NO_SHAPE = (0, 0)


class Outline(NamedTuple):
    """What an index says of a sample.

    Args:
        inputs: width and height of the input images, upright, in the order in which they are shown; 0 x 0 for a damaged one.
        target: those of the image to generate, None where there is none.
        length: of the text, in characters, see ``measures.measures_of``.
    """

    inputs: tuple[tuple[int, int], ...]
    target: tuple[int, int] | None
    length: int


class Bucketing(ABC):
    """Base class of bucketings, which map the outline of a sample to a key; the samples of one key are a bucket.

    Batches are made of one bucket each as far as there are enough of its samples; batches of what is left over mix neighbours in
    the order of the keys. A key must depend on its arguments alone: the order of the training samples does.
    """

    @abstractmethod
    def key(self, sample: Outline, transform: ImageTransform) -> Key:
        """The key of a sample whose images go through ``transform``."""

    def describe(self, key: Key) -> str:
        """The name of a bucket for people."""
        return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)

    def to_json(self, transform: ImageTransform) -> Any:
        """What the keys depend on, in plain values; a resume with another one is refused."""
        return [type(self).__name__, {name: str(value) for name, value in sorted(vars(self).items())}]


class ByShape(Bucketing):
    """Buckets by the width and height that the image to generate has in a batch, or the first input image where there is none.

    The image policy says what these are (``data.target_resize``, ``data.resize``): with ``Bucket`` there are about 40, with
    ``Native`` many more, of which batches mix neighbours.
    """

    def key(self, sample: Outline, transform: ImageTransform) -> Key:
        """Width and height; 0 x 0 where there is no image, or a damaged one."""
        policy, size = transform.inputs, next(iter(sample.inputs), _NO_SHAPE)
        if sample.target is not None:
            policy, size = transform.targets, sample.target
        return tuple(policy.output_size(*size)) if min(size) > 0 else _NO_SHAPE

    def describe(self, key: Key) -> str:
        """``512 x 384 px``."""
        return "no image" if key == _NO_SHAPE else f"{key[0]} x {key[1]} px"

    def to_json(self, transform: ImageTransform) -> Any:
        """With the image policies."""
        return [super().to_json(transform), transform.to_json()]


class ByLength(Bucketing):
    """Buckets by the length of the text: a batch is padded to its longest row, and rows of like lengths waste little.

    Args:
        edges: longest text of each class but the last, in characters (a token of English is about four), from short to long.
        classes: number of classes where no edges are given: each reaches as many times further than the one before, up to 65,536
            characters, and the last has what is longer (our choice: 129, eight of which reach twice as far, so that about a
            twentieth is padded; where a class does not fill its batches, neighbours share them).
    """

    def __init__(self, edges: Sequence[int] | None = None, classes: int = 129) -> None:
        if edges is None:
            if not 2 <= classes <= 256:
                raise UserError("", f"classes {classes}", "a number from 2 to 256")
            edges = sorted({round(LONGEST ** (number / (classes - 1))) for number in range(1, classes)})
        several("edges", edges, int)
        self.edges = list(edges)
        if not self.edges or self.edges != sorted({*edges}) or self.edges[0] < 1:
            raise UserError("", f"edges {self.edges}", "positive whole numbers from short to long, each once")

    def key(self, sample: Outline, transform: ImageTransform) -> Key:
        """The number of the class."""
        return (bisect_left(self.edges, sample.length),)

    def describe(self, key: Key) -> str:
        """``65 to 128 characters``."""
        [number] = key
        if number == len(self.edges):
            return f"over {self.edges[-1]} characters"
        first, last = self.edges[number - 1] + 1 if number else 0, self.edges[number]
        return f"{first} to {last} characters" if first < last else f"{last} characters"


class ByModality(Bucketing):
    """Buckets by what goes in and out: samples with an image to generate, with input images alone, and with text alone."""

    _NAMES = ("text alone", "input images", "an image to generate")

    def key(self, sample: Outline, transform: ImageTransform) -> Key:
        """0 for text, 1 for input images, 2 for an image to generate."""
        return (2 if sample.target is not None else min(1, len(sample.inputs)),)

    def describe(self, key: Key) -> str:
        """One of the three."""
        return self._NAMES[key[0]]


class Combined(Bucketing):
    """Buckets of samples that several bucketings put together; where batches mix neighbours, the first parts differ least."""

    def __init__(self, parts: list[Bucketing]) -> None:
        several("parts", parts, Bucketing)
        if not parts:
            raise UserError("parts", "no bucketing", "at least one")
        self.parts = list(parts)

    def key(self, sample: Outline, transform: ImageTransform) -> Key:
        """The keys of the parts."""
        return tuple(part.key(sample, transform) for part in self.parts)

    def describe(self, key: Key) -> str:
        """The names that the parts give."""
        return ", ".join(part.describe(own) for part, own in zip(self.parts, key, strict=True))

    def to_json(self, transform: ImageTransform) -> Any:
        """Those of the parts."""
        return [part.to_json(transform) for part in self.parts]
