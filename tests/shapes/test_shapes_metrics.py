"""Metrics of generated scenes, fed with renders of scenes whose truth is known."""

import math
from dataclasses import replace

import pytest
import torch
from shapes_batches import batch_of, images_of
from values_over_ranks import scored

from umm_zoo.batch import Batch, stacked
from umm_zoo.metrics.images import Reconstruction, high_band
from umm_zoo.outputs import Outputs
from umm_zoo.shapes import Object, Scene, World, make_sample
from umm_zoo.shapes.caption_metrics import CaptionClauses, CaptionDetails
from umm_zoo.shapes.detector import ShapesDetector
from umm_zoo.shapes.editing_metrics import EditPixels, EditSuccess, InstructionSensitivity, edited_mask
from umm_zoo.shapes.geneval import CATEGORIES
from umm_zoo.shapes.geneval_metrics import SceneMatch, ShapesGenEval, fulfils

WORLD = World()
GLYPHS = ("plus", "times", "minus", "bar")


def rows(task: str, count: int, split: str = "test") -> tuple[Batch, torch.Tensor]:
    """A batch of samples of a task, and the images that it asks for."""
    batch = batch_of([make_sample(WORLD, 7, split, task, i) for i in range(count)])
    return batch, stacked(batch.requested)


def found(*objects: tuple[str, str, str]) -> Scene:
    return Scene("grey", "", tuple(Object(shape, colour, "small", cell, "") for cell, shape, colour in objects))


def test_true_images_fulfil_every_category() -> None:
    batch, targets = rows("geneval", 60)
    assert scored(ShapesGenEval(), (Outputs(generated=targets), batch)) == dict.fromkeys(("overall", *CATEGORIES), 1.0)


def test_with_colours_swapped_attribution_fails() -> None:
    samples = [make_sample(WORLD, 7, "test", "geneval", i) for i in range(5, 120, 6)]
    pairs = [sample for sample in samples if len({item.colour for item in sample.target.objects}) == 2]
    swapped = []
    for sample in pairs:
        first, second = sample.target.objects
        objects = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        swapped.append(replace(sample.target, objects=objects))
    step = Outputs(generated=images_of(swapped)), batch_of(pairs)
    assert scored(ShapesGenEval(), step)["colour_attribution"] == 0 and len(pairs) > 5


def test_overall_is_the_mean_over_categories() -> None:
    batch, targets = rows("geneval", 7)  # two prompts of the first category, one of each other
    outputs = Outputs(generated=torch.cat([targets[:1], torch.zeros_like(targets[1:])]))
    assert scored(ShapesGenEval(), (outputs, batch))["overall"] == pytest.approx(0.5 / 6)


ONE = [("top left", "circle", "red")]
TWO = [*ONE, ("top right", "circle", "red")]


@pytest.mark.parametrize(
    ("wanted", "objects", "right"),
    [
        ({"count": 2, "exact": True}, ONE, False),
        ({"count": 1, "exact": True}, TWO, False),
        ({"count": 1, "exact": False}, TWO, True),
        ({"count": 1, "exact": False, "colour": "blue"}, ONE, False),
    ],
)
def test_requirements(wanted, objects, right: bool) -> None:
    assert fulfils(found(*objects), {"include": [{"shape": "circle", **wanted}]}, 2) is right


def test_a_relation_holds_between_any_two_by_their_cells() -> None:
    seen = found(("top left", "circle", "red"), ("middle right", "circle", "red"), ("bottom centre", "square", "red"))
    wanted = [{"shape": shape, "count": 1, "exact": False} for shape in ("circle", "square")]
    for relation, right in {"left of": True, "right of": True, "above": True, "below": False}.items():
        assert fulfils(seen, {"include": wanted, "relation": relation}, 3) is right


@pytest.mark.parametrize(("relation", "right"), [("left of", True), ("right of", False), ("above", True), ("below", False)])
def test_relations_go_by_row_and_column(relation: str, right: bool) -> None:
    seen = found(("top left", "circle", "red"), ("bottom right", "square", "red"))
    wanted = [{"shape": shape, "count": 1, "exact": False} for shape in ("circle", "square")]
    assert fulfils(seen, {"include": wanted, "relation": relation}, 2) is right


def test_scene_match_counts_objects_marks_and_extras() -> None:
    sample = make_sample(WORLD, 7, "test", "text_to_image", 2)
    batch, targets = rows("text_to_image", 3)
    scene = sample.target
    assert scene is not None and len(scene.objects) < 4
    free = next(cell for cell in WORLD.places if scene.at(cell) is None)
    other_mark = next(mark for mark in WORLD.marks if mark != scene.objects[0].mark)
    changed = replace(scene.objects[0], mark=other_mark)
    more = replace(scene, objects=(changed, *scene.objects[1:], replace(scene.objects[0], cell=free)))
    values = scored(SceneMatch(), (Outputs(generated=torch.cat([targets[:2], images_of([more])])), batch))
    total = sum(len(meta["target_scene"]["objects"]) for meta in batch.meta)
    assert values["scene"] == pytest.approx(2 / 3) and values["objects"] == 1 and values["extra"] == pytest.approx(1 / 3)
    assert values["marks"] == pytest.approx((total - 1) / total) and values["background"] == 1


@pytest.mark.parametrize(("task", "split"), [("edits", "test"), ("hybrid_edits", "hybrid"), ("compositions", "test")])
def test_targets_are_perfect_edits_and_sources_none(task: str, split: str) -> None:
    batch, targets = rows(task, 24, split)
    sources = torch.stack([batch.images_of(row)[0] for row in range(len(batch))])
    done, undone = (Outputs(generated=targets), batch), (Outputs(generated=sources), batch)
    assert all(value == 1 for value in scored(EditSuccess(), done).values())
    assert scored(EditSuccess(), undone)["overall"] <= (0.25 if task == "compositions" else 0)  # a guest may look like its host
    values = scored(EditPixels(), done)
    assert values["copy_index"] == 0 and values["preservation"] == pytest.approx(20 * math.log10(510))


def test_a_copy_of_the_source_has_copy_index_one_and_perfect_preservation() -> None:
    samples = [make_sample(WORLD, 7, "test", "edits", i) for i in range(12)]
    parts = [batch_of(samples[:5]), batch_of(samples[5:])]  # an edit has one image, its source
    values = scored(EditPixels(), *((Outputs(generated=stacked(part.images)), part) for part in parts))
    assert values["copy_index"] == pytest.approx(1) and values["preservation"] > 54
    assert values["copy_index/recolour"] == pytest.approx(1)


def test_preservation_is_told_by_kind_and_says_nothing_where_everything_may_change() -> None:
    batch, targets = rows("edits", 24)
    kinds = [str(meta["edit"]) for meta in batch.meta]
    error = {kind: 0.05 * (place + 1) for place, kind in enumerate(dict.fromkeys(kinds))}
    shifts = torch.tensor([error[kind] for kind in kinds])[:, None, None, None]
    made = targets - shifts * targets.sign()  # every channel of every pixel off by so much, and inside [-1, 1]
    values = scored(EditPixels(), (Outputs(generated=made), batch))
    found = {name: value for name, value in values.items() if name.startswith("preservation/")}
    expected = {f"preservation/{kind}": 20 * math.log10(2 / size) for kind, size in error.items() if kind != "background"}
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 5


def test_half_way_between_source_and_target_has_copy_index_one_half() -> None:
    batch, targets = rows("edits", 6)
    half = Outputs(generated=(stacked(batch.images) + targets) / 2)
    assert scored(EditPixels(), (half, batch))["copy_index"] == pytest.approx(0.5)


def test_the_mask_is_the_edited_cells_or_everything() -> None:
    mask = edited_mask({"edit": "move", "edited_cells": ["top right", "bottom left"]}, 2, 32)
    assert mask[:16, 16:].all() and mask[16:, :16].all() and not mask[:16, :16].any()
    assert edited_mask({"edit": "add+background", "edited_cells": ["top left"]}, 2, 32).all()


def test_sensitivity_is_one_for_targets_and_zero_where_the_text_is_ignored() -> None:
    batch, targets = rows("edits", 6)
    other = targets.flip(0)
    for images, others, expected in ((targets, other, 1.0), (targets, targets, 0.0)):
        outputs = Outputs(generated=images, unchanged=others, unchanged_references=other)
        assert scored(InstructionSensitivity(), (outputs, batch))[""] == pytest.approx(expected)


def test_a_batch_without_generated_images_is_left_out() -> None:
    batch, _ = rows("geneval", 6)
    for metric in (ShapesGenEval(), SceneMatch(), EditSuccess(), EditPixels(), Reconstruction()):
        assert scored(metric, (Outputs(), batch)) == {}


def test_the_high_band_of_a_checkerboard_is_itself_and_of_a_slope_nothing() -> None:
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1).double().expand(1, 3, 8, 8)
    torch.testing.assert_close(high_band(board)[..., 1:-1, 1:-1], board[..., 1:-1, 1:-1])
    slope = torch.arange(8).double().expand(1, 3, 8, 8)
    torch.testing.assert_close(high_band(slope)[..., 1:-1], torch.zeros(1, 3, 8, 6, dtype=torch.float64))


def test_reconstruction_has_its_ceiling_beside_it() -> None:
    originals = torch.zeros(2, 3, 9, 7)
    batch = Batch(["a", "b"], [[], []], targets=originals)
    values = scored(Reconstruction(), (Outputs(generated=originals + 0.2, round_trips=originals + 0.1), batch))
    assert values["psnr"] == pytest.approx(20) and values["psnr_ceiling"] == pytest.approx(20 * math.log10(20))
    assert values["high_band"] == pytest.approx(20 * math.log10(510))  # a constant shift has no high band


def test_the_larger_world_needs_its_own_detector() -> None:
    world = World(cells=3, num_colours=8, num_shapes=4)
    batch = batch_of([make_sample(world, 3, "test", "geneval", i) for i in range(12)], world)
    assert scored(ShapesGenEval(ShapesDetector(3, 8, 4)), (Outputs(generated=stacked(batch.requested)), batch))["overall"] == 1


def test_details_of_captions_count_for_the_objects_described_rightly() -> None:
    pairs = zip(WORLD.places, GLYPHS, strict=True)
    scene = Scene("grey", "", tuple(Object("circle", "red", "small", cell, mark) for cell, mark in pairs))
    clauses = [f"{cell}: a small red circle" for cell in WORLD.places]
    said = [
        clauses[0],
        f"{clauses[1]} with a times",
        f"{clauses[2]} with a plus",
        f"{clauses[3].replace('red', 'blue')} with a bar",
    ]
    batch = Batch(["a"], [[]], meta=[{"scene": scene.to_json()}])
    values = scored(CaptionDetails(), (Outputs(answers=["; ".join([*said, "background: grey"])]), batch))
    assert values == {"named": pytest.approx(2 / 3), "right": pytest.approx(1 / 3), "precision": 0.5}
    assert scored(CaptionClauses(), (Outputs(answers=["; ".join(said)]), batch))["recall"] == 0.75


def test_images_from_true_captions_are_looked_at_where_they_are_asked_for() -> None:
    batch, targets = rows("text_to_image", 4)
    outputs = Outputs(generated=torch.zeros_like(targets), from_true_captions=targets)
    assert scored(SceneMatch(images="from_true_captions"), (outputs, batch))["scene"] == 1
    assert scored(SceneMatch(), (outputs, batch))["scene"] == 0
    assert SceneMatch(images="from_true_captions").reads == ("from_true_captions",)
