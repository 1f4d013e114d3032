"""What follows from a scene and some words, read again from the words alone: oracles that the code under test has no part in."""

import re
from dataclasses import replace

from umm_zoo.shapes import Object, World

BIG = World(cells=3, num_colours=8, num_shapes=4, max_objects=4)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
COLOURS = {"red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink"}
SHAPES = {"circle", "square", "triangle", "diamond"}


def select(scene, words):
    """The objects that a phrase fits; an oracle of its own, from the stored scene and the words alone."""
    place = re.fullmatch(r"objects? at the (.+)", words)
    if place:
        return [item for item in scene["objects"] if item["cell"] == place[1]]
    found = scene["objects"]
    for word in words.split():
        word = word.removesuffix("s")
        name = "size" if word in {"small", "large"} else "colour" if word in COLOURS else "shape" if word in SHAPES else None
        assert name or word == "object", words
        found = [item for item in found if name is None or item[name] == word]
    return found


def only(scene, words):
    found = select(scene, words)
    assert len(found) == 1, (words, scene)
    return found[0]


PATTERNS = [
    (r"What (colour|shape|size) is the (.+)\?", lambda scene, name, words: only(scene, words)[name]),
    (r"Where is the mark on the (.+)\?", lambda scene, words: only(scene, words)["mark"]),
    (r"Which way do the stripes on the (.+) run\?", lambda scene, words: only(scene, words)["mark"]),
    (r"Which glyph is on the (.+)\?", lambda scene, words: only(scene, words)["mark"]),
    (r"Where is the (.+)\?", lambda scene, words: only(scene, words)["cell"]),
    (r"How many (.+) are there\?", lambda scene, words: NUMBERS[len(select(scene, words))]),
    (r"Is there an? (.+)\?", lambda scene, words: "yes" if select(scene, words) else "no"),
]


def oracle(scene, text):
    for pattern, answer in PATTERNS:
        match = re.fullmatch(pattern, text)
        if match:
            return answer(scene, *match.groups())
    raise AssertionError(text)


def lies(first, second, relation, world):
    """Whether two objects, as json, are in a relation."""
    (row, column), (row2, column2) = (divmod(world.places.index(item["cell"]), world.cells) for item in (first, second))
    return {"left of": column < column2, "right of": column > column2, "above": row < row2, "below": row > row2}[relation]


def find(scene, words):
    """The one object that a phrase of an instruction fits, by an oracle of its own."""
    if words.startswith("object at the "):
        found = [item for item in scene.objects if item.cell == words.removeprefix("object at the ")]
    else:
        found = [item for item in scene.objects if f"{item.size} {item.colour} {item.shape}".endswith(words)]
    assert len(found) == 1, words
    return found[0]


def carry_out(world, scenes, start, text):
    """Objects and background after an instruction, worked out from its words alone."""
    scene, objects, background = scenes[0], list(start[0]), start[1]

    def put(old, new):
        objects[objects.index(old)] = new

    rules = {
        r"make the background (\w+)": None,
        r"make the (.+) (\w+)": lambda name, colour: put(find(scene, name), replace(find(scene, name), colour=colour)),
        r"turn the (.+) into an? (\w+)": lambda name, shape: put(find(scene, name), replace(find(scene, name), shape=shape)),
        r"move the (.+) to the (.+)": lambda name, cell: put(find(scene, name), replace(find(scene, name), cell=cell)),
        r"remove the (.+)": lambda name: objects.remove(find(scene, name)),
        r"add an? (\w+) (\w+) (\w+) at the (.+)": lambda size, colour, shape, cell: objects.append(
            Object(shape, colour, size, cell, world.marks[0])
        ),
        r"replace the (.+) in the first image with the (.+) of the second image": lambda name, guest: put(
            find(scene, name), replace(find(scenes[1], guest), cell=find(scene, name).cell, jitter=find(scene, name).jitter)
        ),
        r"put the (.+) of the second image into the first image at the (.+)": lambda guest, cell: objects.append(
            replace(find(scenes[1], guest), cell=cell)
        ),
    }
    for pattern, rule in rules.items():
        match = re.fullmatch(pattern, text[0].lower() + text[1:].removesuffix("."))
        if match:
            if rule is None:
                return objects, match[1]
            rule(*match.groups())
            return objects, background
    raise AssertionError(text)
