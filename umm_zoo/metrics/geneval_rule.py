"""GenEval's rule: whether what a detector found in an image is what its prompt asks for.

In numpy and in the dtype of the detections, so that scores and places at a limit fall where the official script has them fall.
Reference: Ghosh et al., 2023, arXiv 2310.11513; ``evaluation/evaluate_images.py`` of
github.com/djghosh13/geneval at af4902f, whose options are the settings here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from umm_zoo.errors import Count, Share, UserError, Weight

#: In the order in which the official script names and compares them.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
#: Prompts that ask for a number, whose objects must be surer.
COUNTING = "counting"
#: Offsets below this many pixels on both axes have no direction.
_STILL = 1e-3


class Detections(NamedTuple):
    """What a detector found in one image, in its own order.

    Shape:
        - scores: ``[n]``
        - boxes: ``[n, 4]``, left, top, right and bottom edge in pixels; a box of one pixel is one pixel wide.
        - masks: ``[n, H, W]`` bool, or None of a detector of boxes.
    """

    names: Sequence[str]
    scores: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None


class Found(NamedTuple):
    """One object that counts."""

    box: np.ndarray  #: ``[4]``
    score: float
    mask: np.ndarray | None = None  #: ``[H, W]`` bool


class Judgement(NamedTuple):
    """Whether an image is right, and why not, a line per clause that fails."""

    right: bool
    reason: str


#: The colours of objects of a class, one each.
ColourNaming = Callable[[str, Sequence[Found]], Sequence[str]]


@dataclass(frozen=True)
class GenEvalRule:
    """The rule, with the settings that the official script takes.

    A requirement is a row of ``evaluation_metadata.jsonl``: ``tag``, ``include`` (clauses that must all hold: ``class``, ``count``,
    ``color``, ``position`` as ``[relation, place of an earlier clause]``) and ``exclude`` (none may hold: ``class``, ``count``).
    Colours and places are asked of the ``count`` surest objects of a class alone, and a place only where the clause holds so far.

    Args:
        threshold, counting_threshold: scores that an object must exceed, the latter for the tag ``counting``.
        max_objects: of each class, the surest.
        max_overlap: of the boxes of a class; an object that overlaps a surer one by as much or more is left out. 1 leaves none out,
            not even a box that is there twice.
        margin: share of the sizes of both objects by which they must be further apart than that.
        direction: share of the offset between their centres that must then be left on an axis.
    """

    threshold: Share = 0.3
    counting_threshold: Share = 0.9
    max_objects: Count = 16
    max_overlap: Share = 1.0
    margin: Weight = 0.1
    direction: Share = 0.5

    def kept(self, seen: Detections, tag: str) -> dict[str, list[Found]]:
        """The objects that count by class, the surest first; of equal scores numpy's unstable order decides, backwards."""
        scores, boxes = np.asarray(seen.scores), np.asarray(seen.boxes)
        names = np.asarray(seen.names, dtype=object)
        limit = self.counting_threshold if tag == COUNTING else self.threshold
        kept: dict[str, list[Found]] = {}
        for name in dict.fromkeys(seen.names):
            own = np.flatnonzero(names == name)
            order = own[np.argsort(scores[own])[::-1]]
            order = order[scores[order] > limit][: self.max_objects]
            chosen: list[int] = []
            for place in order.tolist():
                if self.max_overlap == 1 or all(overlap(boxes[other], boxes[place]) < self.max_overlap for other in chosen):
                    chosen.append(place)
            if chosen:
                masks = seen.masks
                kept[name] = [Found(boxes[i], float(scores[i]), None if masks is None else masks[i]) for i in chosen]
        return kept

    def coloured(self, kept: Mapping[str, Sequence[Found]], wanted: Mapping[str, Any]) -> dict[str, Sequence[Found]]:
        """The objects by class whose colours the rule will ask for; of several clauses of a class the longest list."""
        asked: dict[str, Sequence[Found]] = {}
        for clause in wanted.get("include", ()):
            own = kept.get(clause["class"], ())[: clause["count"]]
            if "color" in clause and len(own) == clause["count"] and len(own) > len(asked.get(clause["class"], ())):
                asked[clause["class"]] = own
        return asked

    def judge(
        self, kept: Mapping[str, Sequence[Found]], wanted: Mapping[str, Any], colours: ColourNaming = lambda name, own: ()
    ) -> Judgement:
        """Whether objects, the surest of each class first, are what is wanted.

        Raises:
            UserError: a clause looks for its place beside one that does not come before it.
        """
        reasons: list[str] = []
        groups: list[Sequence[Found] | None] = []
        for clause in wanted.get("include", ()):
            own = kept.get(clause["class"], ())[: clause["count"]]
            reason = self._missing(own, clause, colours) or self._misplaced(own, clause, groups)
            groups.append(None if reason else own)
            reasons += [reason] if reason else []
        for clause in wanted.get("exclude", ()):
            if (number := len(kept.get(clause["class"], ()))) >= clause["count"]:
                reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
        return Judgement(not reasons, "\n".join(reasons))

    def __call__(self, seen: Detections, wanted: Mapping[str, Any], colours: ColourNaming) -> Judgement:
        """Whether what was detected in an image is what is wanted."""
        return self.judge(self.kept(seen, wanted["tag"]), wanted, colours)

    def relations(self, first: np.ndarray, second: np.ndarray) -> list[str]:
        """Where the first box lies to the second; none, one or two of ``RELATIONS``.

        What is left of the offset behind the margin is divided by the length of the *whole* offset.
        """
        boxes = np.stack([first, second]).reshape(2, 2, 2)  # box, corner, axis
        centres, sizes = boxes.mean(axis=1), np.abs(boxes[:, 1] - boxes[:, 0])
        offset = centres[0] - centres[1]
        left = np.maximum(np.abs(offset) - self.margin * (sizes[0] + sizes[1]), 0) * np.sign(offset)
        if np.all(np.abs(left) < _STILL):
            return []
        x, y = left / np.linalg.norm(offset)
        holds = (x < -self.direction, x > self.direction, y < -self.direction, y > self.direction)
        return [relation for relation, is_so in zip(RELATIONS, holds, strict=True) if is_so]

    def _missing(self, own: Sequence[Found], clause: Mapping[str, Any], colours: ColourNaming) -> str:
        """Why there are not as many objects of the class and the colour; empty where there are."""
        name, count = clause["class"], clause["count"]
        if len(own) < count:
            return f"expected {name}>={count}, found {len(own)}"
        if "color" not in clause:
            return ""
        seen, wanted = list(colours(name, own)), clause["color"]
        if (number := seen.count(wanted)) >= count:
            return ""
        listed = [colour for colour in (*COLOURS, *dict.fromkeys(set(seen) - set(COLOURS))) if colour in seen]
        others = ", ".join(f"{seen.count(colour)} {colour}" for colour in listed)
        return f"expected {wanted} {name}>={count}, found {number} {wanted}; and {others}"

    def _misplaced(self, own: Sequence[Found], clause: Mapping[str, Any], groups: Sequence[Sequence[Found] | None]) -> str:
        """Why the objects do not all lie as they should to all of an earlier clause; empty where they do."""
        if "position" not in clause:
            return ""
        name, (relation, target) = clause["class"], clause["position"]
        if not -len(groups) <= target < len(groups):
            raise UserError("position", f"clause {target} beside clause {len(groups)}", "an earlier clause")
        if (others := groups[target]) is None:
            return f"no target for {name} to be {relation}"
        for one in own:
            for other in others:
                if relation not in (found := self.relations(one.box, other.box)):
                    return f"expected {name} {relation} target, found {' and '.join(found)} target"
        return ""


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boxes, whose edges are pixels that belong to them: a box is one pixel wider than their gap."""

    def area(left: Any, top: Any, right: Any, bottom: Any) -> Any:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(*(max(pair) for pair in zip(first[:2], second[:2], strict=True)),
                  *(min(pair) for pair in zip(first[2:4], second[2:4], strict=True)))  # fmt: skip
    union = area(*first[:4]) + area(*second[:4]) - shared
    return shared / union if union else 0
