"""The samples of every task: conversation, images and ground truth, each a pure function of (seed, split, task, index)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from umm_zoo.shapes.edits import COMPOSITIONS, EDITS, Edit, make_composition, make_edit, make_hybrid
from umm_zoo.shapes.geneval import CATEGORIES, COUPLES, make_task
from umm_zoo.shapes.language import long_caption, short_caption
from umm_zoo.shapes.questions import BLOCK, Slot, ask, mark_pair, question_plan
from umm_zoo.shapes.readings import READINGS, read_caption, read_edit, read_relation
from umm_zoo.shapes.relations import Told, make_colour_relation, make_relation, make_tied_relation
from umm_zoo.shapes.rendering import encode_png, render
from umm_zoo.shapes.scenes import SPLIT_STREAMS, Scene, World, sample_scene, sample_stream
from umm_zoo.shapes.two_images import ask_two

SPLITS = tuple(SPLIT_STREAMS)
TASKS = (
    "captions",
    "questions",
    "dialogues",
    "lookups",
    "pairs",
    "two_images",
    "edits",
    "hybrid_edits",
    "compositions",
    "text_to_image",
    "geneval",
    "couples",
    "relations",
    "colour_relations",
    "tied_relations",
    "readings",
    "imagined",
)
CAPTION_ORDERS = ("canonical", "random")
#: One caption in this many is a short one.
SHORT_EVERY = 3
#: Questions of one dialogue, fewer where its scene has no unambiguous one of the kind wanted.
DIALOGUE_TURNS = 6
#: One imagined change in this many takes its object from a second image.
COMPOSED_EVERY = 4
#: Draws before a sample is given up; most need one, a rare edit in a full board a dozen.
_MAX_DRAWS = 2_000


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    Args:
        key: name inside its shard, without a dot.
        row: the ``json`` member: task, kind, conversations, and the ground truth.
        scenes: the scenes of the input images, in order.
        target: the scene to be drawn, where the task asks for an image.
    """

    key: str
    row: dict[str, Any]
    scenes: tuple[Scene, ...] = ()
    target: Scene | None = None

    def members(self, world: World) -> dict[str, Any]:
        """What `data_pipelines.shards.writing` writes: ``__key__``, ``json``, ``0.png`` …, ``target.png``."""
        images = {f"{i}.png": encode_png(render(world, scene)) for i, scene in enumerate(self.scenes)}
        if self.target is not None:
            images["target.png"] = encode_png(render(world, self.target))
        return {"__key__": self.key, "json": self.row, **images}


@dataclass(frozen=True)
class _Draw:
    """What a task made of one draw, before it is dressed as a sample."""

    kind: str
    prompt: str
    answer: str | None = None
    scenes: tuple[Scene, ...] = ()
    target: Scene | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    more: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Request:
    world: World
    seed: int
    split: str
    index: int
    mark_share: float
    caption_order: str


def make_sample(
    world: World,
    seed: int,
    split: str,
    task: str,
    index: int,
    mark_share: float = 0.2,
    caption_order: str = "canonical",
) -> Sample:
    """Sample ``index`` of a task.

    Args:
        mark_share: share of the ``questions`` that ask for the fine detail.
        caption_order: ``canonical`` (reading order) or ``random`` order of the clauses of a long caption.

    Raises:
        ValueError: an unknown split, task or order; hybrids asked for outside their own split; or a world so small that the
            sample cannot be drawn.
    """
    for name, value, expected in (
        ("split", split, SPLITS),
        ("task", task, TASKS),
        ("caption_order", caption_order, CAPTION_ORDERS),
    ):
        if value not in expected:
            raise ValueError(f"{name}: found {value!r}, expected {', '.join(expected)}")
    if (task == "hybrid_edits") != (split == "hybrid"):
        raise ValueError(f"task {task!r} in split {split!r}: hybrid_edits live in the split 'hybrid' and nothing else does")
    # Both halves of a mark pair come from one stream: index 2p and 2p + 1 are the same draw.
    rng = sample_stream(seed, split, task, index // 2 if task == "pairs" else index)
    request = _Request(world, seed, split, index, mark_share, caption_order)
    for _ in range(_MAX_DRAWS):
        draw = _MAKERS[task](request, rng)
        if draw is not None:
            return _dress(draw, task, split, index)
    raise ValueError(f"no {task} sample {index} of split {split!r} in {_MAX_DRAWS} draws from {world.to_json()}")


def _dress(draw: _Draw, task: str, split: str, index: int) -> Sample:
    prompt = "<image>\n" * len(draw.scenes) + draw.prompt
    conversations = [{"role": "user", "text": prompt}]
    if draw.answer is not None:
        conversations.append({"role": "assistant", "text": draw.answer})
    for question, answer in draw.more:
        conversations += [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    row: dict[str, Any] = {"task": task, "kind": draw.kind, "split": split, "conversations": conversations, **draw.meta}
    if len(draw.scenes) == 1:
        row["scene"] = draw.scenes[0].to_json()
    elif draw.scenes:
        row["scenes"] = [scene.to_json() for scene in draw.scenes]
    if draw.target is not None:
        row["target_scene"] = draw.target.to_json()
    return Sample(f"{task}-{index:08d}", row, draw.scenes, draw.target)


def _captions(request: _Request, rng: np.random.Generator) -> _Draw:
    scene = sample_scene(request.world, request.split, rng)
    if request.index % SHORT_EVERY == 0:
        return _Draw("caption_short", "Describe the image briefly.", short_caption(scene), (scene,))
    caption = long_caption(scene, rng if request.caption_order == "random" else None)
    return _Draw("caption_long", "Describe the image.", caption, (scene,))


def _text_to_image(request: _Request, rng: np.random.Generator) -> _Draw:
    scene = sample_scene(request.world, request.split, rng)
    caption = long_caption(scene, rng if request.caption_order == "random" else None)
    return _Draw("text_to_image", caption, target=scene)


def _geneval(request: _Request, rng: np.random.Generator) -> _Draw | None:
    return _of_category(CATEGORIES[request.index % len(CATEGORIES)], request, rng)


def _couples(request: _Request, rng: np.random.Generator) -> _Draw | None:
    return _of_category(COUPLES[request.index % len(COUPLES)], request, rng)


def _of_category(category: str, request: _Request, rng: np.random.Generator) -> _Draw | None:
    drawn = make_task(request.world, request.split, category, rng)
    if drawn is None:
        return None
    prompt, requirement, scene = drawn
    return _Draw(category, prompt, target=scene, meta={"requirement": requirement})


def _questions(request: _Request, rng: np.random.Generator) -> _Draw | None:
    block, place = divmod(request.index, BLOCK)
    slot = question_plan(request.seed, SPLIT_STREAMS[request.split], block, request.mark_share)[place]
    scene = sample_scene(request.world, request.split, rng)
    question = ask(request.world, scene, request.split, slot, rng)
    if question is None:
        return None
    return _Draw(question.kind, question.text, question.answer, (scene,), meta=dict(question.meta))


def _dialogues(request: _Request, rng: np.random.Generator) -> _Draw | None:
    """Several questions about one image in one conversation, as LLaVA-1.5 merges them: the image is read once for all."""
    scene = sample_scene(request.world, request.split, rng)
    asked: dict[str, str] = {}
    for turn in range(request.index * DIALOGUE_TURNS, (request.index + 1) * DIALOGUE_TURNS):
        block, place = divmod(turn, BLOCK)
        slot = question_plan(request.seed, SPLIT_STREAMS[request.split], block, request.mark_share)[place]
        question = ask(request.world, scene, request.split, slot, rng)
        if question is not None:
            asked.setdefault(question.text, question.answer)
    if len(asked) < 2:
        return None
    (first, answer), *more = asked.items()
    return _Draw("dialogue", first, answer, (scene,), more=tuple(more))


def _lookups(request: _Request, rng: np.random.Generator) -> _Draw | None:
    """Objects found by descriptions, time and again: the skill behind all other questions, and the last to be learnt."""
    scene = sample_scene(request.world, request.split, rng)
    asked: dict[str, str] = {}
    for _ in range(2 * DIALOGUE_TURNS):
        kind = ("position", "position", "colour", "shape", "size")[int(rng.integers(5))]
        question = ask(request.world, scene, request.split, Slot(kind), rng)
        if question is not None:
            asked.setdefault(question.text, question.answer)
    if len(asked) < 2:
        return None
    (first, answer), *more = asked.items()
    return _Draw("lookup", first, answer, (scene,), more=tuple(more))


def _pairs(request: _Request, rng: np.random.Generator) -> _Draw:
    scene = sample_scene(request.world, request.split, rng)
    question, both = mark_pair(request.world, scene, rng)
    shown, answer = both[request.index % 2]
    return _Draw("mark_pair", question.text, answer, (shown,), meta={"pair": request.index // 2, **dict(question.meta)})


def _two_images(request: _Request, rng: np.random.Generator) -> _Draw | None:
    asked = ask_two(request.world, request.split, request.index, rng)
    if asked is None:
        return None
    scenes, question = asked
    return _Draw(question.kind, question.text, question.answer, scenes, meta=dict(question.meta))


def _edited(edit: Edit, kind: str, scenes: tuple[Scene, ...]) -> _Draw:
    return _Draw(kind, edit.instruction, None, scenes, edit.target, {"edit": edit.kind, "edited_cells": list(edit.cells)})


def _edits(request: _Request, rng: np.random.Generator) -> _Draw | None:
    kind = EDITS[request.index % len(EDITS)]
    # An added object should leave the scene inside the world, a removed one should leave something to look at.
    most = request.world.max_objects - 1 if kind == "add" else request.world.max_objects
    least = min(2, request.world.max_objects) if kind == "remove" else 1
    scene = sample_scene(request.world, request.split, rng, least, max(1, most))
    edit = make_edit(request.world, scene, request.split, kind, rng)
    return None if edit is None else _edited(edit, kind, (scene,))


def _hybrid_edits(request: _Request, rng: np.random.Generator) -> _Draw | None:
    scene = sample_scene(request.world, request.split, rng)
    edit = make_hybrid(request.world, scene, request.split, rng)
    return None if edit is None else _edited(edit, "hybrid", (scene,))


def _compositions(request: _Request, rng: np.random.Generator) -> _Draw | None:
    scenes = tuple(sample_scene(request.world, request.split, rng) for _ in range(2))
    kind = COMPOSITIONS[request.index % len(COMPOSITIONS)]
    edit = make_composition(request.world, scenes[0], scenes[1], kind, rng)
    return None if edit is None else _edited(edit, kind, scenes)


def _told(
    make: Callable[[World, str, np.random.Generator], Told | None],
) -> Callable[[_Request, np.random.Generator], _Draw | None]:
    def draw(request: _Request, rng: np.random.Generator) -> _Draw | None:
        made = make(request.world, request.split, rng)
        return None if made is None else _Draw("relation", made[0], target=made[-1])

    return draw


def _readings(request: _Request, rng: np.random.Generator) -> _Draw | None:
    """Text alone: what a language model must be able to read before it can be asked for an image in words."""
    kind = READINGS[request.index % len(READINGS)]
    maker = {"read_caption": read_caption, "read_relation": read_relation, "read_edit": read_edit}[kind]
    turns = maker(request.world, request.split, rng)
    if turns is None:
        return None
    (first, answer), *more = turns
    return _Draw(kind, first, answer, more=tuple(more))


def _imagined(request: _Request, rng: np.random.Generator) -> _Draw | None:
    """An image or two and an instruction, answered by the description of what would result."""
    block, place = divmod(request.index, COMPOSED_EVERY)  # each maker goes through its own kinds in turn
    composed = place == COMPOSED_EVERY - 1
    turn = block if composed else block * (COMPOSED_EVERY - 1) + place
    draw = (_compositions if composed else _edits)(replace(request, index=turn), rng)
    if draw is None or draw.target is None:
        return None
    return _Draw(f"imagine_{draw.kind}", draw.prompt, long_caption(draw.target), draw.scenes, meta=draw.meta)


_MAKERS: dict[str, Callable[[_Request, np.random.Generator], _Draw | None]] = {
    "captions": _captions,
    "questions": _questions,
    "dialogues": _dialogues,
    "lookups": _lookups,
    "pairs": _pairs,
    "two_images": _two_images,
    "edits": _edits,
    "hybrid_edits": _hybrid_edits,
    "compositions": _compositions,
    "text_to_image": _text_to_image,
    "geneval": _geneval,
    "couples": _couples,
    "relations": _told(make_relation),
    "colour_relations": _told(make_colour_relation),
    "tied_relations": _told(make_tied_relation),
    "readings": _readings,
    "imagined": _imagined,
}
