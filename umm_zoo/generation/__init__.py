"""What a finished run can be asked to do, by name."""

from umm_zoo.generation.answering import Ask, Caption
from umm_zoo.generation.base import Verb
from umm_zoo.generation.drawing import Compose, Edit, Reconstruct, TextToImage

VERBS: dict[str, Verb] = {
    "caption": Caption(),
    "ask": Ask(),
    "reconstruct": Reconstruct(),
    "text-to-image": TextToImage(),
    "edit": Edit(),
    "compose": Compose(),
}
