"""Commands of ``python -m umm_zoo.generate`` by name: what a finished run can do."""

from umm_zoo.generation.answering import Ask, Caption
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import Compose, Edit, Reconstruct, TextToImage

COMMANDS: dict[str, Command] = {
    "caption": Caption(),
    "ask": Ask(),
    "reconstruct": Reconstruct(),
    "text-to-image": TextToImage(),
    "edit": Edit(),
    "compose": Compose(),
}
