"""GenEval's rule on detections, against verdicts derived by hand from the official script's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from umm_zoo.errors import UserError
from umm_zoo.metrics.geneval_rule import Detections, Found, GenEvalRule, overlap

#: Class, score, left, top, width, height, colour.
Thing = tuple[str, float, float, float, float, float, str]


def dog(score: float = 0.95, x: float = 0, y: float = 0, w: float = 10, h: float = 10, colour: str = "brown") -> Thing:
    return "dog", score, x, y, w, h, colour


def cat(score: float = 0.95, x: float = 0, y: float = 0, w: float = 10, h: float = 10, colour: str = "black") -> Thing:
    return "cat", score, x, y, w, h, colour


def seen(things: Sequence[Thing], dtype: type = np.float32) -> Detections:
    boxes = np.array([[x, y, x + w, y + h] for _, _, x, y, w, h, _ in things], dtype).reshape(-1, 4)
    return Detections([thing[0] for thing in things], np.array([thing[1] for thing in things], dtype), boxes)


def judged(things: Sequence[Thing], wanted: dict[str, Any], rule: GenEvalRule | None = None, dtype: type = np.float32):
    colours = {(name, *np.array([x, y, x + w, y + h], dtype).tolist()): colour for name, _, x, y, w, h, colour in things}
    judgement = (rule or GenEvalRule())(
        seen(things, dtype), {"tag": "two_object", **wanted}, lambda name, own: [colours[name, *one.box.tolist()] for one in own]
    )
    return judgement.right, judgement.reason


def has(name: str = "dog", count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def beside(relation: str) -> dict[str, Any]:
    """A dog, and a cat that lies so to it."""
    return {"include": [has(), has("cat", position=[relation, 0])]}


def counting(count: int) -> dict[str, Any]:
    return {"tag": "counting", "include": [has(count=count)], "exclude": [has(count=count + 1)]}


NEXT = {limit: float(np.nextafter(np.float32(limit), np.float32(1))) for limit in (0.3, 0.9)}
TWO = {"include": [has(count=2)]}
RED = {"include": [has(color="red")]}
FAR = dog(x=100)  # from a cat at 0: centres 5 and 105, offset 100, margin 2
#: Name: what is seen, what is wanted, the reason why it is wrong (None: it is right).
CASES: dict[str, tuple[Sequence[Thing], dict[str, Any], str | None]] = {
    # presence
    "one": ([dog()], {"include": [has()]}, None),
    "none": ([], {"include": [has()]}, "expected dog>=1, found 0"),
    "of another class": ([cat()], {"include": [has()]}, "expected dog>=1, found 0"),
    "more than asked do no harm": ([dog(x=i) for i in range(3)], TWO, None),
    "fewer than asked": ([dog()], TWO, "expected dog>=2, found 1"),
    "two clauses, both": ([dog(), cat()], {"include": [has(), has("cat")]}, None),
    "two clauses, the second fails": ([dog()], {"include": [has(), has("cat")]}, "expected cat>=1, found 0"),
    "two clauses, both fail": ([], {"include": [has(), has("cat")]}, "expected dog>=1, found 0\nexpected cat>=1, found 0"),
    "a clause twice changes nothing": ([dog()], {"include": [has(), has()]}, None),
    "two clauses of one class share their objects": ([dog(), dog(x=1)], {"include": [has(), has(count=2)]}, None),
    "nothing wanted": ([dog()], {}, None),
    # scores
    "at .3": ([dog(0.3)], {"include": [has()]}, "expected dog>=1, found 0"),
    "above .3": ([dog(NEXT[0.3])], {"include": [has()]}, None),
    "at .9 when counting": ([dog(0.9)], counting(1), "expected dog>=1, found 0"),
    "above .9 when counting": ([dog(NEXT[0.9])], counting(1), None),
    "at .9 otherwise": ([dog(0.9)], {"include": [has()]}, None),
    "a faint one is not counted": ([dog(), dog(0.9, x=1)], counting(1), None),
    "sixteen of a class at most": ([dog(x=i) for i in range(20)], {"include": [has(count=17)]}, "expected dog>=17, found 16"),
    "sixteen are enough for sixteen": ([dog(x=i) for i in range(20)], counting(16), None),
    "sixteen of each class": ([dog(x=i) for i in range(20)] + [cat()], {"include": [has("cat")]}, None),
    # exclusion
    "as many as asked": ([dog(), dog(x=1)], counting(2), None),
    "one too many": ([dog(x=i) for i in range(3)], counting(2), "expected dog<3, found 3"),
    "too few are not too many": ([dog()], counting(2), "expected dog>=2, found 1"),
    "none may be there": ([dog(), cat()], {"include": [has()], "exclude": [has("cat")]}, "expected cat<1, found 1"),
    "two exclusions, one fails": ([cat()], {"exclude": [has(), has("cat")]}, "expected cat<1, found 1"),
    "missing and too many": ([cat()], {"include": [has()], "exclude": [has("cat")]},
                             "expected dog>=1, found 0\nexpected cat<1, found 1"),
    "only exclusions, none there": ([cat()], {"exclude": [has()]}, None),
    # colour
    "the colour": ([dog(colour="red")], RED, None),
    "another colour": ([dog()], RED, "expected red dog>=1, found 0 red; and 1 brown"),
    "the surest has another colour": ([dog(0.8, x=1, colour="red"), dog(0.9)], RED,
                                      "expected red dog>=1, found 0 red; and 1 brown"),
    "the surest has the colour": ([dog(0.9, x=1, colour="red"), dog(0.8)], RED, None),
    "two of the colour": ([dog(colour="red"), dog(x=1, colour="red")], {"include": [has(count=2, color="red")]}, None),
    "one of two has the colour": ([dog(x=2), dog(x=1, colour="red")], {"include": [has(count=2, color="red")]},
                                  "expected red dog>=2, found 1 red; and 1 red, 1 brown"),
    "colours in the official order": ([dog(colour="white"), dog(x=1), dog(x=2, colour="blue"), dog(x=3, colour="blue")],
                                      {"include": [has(count=4, color="red")]},
                                      "expected red dog>=4, found 0 red; and 2 blue, 1 brown, 1 white"),
    "too few are not asked for their colour": ([dog()], {"include": [has(count=2, color="red")]}, "expected dog>=2, found 1"),
    "two colours of two classes": ([dog(), cat()], {"include": [has(color="brown"), has("cat", color="black")]}, None),
    "colours swapped": ([dog(), cat()], {"include": [has(color="black"), has("cat", color="brown")]},
                        "expected black dog>=1, found 0 black; and 1 brown\nexpected brown cat>=1, found 0 brown; and 1 black"),
    # position: of the cat to the dog
    "left": ([FAR, cat()], beside("left of"), None),
    "left is not right": ([FAR, cat()], beside("right of"), "expected cat right of target, found left of target"),
    "right": ([dog(), cat(x=100)], beside("right of"), None),
    "above": ([dog(y=100), cat()], beside("above"), None),
    "below": ([dog(), cat(y=100)], beside("below"), None),
    "two relations, the one": ([dog(x=100, y=100), cat()], beside("left of"), None),
    "two relations, the other": ([dog(x=100, y=100), cat()], beside("above"), None),
    "two relations, neither": ([dog(x=100, y=100), cat()], beside("below"),
                               "expected cat below target, found left of and above target"),
    # offset (-20, -30), margin 2: (-18, -28) / |(-20, -30)| = (-.499, -.777); over the length of what is left it were -.541
    "the whole offset's length": ([dog(x=20, y=30), cat()], beside("left of"), "expected cat left of target, found above target"),
    # offset -20, margin .1 * (50 + 50): -10 / 20 is -.5 and not below it
    "at half": ([dog(x=20, w=50), cat(w=50)], beside("left of"), "expected cat left of target, found  target"),
    "just beyond half": ([dog(x=21, w=50), cat(w=50)], beside("left of"), None),
    "within the margin": ([dog(x=2), cat()], beside("left of"), "expected cat left of target, found  target"),
    "in one place": ([dog(), cat()], beside("above"), "expected cat above target, found  target"),
    # the height counts on its own axis alone: offset (-20, 0), heights of 400
    "sizes by axis": ([dog(x=20, h=400), cat(h=400)], beside("left of"), None),
    "no target": ([cat()], beside("left of"), "expected dog>=1, found 0\nno target for cat to be left of"),
    "nothing to place": ([dog()], beside("left of"), "expected cat>=1, found 0"),
    "a target of the wrong colour is none": ([FAR, cat()], {"include": [has(color="red"), has("cat", position=["left of", 0])]},
                                             "expected red dog>=1, found 0 red; and 1 brown\nno target for cat to be left of"),
    "a wrong colour is not placed": ([FAR, cat()], {"include": [has(), has("cat", color="red", position=["right of", 0])]},
                                     "expected red cat>=1, found 0 red; and 1 black"),
    "colour, then position": ([FAR, cat()], {"include": [has(), has("cat", color="black", position=["right of", 0])]},
                              "expected cat right of target, found left of target"),
    "the surest alone is placed": ([FAR, cat(0.9), cat(0.8, x=200)], beside("left of"), None),
    "the surest target alone": ([dog(0.9, x=-100), dog(0.8, x=100), cat()], beside("left of"),
                                "expected cat left of target, found right of target"),
    "each of two": ([FAR, cat(), cat(0.9, x=200)], {"include": [has(), has("cat", 2, position=["left of", 0])]},
                    "expected cat left of target, found right of target"),
    "each of two targets": ([FAR, dog(0.9, x=-100), cat()], {"include": [has(count=2), has("cat", position=["left of", 0])]},
                            "expected cat left of target, found right of target"),
    "both to both": ([FAR, dog(0.9, x=150), cat(), cat(0.9, x=20)],
                     {"include": [has(count=2), has("cat", 2, position=["left of", 0])]}, None),
    "the second of three is the target": (
        [dog(x=300), cat(x=100), ("bird", 0.9, 0, 0, 10, 10, "red")],
        {"include": [has(), has("cat", position=["left of", 0]), has("bird", position=["left of", 1])]}, None),
    "what is misplaced is no target": (
        [dog(x=-300), cat(x=100), ("bird", 0.9, 0, 0, 10, 10, "red")],
        {"include": [has(), has("cat", position=["left of", 0]), has("bird", position=["left of", 1])]},
        "expected cat left of target, found right of target\nno target for bird to be left of"),
    "a position and an exclusion": ([FAR, cat()], {**beside("left of"), "exclude": [has("cat")]}, "expected cat<1, found 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdicts_derived_by_hand(case: str) -> None:
    things, wanted, reason = CASES[case]
    assert judged(things, wanted) == (reason is None, reason or "")


def test_the_float32_next_to_a_limit_is_above_it_in_float64() -> None:
    edge = [dog(float(np.float32(0.3)))]  # .30000001192
    assert not judged(edge, {"include": [has()]})[0] and judged(edge, {"include": [has()]}, dtype=np.float64)[0]


@pytest.mark.parametrize("number", [2, 15, 40])
def test_equal_scores_come_in_numpys_order_backwards(number: int) -> None:
    things = [dog(x=i) for i in range(number)]
    order = np.argsort(np.full(number, 0.95, np.float32))[::-1][:16]
    kept = GenEvalRule().kept(seen(things), "colors")["dog"]
    assert [one.box[0] for one in kept] == order.tolist()


def test_classes_are_sorted_apart_however_they_are_mixed() -> None:
    things = [dog(0.4, x=1), cat(0.5, x=2), dog(0.6, x=3), cat(0.4, x=4), dog(0.2, x=5)]
    kept = GenEvalRule().kept(seen(things), "colors")
    assert {name: [one.box[0] for one in own] for name, own in kept.items()} == {"dog": [3, 1], "cat": [2, 4]}


def test_boxes_one_apart_overlap_because_their_edges_are_pixels() -> None:
    first, second = np.array([0, 0, 9, 9]), np.array([9, 0, 18, 9])  # 10 x 10 each, and a column of 10 in both
    assert overlap(first, second) == 10 / 190 and overlap(first, np.array([11, 0, 12, 9])) == 0


def test_overlapping_objects_go_only_where_that_is_asked_for() -> None:
    things = [
        dog(0.9, w=9, h=9),
        dog(0.95, x=1, w=9, h=9),
        dog(0.8, x=5, w=9, h=9),
    ]  # overlaps of 90/110 and 60/140 with the surest

    def left(max_overlap: float) -> list[float]:
        return [one.box[0] for one in GenEvalRule(max_overlap=max_overlap).kept(seen(things), "colors")["dog"]]

    assert (left(1), left(0.9), left(0.8), left(60 / 140)) == ([1, 0, 5], [1, 0, 5], [1, 5], [1])


def test_masks_go_with_their_objects() -> None:
    masks = np.arange(3)[:, None, None] == np.arange(3)[:, None]  # [3, 3, 1]
    kept = GenEvalRule().kept(seen([dog(0.4), dog(0.2), dog(0.9)])._replace(masks=masks), "colors")["dog"]
    assert [one.mask[:, 0].tolist().index(True) for one in kept] == [2, 0]


def test_colours_are_asked_for_once_of_what_a_verdict_needs() -> None:
    wanted = {"include": [has(color="red"), has(count=2, color="red"), has("cat", 2, color="red"), has("bird")]}
    kept = {"dog": [Found(np.zeros(4), 1.0)] * 3, "cat": [Found(np.zeros(4), 1.0)], "bird": [Found(np.zeros(4), 1.0)]}
    assert {name: len(own) for name, own in GenEvalRule().coloured(kept, wanted).items()} == {"dog": 2}


def test_a_clause_that_looks_ahead_is_refused() -> None:
    with pytest.raises(UserError, match="position: found clause 1 beside clause 1, expected an earlier clause"):
        judged([dog(), cat()], {"include": [has(), has("cat", position=["above", 1])]})
