"""Tasks that generate the image of any sample: from its caption, shown before, or out of nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from data_pipelines.decoding import BadSampleError, decode_json, decode_text
from data_pipelines.tasks import Sample, SampleTask, generated_name, member, only_image, read_turns, target_image
from umm_zoo.conversation import IMAGE_MARKER, Task, Trajectory, Turn


class Reconstruction(SampleTask):
    """Task of an image to be shown and generated again: that to generate where a sample has one, else its only image.

    Extras called ``latents`` fit, for they are of the image to generate. The method may replace the user's ``instruction``.
    """

    def __init__(
        self, instruction: str = "Reconstruct the image.", max_characters: int = 65_536, extras: Sequence[str] = ()
    ) -> None:
        super().__init__(max_characters, extras)
        self.instruction = instruction

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """Input and target are the same; the json's scene is that of both."""
        image = target_image(members) or only_image(members)
        meta = decode_json(members["json"], self.max_characters) if "json" in members else {}
        scene = meta.get("target_scene", meta.get("scene"))
        scenes: dict[str, object] = {} if scene is None else {"scene": scene, "target_scene": scene}
        turns = [Turn(role="user", text=f"{IMAGE_MARKER}\n{self.instruction}")]
        meta = {**scenes, "task": "reconstruction", "kind": "reconstruction"}
        return Sample(turns, [image], image, meta, task=Task.RECONSTRUCT)

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """One image, shown and generated."""
        name = generated_name(names)
        return [] if name is None else [name], name


class Unconditional(SampleTask):
    """Task of an image to be generated without a prompt: that to generate where a sample has one, else its only image."""

    def __init__(self, instruction: str = "Generate an image.", max_characters: int = 65_536, extras: Sequence[str] = ()) -> None:
        super().__init__(max_characters, extras)
        self.instruction = instruction

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """Nothing is shown."""
        image = target_image(members) or only_image(members)
        meta = {"task": "unconditional", "kind": "unconditional"}
        return Sample([Turn(role="user", text=self.instruction)], [], image, meta, task=Task.UNCONDITIONAL)

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """No input images."""
        return [], generated_name(names)


class FromCaption(SampleTask):
    """Task of an image to be generated from its caption: of what asks for captions, what asks for images is made.

    Reads this project's layout, whose last answer is the caption, and pairs of ``KEY.jpg`` with ``KEY.txt``.
    """

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """The caption is the prompt, the image described is the one to generate; the rest of the json stays, for metrics."""
        meta = decode_json(members["json"], self.max_characters) if "json" in members else {}
        if (turns := meta.pop("conversations", None)) is None:
            caption = decode_text(member(members, "txt"), self.max_characters)
        else:
            caption = next((turn["text"] for turn in reversed(read_turns(turns)) if turn["role"] == "assistant"), "")
        if not (caption := caption.replace(IMAGE_MARKER, "").strip()):
            raise BadSampleError("no caption to generate from (an answer, or KEY.txt)")
        meta |= {"task": "text_to_image", "kind": "text_to_image"}
        return Sample([Turn(role="user", text=caption)], [], only_image(members), meta, task=Task.TEXT_TO_IMAGE)

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """No input images."""
        return [], generated_name(names)


class Trajectories(SampleTask):
    """Task of one mode of a trajectory: thinking, a first image, reflection, a second image (IRG, arXiv 2509.06945).

    The json names ``prompt``, ``thinking`` and ``reflection`` (the shapes world's task ``refinements``); ``KEY.0.png`` is the first
    image, ``KEY.target.png`` the second. ``understanding`` asks for the text, ``full`` for the text and the image behind it,
    ``generation`` for the image, with the text as given: a second turn of the user's. Rows of ``understanding`` have the task of
    the image before which their text is written.

    Args:
        mode: ``initial_…`` or ``improving_…``, each ``understanding``, ``generation`` or ``full``.
        initial: the image that initial modes ask for: the ``first``, which the reflection finds fault with, or the ``second``.
    """

    def __init__(
        self,
        mode: Trajectory,
        initial: Literal["first", "second"] = "first",
        max_characters: int = 65_536,
        extras: Sequence[str] = (),
    ) -> None:
        super().__init__(max_characters, extras)
        if mode not in get_args(Trajectory):
            raise ValueError(f"Trajectories.mode: found '{mode}', expected {', '.join(get_args(Trajectory))}")
        half, _, self.trains = mode.partition("_")
        self.improves, self.initial = half == "improving", initial

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """The row of the mode; ``target_scene`` is that of the image asked for."""
        meta = decode_json(member(members, "json"), self.max_characters)
        meta.pop("conversations", None)
        texts = [str(meta.get(name, "")).replace(IMAGE_MARKER, "").strip() for name in ("prompt", "thinking", "reflection")]
        prompt, text = texts[0], texts[2 if self.improves else 1]
        if not prompt or not text:
            raise BadSampleError("json has no 'prompt' with its 'thinking' and 'reflection'")
        shown = [member(members, "0.png")] if self.improves else []
        turns = [
            Turn(role="user", text=f"{IMAGE_MARKER}\n" * len(shown) + prompt),
            Turn(role="user" if self.trains == "generation" else "assistant", text=text),
        ]
        target = members.get(self._target) if self.trains != "understanding" else None
        if target is None and self.trains != "understanding":
            raise BadSampleError(f"no image {self._target} to generate")
        if self._target == "0.png" and "scene" in meta:
            meta["target_scene"] = meta["scene"]
        return Sample(turns, shown, target, meta, task=Task.EDIT if self.improves else Task.TEXT_TO_IMAGE)

    @property
    def _target(self) -> str:
        return "target.png" if self.improves or self.initial == "second" else "0.png"

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """The first image where it is improved, and the one asked for."""
        return (["0.png"] if self.improves else []), None if self.trains == "understanding" else self._target
