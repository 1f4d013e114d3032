"""Images as things to draw without being asked for anything in particular: drawn again, or drawn from nothing."""

from __future__ import annotations

from data_pipelines.decoding import decode_json
from data_pipelines.tasks import Sample, Task, only_image, target_image
from umm_zoo.batch import IMAGE_MARKER, Turn


class Reconstruction(Task):
    """The image of any sample, shown and to be drawn again: that to be drawn where it has one, else its only image.

    Extras called ``latents`` fit, for they are of the image to be drawn. The method may put other words in the place of these.

    Args:
        instruction: what the user says.
        max_characters: as in ``Task``.
        extras: as in ``Task``.
    """

    def __init__(
        self, instruction: str = "Reconstruct the image.", max_characters: int = 65_536, extras: list[str] | None = None
    ) -> None:
        super().__init__(max_characters, extras or [])
        self.instruction = instruction

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """Input and target are the same."""
        image = target_image(members) or only_image(members)
        turns = [Turn(role="user", text=f"{IMAGE_MARKER}\n{self.instruction}")]
        meta = {**_scene_of(members, self.max_characters), "task": "reconstruction", "kind": "reconstruction"}
        return Sample(turns, [image], image, meta)


class Unconditional(Task):
    """The image of any sample, to be drawn without a word: that to be drawn where it has one, else its only image.

    Args:
        instruction: what the user says.
        max_characters: as in ``Task``.
        extras: as in ``Task``.
    """

    def __init__(
        self, instruction: str = "Generate an image.", max_characters: int = 65_536, extras: list[str] | None = None
    ) -> None:
        super().__init__(max_characters, extras or [])
        self.instruction = instruction

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """Nothing is shown."""
        image = target_image(members) or only_image(members)
        meta = {"task": "unconditional", "kind": "unconditional"}
        return Sample([Turn(role="user", text=self.instruction)], [], image, meta)


def _scene_of(members: dict[str, bytes], max_characters: int) -> dict[str, object]:
    """What the sample's json says about the image, as the scene of the one shown and of the one to be drawn."""
    meta = decode_json(members["json"], max_characters) if "json" in members else {}
    scene = meta.get("target_scene", meta.get("scene"))
    return {} if scene is None else {"scene": scene, "target_scene": scene}
