"""Objects of COCO's images: which are there, which are not, and how a question calls them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.converters.texts import with_article

_PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"}
_PLURALS |= {"scissors": "pairs of scissors", "skis": "pairs of skis", "broccoli": "pieces of broccoli"}


def article(name: str) -> str:
    """``a dog``, ``an apple``, ``a pair of skis``."""
    return f"a pair of {name}" if name in ("scissors", "skis") else with_article(name)


def plural(name: str) -> str:
    """``dogs``, ``wine glasses``, ``people``."""
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in tuple("aeiou"):
        return f"{name[:-1]}ies"
    return f"{name}s"


@dataclass
class Objects:
    """Objects of one split: single ones per image and name, names per image of which a crowd is marked, and every name."""

    counts: dict[int, Counter[str]]
    crowds: dict[int, set[str]]
    names: set[str]
    _frequency: Counter[str] = field(default_factory=Counter, repr=False)
    _together: dict[str, Counter[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_instances(cls, content: dict[str, Any]) -> Objects:
        """Count the annotations of an instances file."""
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        made = cls({}, {}, set(names.values()))
        for row in content["annotations"]:
            image, name = row["image_id"], names[row["category_id"]]
            counts = made.counts.setdefault(image, Counter())
            if row.get("iscrowd"):
                made.crowds.setdefault(image, set()).add(name)
            else:
                counts[name] += 1
        for image in made.counts:
            present = made.present(image)
            made._frequency.update(present)
            for name in present:
                made._together.setdefault(name, Counter()).update(present - {name})
        return made

    def present(self, image: int) -> set[str]:
        """Names of what is in an image, alone or in a crowd."""
        return set(self.counts[image]) | self.crowds.get(image, set())

    def absent(self, image: int) -> list[str]:
        """Names of what is not in an image, sorted."""
        return sorted(self.names - self.present(image))

    def popular(self, image: int) -> list[str]:
        """Objects that are not in an image, most frequent in the split first."""
        return sorted(self.absent(image), key=lambda name: (-self._frequency[name], name))

    def adversarial(self, image: int) -> list[str]:
        """Objects that are not in an image, most often together with what is there first."""
        score: Counter[str] = Counter()
        for name in self.present(image):
            score.update(self._together[name])
        return sorted(self.absent(image), key=lambda name: (-score[name], name))

    def countable(self, image: int, most: int) -> Counter[str]:
        """Numbers from 1 to ``most`` of objects of which no crowd is marked."""
        crowds = self.crowds.get(image, set())
        return Counter({name: count for name, count in self.counts[image].items() if name not in crowds and count <= most})
