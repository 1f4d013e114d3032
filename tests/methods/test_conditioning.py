"""Conditioning modes of a request: what is left of it, how often, and how much each counts."""

from __future__ import annotations

import pytest
import torch
from bridge_parts import requests

from umm_zoo.batch import Batch, Task, Tokens, stacked
from umm_zoo.methods.conditioning import ConditionDropout, Guidance, Prompts, mode_of
from umm_zoo.objectives.guidance import guide, guide_edit


def texts(batch):
    return [turns[0]["text"] for turns in batch.conversations]


def test_tasks_by_images_and_the_modes_they_train():
    tasks = requests(0, 1, 2).tasks
    assert tasks == [Task.TEXT_TO_IMAGE, Task.EDIT, Task.COMPOSE]
    assert Batch(["a"], [[]]).tasks == [Task.QUESTION]  # nothing to generate
    assert [mode_of(task) for task in (*tasks, Task.RECONSTRUCT, Task.UNCONDITIONAL)] == ["full"] * 3 + ["image", "nothing"]


def test_modes_of_an_edit():
    batch = requests(1, 1, 1, 1)
    shown = Prompts().apply(batch, ["full", "image", "text", "nothing"])
    assert texts(shown) == ["<image>\nMake the circle green.", "<image>\nReconstruct the image.", "Make the circle green.", "Generate an image."]  # fmt: skip  # noqa: E501
    assert shown.image_counts == [1, 1, 0, 0] and torch.equal(stacked(shown.images), stacked(batch.images[:2]))
    assert texts(batch)[3] == "<image>\nMake the circle green."  # left as it was


def test_black_images_keep_their_place():
    batch = requests(2, 1, 0)
    shown = Prompts("", "", black_images=True).apply(batch, ["text", "image", "nothing"])
    assert texts(shown) == [texts(batch)[0], "<image>", ""]
    assert shown.image_counts == [2, 1, 0]
    assert all((image == -1).all() for image in shown.images[:2]) and torch.equal(shown.images[2], batch.images[2])


def test_answers_are_not_shown():
    batch = Batch(["a"], [[{"role": "user", "text": "Edit."}, {"role": "assistant", "text": "done"}]])
    assert Prompts().apply(batch, ["full"]).conversations == [[{"role": "user", "text": "Edit."}]]


def test_shares_of_dropout():
    dropout = ConditionDropout(0.2, 0.0, 0.1, 0.2, 0.3)
    modes = dropout([Task.EDIT] * 20000, torch.Generator().manual_seed(0))
    for mode, share in (("image", 0.1), ("text", 0.2), ("nothing", 0.3), ("full", 0.4)):
        assert modes.count(mode) / 20000 == pytest.approx(share, abs=0.015)
    modes = dropout([Task.TEXT_TO_IMAGE] * 10000, torch.Generator().manual_seed(1))
    assert modes.count("nothing") / 10000 == pytest.approx(0.2, abs=0.015)
    assert set(dropout([Task.RECONSTRUCT, Task.UNCONDITIONAL] * 50)) == {"image", "nothing"}
    with pytest.raises(ValueError, match="expected 0 to 1 in sum"):
        ConditionDropout(edit_text=0.6, edit_both=0.6)


def test_weights_are_those_of_the_objectives_guidance():
    unc, rec, full = (Tokens(torch.zeros(1, 1, 1)) for _ in range(3))
    guidance = Guidance(4.0, 2.0, 3.0, 5.0)
    expected = {Task.TEXT_TO_IMAGE: guide(unc, full, 4.0), Task.EDIT: guide_edit(unc, rec, full, 2.0, 3.0), Task.COMPOSE: guide(unc, full, 5.0)}  # fmt: skip  # noqa: E501
    for task, branches in expected.items():
        assert list(guidance.weights(task).values()) == [branch.weight for branch in branches]
        assert sum(guidance.weights(task).values()) == 1
    assert Guidance(composition=None).weights(Task.COMPOSE) == Guidance().weights(Task.EDIT)


def test_chosen_rows_keep_their_images():
    batch = requests(1, 0, 2)
    batch.extras = {"latents": torch.arange(3.0), "of_images": torch.zeros(4)}
    chosen = batch.select([2, 0])
    assert chosen.keys == ["row 2", "row 0"] and torch.equal(stacked(chosen.images), stacked(batch.images)[[1, 2, 0]])
    assert torch.equal(stacked(chosen.requested), stacked(batch.requested)[[2, 0]])
    assert chosen.extras["latents"].tolist() == [
        2.0,
        0.0,
    ]
    assert list(chosen.extras) == ["latents"] and chosen.tasks == [Task.COMPOSE, Task.EDIT]
