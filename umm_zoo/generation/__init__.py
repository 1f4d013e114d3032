"""Commands of ``python -m umm_zoo.generate`` by name: what a finished run can do."""

from typing import Any

from umm_zoo.generation.answering import Ask, Caption
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import CaptionAndReconstruct, Compose, Edit, Reconstruct, Refine, TextToImage

COMMANDS: dict[str, Command] = {
    "caption": Caption(),
    "ask": Ask(),
    "reconstruct": Reconstruct(),
    "caption-and-reconstruct": CaptionAndReconstruct(),
    "text-to-image": TextToImage(),
    "edit": Edit(),
    "compose": Compose(),
    "refine": Refine(),
}


def abilities_of(method: Any) -> dict[str, Command]:
    """The commands that a method can do, by name."""
    return {name: command for name, command in COMMANDS.items() if command.possible(method)}
