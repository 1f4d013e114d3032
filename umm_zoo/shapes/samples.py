"""Samples of every task: conversation, images and ground truth, each a pure function of (seed, split, task, index)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from umm_zoo.errors import UserError
from umm_zoo.shapes.descriptions import TEXT_KINDS
from umm_zoo.shapes.edits import COMPOSITIONS, EDITS, Edit, make_composition, make_edit, make_hybrid
from umm_zoo.shapes.geneval import CATEGORIES, COUPLES, make_prompt
from umm_zoo.shapes.implied import fact, implied
from umm_zoo.shapes.language import long_caption, short_caption
from umm_zoo.shapes.making import PLAIN_EVERY, Made, SampleRequest
from umm_zoo.shapes.questions import Question, Slot, ask, ask_several, mark_pair
from umm_zoo.shapes.relations import RelationPrompt, make_colour_relation, make_relation, make_tied_relation
from umm_zoo.shapes.rendering import encode_png, render
from umm_zoo.shapes.scenes import SPLIT_STREAMS, Scene, World, sample_stream
from umm_zoo.shapes.two_images import ask_two

SPLITS = tuple(SPLIT_STREAMS)
CAPTION_ORDERS = ("canonical", "random")
#: One caption in this many is a short one.
SHORT_EVERY = 3
#: Share of questions that ask for the fine detail, where objects have one.
MARK_SHARE = 0.2
#: Questions of one dialogue, fewer where its scene has no unambiguous one of the kind wanted.
DIALOGUE_TURNS = 6
#: One imagined change in this many takes its object from a second image.
COMPOSED_EVERY = 4
#: What is said of an image that shows what its prompt asks for.
NO_CHANGE = "No change needed."
#: Attempts before a sample is given up; most need one, a rare edit in a full board a dozen.
_MAX_ATTEMPTS = 2_000


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    Args:
        key: name inside its shard, without a dot.
        row: the ``json`` member: task, kind, conversations, and the ground truth.
        scenes: the scenes of the input images, in order.
        target: the scene to be generated, where the task asks for an image.
    """

    key: str
    row: dict[str, Any]
    scenes: tuple[Scene, ...] = ()
    target: Scene | None = None

    def members(self, world: World) -> dict[str, Any]:
        """The entries that `data_pipelines.shards.writing` writes: ``__key__``, ``json``, ``0.png`` …, ``target.png``."""
        images = {f"{i}.png": encode_png(render(world, scene)) for i, scene in enumerate(self.scenes)}
        if self.target is not None:
            images["target.png"] = encode_png(render(world, self.target))
        return {"__key__": self.key, "json": self.row, **images}


def make_sample(
    world: World, seed: int, split: str, task: str, index: int, mark_share: float | None = None, caption_order: str = "canonical"
) -> Sample:
    """Sample ``index`` of a task.

    Args:
        mark_share: share of the ``questions`` that ask for the fine detail; None is ``usual_mark_share``.
        caption_order: ``canonical`` (reading order) or ``random`` order of the clauses of a long caption.

    Raises:
        UserError: an unknown split, task or order; hybrids outside their own split; what needs a fine detail in a world without; or
            a world so small that the sample cannot be made.
    """
    known = {"split": (split, SPLITS), "task": (task, TASKS), "caption_order": (caption_order, CAPTION_ORDERS)}
    for name, (value, expected) in known.items():
        if value not in expected:
            raise UserError(name, repr(value), ", ".join(expected))
    if (task == "hybrid_edits") != (split == "hybrid"):
        raise UserError("", f"task {task!r} in split {split!r}: hybrid_edits live in the split 'hybrid' and nothing else does")
    if not world.has_detail and (mark_share or task == "pairs"):
        raise UserError("", f"{task} that need the fine detail of objects", "a World.detail: mark, stripes or glyph")
    mark_share = usual_mark_share(world) if mark_share is None else mark_share
    # Both halves of a mark pair come from one stream: index 2p and 2p + 1 are made of the same random numbers.
    rng = sample_stream(seed, split, task, index // 2 if task == "pairs" else index)
    request = SampleRequest(world, seed, split, index, mark_share, caption_order, rng)
    for _ in range(_MAX_ATTEMPTS):
        if (made := _MAKERS[task](request)) is not None:
            return _sample(made, task, split, index)
    raise UserError("", f"no {task} sample {index} of split {split!r} in {_MAX_ATTEMPTS} attempts from {world.to_json()}")


def usual_mark_share(world: World) -> float:
    """Share of a world's questions that ask for the fine detail, where nothing else is said."""
    return MARK_SHARE if world.has_detail else 0.0


def _sample(made: Made, task: str, split: str, index: int) -> Sample:
    conversations: list[dict[str, str]] = []
    for question, answer in made.turns:
        marker = "" if conversations else "<image>\n" * len(made.scenes)
        conversations.append({"role": "user", "text": marker + question})
        if answer is not None:
            conversations.append({"role": "assistant", "text": answer})
    row: dict[str, Any] = {"task": task, "kind": made.kind, "split": split, "conversations": conversations, **made.meta}
    if len(made.scenes) == 1:
        row["scene"] = made.scenes[0].to_json()
    elif made.scenes:
        row["scenes"] = [scene.to_json() for scene in made.scenes]
    if made.target is not None:
        row["target_scene"] = made.target.to_json()
    return Sample(f"{task}-{index:08d}", row, made.scenes, made.target)


def _captions(request: SampleRequest) -> Made:
    scene = request.scene()
    if request.index % SHORT_EVERY == 0:
        return Made("caption_short", [("Describe the image briefly.", short_caption(scene))], (scene,))
    return Made("caption_long", [("Describe the image.", request.caption(scene))], (scene,))


def _text_to_image(request: SampleRequest) -> Made:
    scene = request.scene()
    return Made("text_to_image", [(request.caption(scene), None)], target=scene)


def _geneval(categories: tuple[str, ...], request: SampleRequest) -> Made | None:
    category = categories[request.index % len(categories)]
    prompt = make_prompt(request.world, request.split, category, request.rng)
    return prompt and Made(category, [(prompt.text, None)], target=prompt.scene, meta={"requirement": prompt.requirement})


def _relation(maker: Callable[..., RelationPrompt | None], request: SampleRequest) -> Made | None:
    prompt = maker(request.world, request.split, request.rng)
    return prompt and Made("relation", [(prompt.text, None)], target=prompt.scene)


def _question(question: Question | None, *scenes: Scene, **meta: Any) -> Made | None:
    if question is None:
        return None
    return Made(question.kind, [(question.text, question.answer)], scenes, meta={**meta, **dict(question.meta)})


def _questions(request: SampleRequest) -> Made | None:
    scene = request.scene()
    return _question(ask(request.world, scene, request.split, request.slot(request.index), request.rng), scene)


def _several(kind: str, request: SampleRequest, slots: Iterable[Slot]) -> Made | None:
    scene = request.scene()
    turns = ask_several(request.world, scene, request.split, slots, request.rng)
    return Made(kind, turns.items(), (scene,)) if len(turns) > 1 else None


def _dialogues(request: SampleRequest) -> Made | None:
    """Several questions about one image in one conversation, as LLaVA-1.5 merges them: the image is encoded once for all."""
    numbers = range(request.index * DIALOGUE_TURNS, (request.index + 1) * DIALOGUE_TURNS)
    return _several("dialogue", request, map(request.slot, numbers))


def _lookups(request: SampleRequest) -> Made | None:
    """Objects found by descriptions, time and again: the skill behind all other questions, and the last to be learnt."""
    kinds = ("position", "position", "colour", "shape", "size")
    return _several("lookup", request, (Slot(kinds[int(request.rng.integers(5))]) for _ in range(2 * DIALOGUE_TURNS)))


def _pairs(request: SampleRequest) -> Made | None:
    question, both = mark_pair(request.world, request.scene(), request.rng)
    shown, answer = both[request.index % 2]
    return _question(question._replace(answer=answer), shown, pair=request.index // 2)


def _two_images(request: SampleRequest) -> Made | None:
    made = ask_two(request.world, request.split, request.index, request.rng)
    return made and _question(made[1], *made[0])


def _edited(edit: Edit | None, kind: str, *scenes: Scene) -> Made | None:
    if edit is None:
        return None
    meta = {"edit": edit.kind, "edited_cells": list(edit.cells)}
    return Made(kind, [(edit.instruction, None)], scenes, edit.target, meta)


def _edits(request: SampleRequest) -> Made | None:
    kind, world = EDITS[request.index % len(EDITS)], request.world
    # An added object should leave the scene inside the world, a removed one should leave something to look at.
    most = world.max_objects - 1 if kind == "add" else world.max_objects
    scene = request.scene(min(2, world.max_objects) if kind == "remove" else 1, max(1, most))
    return _edited(make_edit(world, scene, request.split, kind, request.rng), kind, scene)


def _hybrid_edits(request: SampleRequest) -> Made | None:
    scene = request.scene()
    return _edited(make_hybrid(request.world, scene, request.split, request.rng), "hybrid", scene)


def _compositions(request: SampleRequest) -> Made | None:
    first, second = request.scene(), request.scene()
    kind = COMPOSITIONS[request.index % len(COMPOSITIONS)]
    return _edited(make_composition(request.world, first, second, kind, request.rng), kind, first, second)


def _readings(request: SampleRequest) -> Made | None:
    """Text alone: what a language model must understand before an image can be described to it in words."""
    kind = tuple(TEXT_KINDS)[request.index % len(TEXT_KINDS)]
    turns = TEXT_KINDS[kind](request.world, request.split, request.rng)
    return None if turns is None else Made(kind, turns)


def _imagined(request: SampleRequest) -> Made | None:
    """An image or two and an instruction, answered by the description of what would result."""
    block, place = divmod(request.index, COMPOSED_EVERY)  # each maker goes through its own kinds in turn
    composed = place == COMPOSED_EVERY - 1
    turn = block if composed else block * (COMPOSED_EVERY - 1) + place
    made = (_compositions if composed else _edits)(replace(request, index=turn))
    if made is None or made.target is None:
        return None
    turns = [(instruction, long_caption(made.target)) for instruction, _ in made.turns]
    return Made(f"imagine_{made.kind}", turns, made.scenes, meta=made.meta)


def _refinements(request: SampleRequest) -> Made | None:
    """A first image, what is to be changed in it, and the image that the prompt asks for: a trajectory of interleaved reasoning."""
    if request.index % PLAIN_EVERY == PLAIN_EVERY - 1:
        scene = request.scene()
        made: Made | None = Made("unchanged", [(NO_CHANGE, None)], (scene,), scene)
    else:
        made = _edits(replace(request, index=request.index // PLAIN_EVERY * (PLAIN_EVERY - 1) + request.index % PLAIN_EVERY))
    if made is None or made.target is None:
        return None
    ((reflection, _),) = made.turns
    prompt = long_caption(made.target, request.rng)
    texts = {"prompt": prompt, "thinking": long_caption(made.target), "reflection": reflection}
    return replace(made, turns=[(prompt, None)], meta={**made.meta, **texts})


_MAKERS: dict[str, Callable[[SampleRequest], Made | None]] = {
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
    "geneval": partial(_geneval, CATEGORIES),
    "couples": partial(_geneval, COUPLES),
    "relations": partial(_relation, make_relation),
    "colour_relations": partial(_relation, make_colour_relation),
    "tied_relations": partial(_relation, make_tied_relation),
    "readings": _readings,
    "imagined": _imagined,
    "facts": fact,
    "implied": implied,
    "refinements": _refinements,
}
TASKS = tuple(_MAKERS)
