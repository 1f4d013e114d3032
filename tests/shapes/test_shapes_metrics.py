"""Metrics of generated scenes, fed with renders of scenes whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from umm_zoo.batch import Batch
from umm_zoo.metrics.images import Reconstruction, high_band
from umm_zoo.outputs import Outputs
from umm_zoo.shapes import Object, Scene, World, make_sample, render
from umm_zoo.shapes.detector import ShapesDetector
from umm_zoo.shapes.editing_metrics import EditPixels, EditSuccess, InstructionSensitivity, edited_mask
from umm_zoo.shapes.geneval import CATEGORIES
from umm_zoo.shapes.geneval_metrics import SceneMatch, ShapesGenEval, fulfils

WORLD = World()


def image(*scenes) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(WORLD, scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


def rows(task: str, count: int, split: str = "test") -> tuple[Batch, torch.Tensor]:
    """A batch of samples of a task, and the images that it asks for."""
    samples = [make_sample(WORLD, 7, split, task, i) for i in range(count)]
    inputs = [scene for sample in samples for scene in sample.scenes]
    targets = image(*[sample.target for sample in samples])
    counts = [len(sample.scenes) for sample in samples]
    conversations = [sample.row["conversations"] for sample in samples]
    meta = [sample.row for sample in samples]
    images = image(*inputs) if inputs else None
    return Batch([sample.key for sample in samples], conversations, images, counts, targets, meta), targets


def found(*objects: tuple[str, str, str]) -> Scene:
    return Scene("grey", "", tuple(Object(shape, colour, "small", cell, "") for cell, shape, colour in objects))


def test_true_images_fulfil_every_category() -> None:
    batch, targets = rows("geneval", 60)
    metric = ShapesGenEval()
    metric.update(Outputs(generated=targets), batch)
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values == dict.fromkeys(("overall", *CATEGORIES), 1.0)


def test_with_colours_swapped_attribution_fails() -> None:
    samples = [make_sample(WORLD, 7, "test", "geneval", i) for i in range(5, 120, 6)]
    pairs = [sample for sample in samples if len({item.colour for item in sample.target.objects}) == 2]
    swapped = []
    for sample in pairs:
        first, second = sample.target.objects
        objects = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        swapped.append(replace(sample.target, objects=objects))
    batch = Batch([sample.key for sample in pairs], [[] for _ in pairs], meta=[sample.row for sample in pairs])
    metric = ShapesGenEval()
    metric.update(Outputs(generated=image(*swapped)), batch)
    assert float(metric.compute()["colour_attribution"]) == 0 and len(pairs) > 5


def test_overall_is_the_mean_over_categories() -> None:
    batch, targets = rows("geneval", 7)  # two prompts of the first category, one of each other
    metric = ShapesGenEval()
    metric.update(Outputs(generated=torch.cat([targets[:1], torch.zeros_like(targets[1:])])), batch)
    assert float(metric.compute()["overall"]) == pytest.approx(0.5 / 6)


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
    metric = SceneMatch()
    metric.update(Outputs(generated=torch.cat([targets[:2], image(more)])), batch)
    values = {name: float(value) for name, value in metric.compute().items()}
    total = sum(len(meta["target_scene"]["objects"]) for meta in batch.meta)
    assert values["scene"] == pytest.approx(2 / 3) and values["objects"] == 1 and values["extra"] == pytest.approx(1 / 3)
    assert values["marks"] == pytest.approx((total - 1) / total) and values["background"] == 1


@pytest.mark.parametrize(("task", "split"), [("edits", "test"), ("hybrid_edits", "hybrid"), ("compositions", "test")])
def test_targets_are_perfect_edits_and_sources_none(task: str, split: str) -> None:
    batch, targets = rows(task, 24, split)
    sources = torch.stack([batch.images_of(row)[0] for row in range(len(batch))])
    done, pixels, undone = EditSuccess(), EditPixels(), EditSuccess()
    done.update(Outputs(generated=targets), batch)
    undone.update(Outputs(generated=sources), batch)
    pixels.update(Outputs(generated=targets), batch)
    assert all(float(value) == 1 for value in done.compute().values())
    assert float(undone.compute()["overall"]) <= (0.25 if task == "compositions" else 0)  # a guest may look like its host
    values = pixels.compute()
    assert float(values["copy_index"]) == 0 and float(values["preservation"]) == pytest.approx(20 * math.log10(510))


def test_a_copy_of_the_source_has_copy_index_one_and_perfect_preservation() -> None:
    batch, _ = rows("edits", 12)
    sources = torch.stack([batch.images_of(row)[0] for row in range(len(batch))])
    metric = EditPixels()
    metric.update(Outputs(generated=sources[:5]), _part(batch, 0, 5))
    metric.update(Outputs(generated=sources[5:]), _part(batch, 5, 12))
    values = metric.compute()
    assert float(values["copy_index"]) == pytest.approx(1) and float(values["preservation"]) > 54
    assert float(values["copy_index/recolour"]) == pytest.approx(1)


def test_preservation_is_told_by_kind_and_says_nothing_where_everything_may_change() -> None:
    batch, targets = rows("edits", 24)
    kinds = [str(meta["edit"]) for meta in batch.meta]
    error = {kind: 0.05 * (place + 1) for place, kind in enumerate(dict.fromkeys(kinds))}
    shifts = torch.tensor([error[kind] for kind in kinds])[:, None, None, None]
    made = targets - shifts * targets.sign()  # every channel of every pixel off by so much, and inside [-1, 1]
    metric = EditPixels()
    metric.update(Outputs(generated=made), batch)
    found = {name: float(value) for name, value in metric.compute().items() if name.startswith("preservation/")}
    expected = {f"preservation/{kind}": 20 * math.log10(2 / size) for kind, size in error.items() if kind != "background"}
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 5


def _part(batch: Batch, start: int, stop: int) -> Batch:
    images = torch.cat([batch.images_of(row) for row in range(start, stop)])
    assert batch.targets is not None
    return Batch(
        batch.keys[start:stop], batch.conversations[start:stop], images, batch.image_counts[start:stop],
        batch.targets[start:stop], batch.meta[start:stop],
    )  # fmt: skip


def test_half_way_between_source_and_target_has_copy_index_one_half() -> None:
    batch, targets = rows("edits", 6)
    sources = torch.stack([batch.images_of(row)[0] for row in range(6)])
    metric = EditPixels()
    metric.update(Outputs(generated=(sources + targets) / 2), batch)
    assert float(metric.compute()["copy_index"]) == pytest.approx(0.5)


def test_the_mask_is_the_edited_cells_or_everything() -> None:
    mask = edited_mask({"edit": "move", "edited_cells": ["top right", "bottom left"]}, 2, 32)
    assert mask[:16, 16:].all() and mask[16:, :16].all() and not mask[:16, :16].any()
    assert edited_mask({"edit": "add+background", "edited_cells": ["top left"]}, 2, 32).all()


def test_sensitivity_is_one_for_targets_and_zero_where_the_text_is_ignored() -> None:
    batch, targets = rows("edits", 6)
    other = targets.flip(0)
    for images, others, expected in ((targets, other, 1.0), (targets, targets, 0.0)):
        metric = InstructionSensitivity()
        metric.update(Outputs(generated=images, unchanged=others, unchanged_references=other), batch)
        assert float(metric.compute()) == pytest.approx(expected)


def test_a_batch_without_generated_images_is_left_out() -> None:
    batch, _ = rows("geneval", 6)
    for metric in (ShapesGenEval(), SceneMatch(), EditSuccess(), EditPixels(), Reconstruction()):
        metric.update(Outputs(), batch)
        assert metric.compute() == {}


def test_the_high_band_of_a_checkerboard_is_itself_and_of_a_slope_nothing() -> None:
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1).double().expand(1, 3, 8, 8)
    torch.testing.assert_close(high_band(board)[..., 1:-1, 1:-1], board[..., 1:-1, 1:-1])
    slope = torch.arange(8).double().expand(1, 3, 8, 8)
    torch.testing.assert_close(high_band(slope)[..., 1:-1], torch.zeros(1, 3, 8, 6, dtype=torch.float64))


def test_reconstruction_has_its_ceiling_beside_it() -> None:
    originals = torch.zeros(2, 3, 9, 7)
    batch = Batch(["a", "b"], [[], []], targets=originals)
    metric = Reconstruction()
    metric.update(Outputs(generated=originals + 0.2, round_trips=originals + 0.1), batch)
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values["psnr"] == pytest.approx(20) and values["psnr_ceiling"] == pytest.approx(20 * math.log10(20))
    assert values["high_band"] == pytest.approx(20 * math.log10(510))  # a constant shift has no high band


def test_the_larger_world_needs_its_own_detector() -> None:
    world = World(cells=3, num_colours=8, num_shapes=4)
    samples = [make_sample(world, 3, "test", "geneval", i) for i in range(12)]
    images = torch.from_numpy(np.stack([render(world, sample.target) for sample in samples])).permute(0, 3, 1, 2) / 127.5 - 1
    batch = Batch([str(i) for i in range(12)], [[] for _ in samples], meta=[sample.row for sample in samples])
    metric = ShapesGenEval(ShapesDetector(3, 8, 4))
    metric.update(Outputs(generated=images), batch)
    assert float(metric.compute()["overall"]) == 1
