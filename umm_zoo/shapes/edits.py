"""Edits of a scene: one change, two at once (held out), and changes that bring in an object of a second image.

Whatever an edit does not name stays as it was, marks and jitter and the background's texture included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from umm_zoo.shapes.language import phrase, refer, with_article
from umm_zoo.shapes.scenes import BACKGROUNDS, Object, Scene, World, pick

EDITS = ("recolour", "reshape", "move", "add", "remove", "background")
COMPOSITIONS = ("replace_subject", "insert_object")


@dataclass(frozen=True)
class Edit:
    """Change of a scene and its outcome.

    Args:
        kind: one of `EDITS` or `COMPOSITIONS`, or two joined by ``+``.
        order: what a user says, without capital and full stop: ``make the circle green``.
        target: the scene that results, exactly.
        cells: the cells whose pixels may change; empty where the background changes.
        description: what a viewer of both images says, where it is in other words: ``recolour the circle to green``.
    """

    kind: str
    order: str
    target: Scene
    cells: tuple[str, ...] = ()
    description: str = ""

    @property
    def instruction(self) -> str:
        """The order as a sentence: ``Make the circle green.``"""
        return f"{self.order[0].upper()}{self.order[1:]}."


def _swap(scene: Scene, world: World, old: Object | None, new: Object | None) -> Scene:
    """The scene with one object in the place of another, or one more, or one less, in reading order."""
    objects = [item for item in (*scene.objects, new) if item is not None and item is not old]
    return replace(scene, objects=tuple(sorted(objects, key=lambda item: world.places.index(item.cell))))


def make_edit(world: World, scene: Scene, split: str, kind: str, rng: np.random.Generator) -> Edit | None:
    """Random edit of one kind; None where this scene allows none (no free cell, no object, no other colour)."""
    if kind == "background":
        name = pick(rng, [background for background in BACKGROUNDS if background != scene.background])
        return Edit(kind, f"make the background {name}", replace(scene, background=name))
    free = [cell for cell in world.places if scene.at(cell) is None]
    if kind == "add":
        if not free:
            return None
        shape, colour = pick(rng, world.combinations(split))
        # The words cannot say where the new object's mark lies, so it is always the first value, and there is no jitter.
        item = Object(shape, colour, pick(rng, world.sizes), pick(rng, free), world.marks[0])
        return Edit(kind, f"add {with_article(phrase(item))} at the {item.cell}", _swap(scene, world, None, item), (item.cell,))
    if not scene.objects:
        return None
    item = pick(rng, scene.objects)
    name = refer(scene, item)
    if kind == "remove":
        return Edit(kind, f"remove the {name}", _swap(scene, world, item, None), (item.cell,))
    if kind == "move":
        if not free:
            return None
        cell = pick(rng, free)
        target = _swap(scene, world, item, replace(item, cell=cell))
        return Edit(kind, f"move the {name} to the {cell}", target, (item.cell, cell))
    if kind not in EDITS:
        raise ValueError(f"edit kind: found {kind!r}, expected {', '.join(EDITS)}")
    if kind == "recolour":
        changed = [replace(item, colour=colour) for colour in world.colours]
    else:
        changed = [replace(item, shape=shape) for shape in world.shapes]
    allowed = set(world.combinations(split)) - {item.combination}
    options = [new for new in changed if new.combination in allowed]
    if not options:
        return None
    new = pick(rng, options)
    target = _swap(scene, world, item, new)
    if kind == "recolour":
        return Edit(kind, f"make the {name} {new.colour}", target, (item.cell,), f"recolour the {name} to {new.colour}")
    return Edit(kind, f"turn the {name} into {with_article(new.shape)}", target, (item.cell,))


def make_hybrid(world: World, scene: Scene, split: str, rng: np.random.Generator) -> Edit | None:
    """Two edits of different kinds in one instruction, of different cells; both are worded for the scene as it is."""
    first_kind, second_kind = (EDITS[i] for i in rng.permutation(len(EDITS))[:2].tolist())
    first = make_edit(world, scene, split, first_kind, rng)
    if first is None:
        return None
    second = make_edit(world, first.target, split, second_kind, rng)
    if second is None or set(first.cells) & set(second.cells):
        return None
    # The second must mean the same before the first has been carried out: its objects go by the same name there.
    for item in filter(None, map(scene.at, second.cells)):
        if refer(scene, item) != refer(first.target, item):
            return None
    order = f"{first.order} and {second.order}"
    return Edit(f"{first.kind}+{second.kind}", order, second.target, first.cells + second.cells)


def make_composition(world: World, scene: Scene, other: Scene, kind: str, rng: np.random.Generator) -> Edit | None:
    """Bring an object of a second image into the first, with its own mark; None where the first has no room."""
    guest = pick(rng, other.objects)
    guest_name = refer(other, guest)
    if kind == "replace_subject":
        item = pick(rng, scene.objects)
        arrived = replace(guest, cell=item.cell, jitter=item.jitter)
        if arrived == item:
            return None
        target = _swap(scene, world, item, arrived)
        order = f"replace the {refer(scene, item)} in the first image with the {guest_name} of the second image"
        return Edit(kind, order, target, (item.cell,))
    if kind == "insert_object":
        free = [cell for cell in world.places if scene.at(cell) is None]
        if not free:
            return None
        cell = pick(rng, free)
        target = _swap(scene, world, None, replace(guest, cell=cell))
        return Edit(kind, f"put the {guest_name} of the second image into the first image at the {cell}", target, (cell,))
    raise ValueError(f"composition kind: found {kind!r}, expected {', '.join(COMPOSITIONS)}")
