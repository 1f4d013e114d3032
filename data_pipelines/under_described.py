"""Captions that say too little and get small things wrong: what a captioner is given that is to learn the rest by reinforcement."""

from __future__ import annotations

import zlib

import numpy as np

from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import Conversations, Sample
from umm_zoo.batch import IMAGE_MARKER, Turn
from umm_zoo.shapes.language import clause, with_article
from umm_zoo.shapes.scenes import COLOURS, Object, Scene, pick


class UnderDescribed(Conversations):
    """The captions of the shapes world, rewritten: objects are left out, small ones more often, and their colours confused.

    The grammar stays that of ``long_caption`` (``top left: a small red circle; background: grey``), in random order, so that what
    is missing can be learned without new words; the background is always told, for it fills most of an image. Each sample's key
    decides what happens to it; at least one object is always named.

    Args:
        keep_large, keep_small: probability that an object is named.
        confused: probability that the colour of a small object is another.
        colours: how many of the world's colours may stand in for it.
        prompt: what is asked.
        seed: of the choices.

    Raises:
        ValueError: a probability outside [0, 1].
    """

    def __init__(
        self,
        keep_large: float = 0.7,
        keep_small: float = 0.35,
        confused: float = 0.3,
        colours: int = 4,
        prompt: str = "Describe the image.",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("keep_large", keep_large), ("keep_small", keep_small), ("confused", confused)):
            if not 0 <= value <= 1:
                raise ValueError(f"UnderDescribed.{name}: found {value}, expected numbers from 0 to 1")
        self.keep = {"large": keep_large, "small": keep_small}
        self.confused, self.colours, self.prompt, self.seed = confused, tuple(COLOURS)[:colours], prompt, seed

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """As ``Conversations``, with another question and answer.

        Raises:
            BadSampleError: the sample has no scene.
        """
        sample = super().sample(key, members)
        if "scene" not in sample.meta:
            raise BadSampleError("json has no 'scene' to describe")
        rng = np.random.default_rng([self.seed, zlib.crc32(key.encode())])
        answer = self.caption(Scene.from_json(sample.meta["scene"]), rng)
        sample.conversation = [
            Turn(role="user", text=f"{IMAGE_MARKER}\n{self.prompt}"),
            Turn(role="assistant", text=answer),
        ]
        return sample

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """One such caption of a scene."""
        named = [item for item in scene.objects if rng.random() < self.keep[item.size]] or [pick(rng, scene.objects)]
        order = rng.permutation(len(named)).tolist()
        return "; ".join([*(self._clause(named[place], rng) for place in order), f"background: {scene.background}"])

    def _clause(self, item: Object, rng: np.random.Generator) -> str:
        if item.size == "small" and rng.random() < self.confused:
            colour = pick(rng, [other for other in self.colours if other != item.colour])
            return f"{item.cell}: {with_article(f'{item.size} {colour} {item.shape}')}"
        return clause(item)


class FullCaptions(Conversations):
    """Every caption of the shapes world replaced by its long one, under one question: what a renderer is trained to draw.

    Args:
        prompt: what is asked.
        shuffled: the clauses of the objects in an order that the sample's key decides, instead of reading order.
    """

    def __init__(self, prompt: str = "Describe the image.", shuffled: bool = True) -> None:
        super().__init__()
        self.prompt, self.shuffled = prompt, shuffled

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """As ``Conversations``, with another question and answer.

        Raises:
            BadSampleError: the sample has no scene.
        """
        sample = super().sample(key, members)
        if "scene" not in sample.meta:
            raise BadSampleError("json has no 'scene' to describe")
        scene = Scene.from_json(sample.meta["scene"])
        order = list(range(len(scene.objects)))
        if self.shuffled:
            order = np.random.default_rng([1, zlib.crc32(key.encode())]).permutation(len(order)).tolist()
        answer = "; ".join(clause(scene.objects[place]) for place in order)
        sample.meta.setdefault("target_scene", sample.meta["scene"])  # what a redrawn image should show
        sample.conversation = [
            Turn(role="user", text=f"{IMAGE_MARKER}\n{self.prompt}"),
            Turn(role="assistant", text=f"{answer}; background: {scene.background}"),
        ]
        return sample
