"""Tasks that tell the scenes of the shapes world in new words: everything, or too little, or what a prompt implies."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import INSTRUCTION, Conversations, Sample, SampleTask, generated_name, only_image, question_and_answer
from umm_zoo.conversation import Task, Turn
from umm_zoo.errors import Count, Share
from umm_zoo.shapes.implied import reasoning, with_wrong_fruit
from umm_zoo.shapes.language import long_caption
from umm_zoo.shapes.scenes import COLOURS, Object, Scene, World, pick


class SceneCaptions(Conversations):
    """Conversations of one question (``prompt``), answered by a caption of the scene; chances depend on ``seed`` and the key.

    The fine detail of an object that is named is named with probability ``keep_detail``.
    """

    def __init__(self, prompt: str = INSTRUCTION, seed: int = 0, keep_detail: Share = 0.0) -> None:
        super().__init__()
        self.prompt, self.seed, self.keep_detail = prompt, seed, keep_detail

    @abstractmethod
    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """One caption of a scene."""

    def detailed(self, scene: Scene, rng: np.random.Generator) -> list[Object]:
        """The objects whose fine detail is named."""
        return [item for item in scene.objects if rng.random() < self.keep_detail] if self.keep_detail else []

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """As ``Conversations``, with another question and answer; a ``BadSampleError`` where there is no scene."""
        sample = super().sample(key, members)
        if "scene" not in sample.meta:
            raise BadSampleError("json has no 'scene' to describe")
        rng = np.random.default_rng([self.seed, zlib.crc32(key.encode(errors="backslashreplace"))])
        sample.conversation = question_and_answer(self.prompt, self.caption(Scene.from_json(sample.meta["scene"]), rng))
        sample.task = Task.CAPTION
        return sample


class UnderDescribed(SceneCaptions):
    """Captions that leave objects out, small ones more often, and confuse the colours of small ones; reinforcement adds the rest.

    The grammar stays that of ``long_caption`` (``top left: a small red circle; background: grey``), in random order, so that what
    is missing can be learned without new words; the background is always named, for it fills most of an image. At least one object
    is always named.

    Args:
        keep_large, keep_small: probability that an object is named.
        confused: probability that the colour of a small object is another.
        colours: how many of the world's colours may stand in for it.
    """

    def __init__(
        self,
        keep_large: float = 0.7,
        keep_small: float = 0.35,
        confused: float = 0.3,
        colours: int = 4,
        prompt: str = INSTRUCTION,
        seed: int = 0,
        keep_detail: Share = 0.0,
    ) -> None:
        super().__init__(prompt, seed, keep_detail)
        for name, value in (("keep_large", keep_large), ("keep_small", keep_small), ("confused", confused)):
            if not 0 <= value <= 1:
                raise ValueError(f"UnderDescribed.{name}: found {value}, expected numbers from 0 to 1")
        self.keep = {"large": keep_large, "small": keep_small}
        self.confused, self.colours = confused, tuple(COLOURS)[:colours]

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """One such caption of a scene."""
        named = [item for item in scene.objects if rng.random() < self.keep[item.size]] or [pick(rng, scene.objects)]
        order = rng.permutation(len(named)).tolist()
        told = replace(scene, objects=tuple(self._seen(named[place], rng) for place in order))
        return long_caption(told, detailed=self.detailed(told, rng))

    def _seen(self, item: Object, rng: np.random.Generator) -> Object:
        if item.size == "small" and rng.random() < self.confused:
            return replace(item, colour=pick(rng, [other for other in self.colours if other != item.colour]))
        return item


class FullCaptions(SceneCaptions):
    """Long captions of whole scenes under one question, from which a renderer learns to reconstruct.

    ``shuffled`` puts the clauses of the objects in an order that the sample's key decides, instead of from left to right.
    """

    def __init__(self, prompt: str = INSTRUCTION, shuffled: bool = True, keep_detail: Share = 0.0) -> None:
        super().__init__(prompt, seed=1, keep_detail=keep_detail)
        self.shuffled = shuffled

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """The long caption of a scene."""
        return long_caption(scene, rng if self.shuffled else None, self.detailed(scene, rng))

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """As in the base class, with the scene as the one that a reconstructed image should show."""
        sample = super().sample(key, members)
        sample.meta.setdefault("target_scene", sample.meta["scene"])
        return sample


class ImagesOfCaptions(SampleTask):
    """Task of generating the image of a scene from the caption that another task makes of it: with wrong ones in wrong colours."""

    def __init__(self, captions: SceneCaptions) -> None:
        super().__init__(captions.max_characters)
        self.captions = captions

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """The caption is the prompt, the image described is the one to generate."""
        described = self.captions.sample(key, members)
        meta = {**described.meta, "task": "text_to_image", "kind": "text_to_image", "target_scene": described.meta["scene"]}
        prompt = [Turn(role="user", text=described.conversation[-1]["text"])]
        return Sample(prompt, [], only_image(members), meta, task=Task.TEXT_TO_IMAGE)

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """No input images; the one described is generated."""
        return [], generated_name(names)


class Thoughts(Conversations):
    """Task of reasoning before an image: the prompt of a sample of ``implied`` is answered by its facts and the prompt in full.

    ``The fruit of tree B is a yellow circle. Revised Prompt:`` and, on a line of its own, the long caption. No image is shown or
    generated. ``meta["literal"]`` stays the truth where the answer is wrong.

    Args:
        form: of the answer, with places for ``{reasoning}`` and ``{rewrite}``.
        wrong: probability that a tree's fruit is another, in both: reinforcement then has something to gain.
        colours, shapes: of the world.
        seed: of what is wrong, beside the sample's key.
    """

    def __init__(
        self,
        form: str = "{reasoning} Revised Prompt:\n{rewrite}",
        wrong: Share = 0.0,
        colours: Count = 4,
        shapes: Count = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if "{reasoning}" not in form or "{rewrite}" not in form:
            raise ValueError(f"Thoughts.form: found {form!r}, expected places for {{reasoning}} and {{rewrite}}")
        self.form, self.wrong, self.seed = form, wrong, seed
        self.world = World(num_colours=colours, num_shapes=shapes)

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """As ``Conversations``, answered in words."""
        sample = super().sample(key, members)
        if "trees" not in sample.meta or "target_scene" not in sample.meta:
            raise BadSampleError("json has no 'trees' and 'target_scene' to reason about")
        scene, trees = Scene.from_json(sample.meta["target_scene"]), sample.meta["trees"]
        rng = np.random.default_rng([self.seed, zlib.crc32(key.encode(errors="backslashreplace"))])
        taken = with_wrong_fruit(self.world, scene, trees, self.wrong, rng) if self.wrong else scene
        answer = self.form.replace("{reasoning}", reasoning(taken, trees)).replace("{rewrite}", long_caption(taken))
        conversation = [sample.conversation[0], Turn(role="assistant", text=answer)]
        return replace(sample, conversation=conversation, images=[], target=None, task=Task.QUESTION)

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """None."""
        return [], None
