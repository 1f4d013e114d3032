"""Phrases that name one object of a scene and no other, and captions whose clauses name the place first.

Nothing here speaks of the fine detail (the mark, the stripes, the glyph), which must be seen and not read, unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from umm_zoo.shapes.scenes import Object, Scene, pick

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")

#: Sets of attributes that a fixed reference to an object uses, in order; the last always works.
_CANONICAL: tuple[tuple[str, ...], ...] = (("shape",), ("colour", "shape"), ("size", "colour", "shape"), ("cell",))
#: All that can name an object.
_WAYS = (*_CANONICAL, ("colour",), ("size", "shape"), ("size", "colour"))


def with_article(phrase: str) -> str:
    """``a red circle``, ``an orange circle``."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def phrase(item: Object, attributes: Collection[str] = ("size", "colour", "shape")) -> str:
    """Name an object by some of its attributes: ``red circle``, ``small object``, ``object at the top left``."""
    if "cell" in attributes:
        return f"object at the {item.cell}"
    words = [getattr(item, name) for name in ("size", "colour") if name in attributes]
    return " ".join([*words, item.shape if "shape" in attributes else "object"])


def refer(scene: Scene, item: Object, rng: np.random.Generator | None = None, avoid: Collection[str] = ()) -> str | None:
    """A phrase that fits this object of the scene and no other; None where there is none.

    Args:
        rng: chooses among all phrases that fit; None gives the one fixed phrase, the shortest of ``circle``,
            ``red circle``, ``small red circle`` and ``object at the top left``.
        avoid: attributes that the phrase must not give away, because the question is about them.
    """
    ways = _CANONICAL if rng is None else _WAYS
    allowed = [way for way in ways if not set(way) & set(avoid)]
    fitting = [way for way in allowed if len(scene.matching(**{name: getattr(item, name) for name in way})) == 1]
    if not fitting:
        return None
    return phrase(item, fitting[0] if rng is None else pick(rng, fitting))


def clause(item: Object) -> str:
    """``top left: a small red circle``; a causal reader knows where before it reads what."""
    return f"{item.cell}: {with_article(phrase(item))}"


def detailed_clause(item: Object) -> str:
    """``top left: a small red circle with a plus``."""
    return f"{clause(item)} with {with_article(item.mark)}"


def long_caption(scene: Scene, rng: np.random.Generator | None = None, detailed: Collection[Object] = ()) -> str:
    """Every object in a clause of its own, in the scene's order or shuffled by ``rng``, then the background.

    The fine detail is named of ``detailed`` objects.
    """
    order = range(len(scene.objects)) if rng is None else rng.permutation(len(scene.objects)).tolist()
    clauses = [detailed_clause(item) if item in detailed else clause(item) for item in (scene.objects[i] for i in order)]
    return "; ".join([*clauses, f"background: {scene.background}"])


def short_caption(scene: Scene) -> str:
    """The objects in reading order by colour and shape alone: ``a red circle and a blue square``."""
    names = [with_article(phrase(item, ("colour", "shape"))) for item in scene.objects]
    if len(names) < 2:
        return names[0] if names else f"a {scene.background} background"
    return f"{', '.join(names[:-1])} and {names[-1]}"
