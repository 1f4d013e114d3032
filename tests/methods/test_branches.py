"""Versions of a request: what is left of it, how often, and how much each counts."""

from __future__ import annotations

import pytest
import torch
from bridge_parts import requests

from umm_zoo.batch import Batch, Tokens
from umm_zoo.methods.conditioning import (
    ConditionDropout,
    Guidance,
    Prompts,
    drawing_tasks,
    select_rows,
    stated_version,
)
from umm_zoo.objectives.guidance import guide, guide_edit


def texts(batch):
    return [turns[0]["text"] for turns in batch.conversations]


def test_tasks_by_images_and_by_statement():
    batch = requests(0, 1, 2, 1, 0)
    batch.meta[3]["task"], batch.meta[4]["task"] = "reconstruction", "unconditional"
    tasks = drawing_tasks(batch)
    assert tasks == ["text_to_image", "edit", "composition", "reconstruction", "unconditional"]
    assert [stated_version(task) for task in tasks] == ["full", "full", "full", "image", "nothing"]


def test_versions_of_an_edit():
    batch = requests(1, 1, 1, 1)
    shown = Prompts().apply(batch, ["full", "image", "text", "nothing"])
    assert texts(shown) == ["<image>\nMake the circle green.", "<image>\nReconstruct the image.", "Make the circle green.", "Generate an image."]  # fmt: skip  # noqa: E501
    assert shown.image_counts == [1, 1, 0, 0] and torch.equal(shown.images, batch.images[:2])
    assert texts(batch)[3] == "<image>\nMake the circle green."  # left as it was


def test_black_images_keep_their_place():
    batch = requests(2, 1, 0)
    shown = Prompts("", "", black_images=True).apply(batch, ["text", "image", "nothing"])
    assert texts(shown) == [texts(batch)[0], "<image>", ""]
    assert shown.image_counts == [2, 1, 0]
    assert (shown.images[:2] == -1).all() and torch.equal(shown.images[2], batch.images[2])


def test_answers_are_not_shown():
    batch = Batch(["a"], [[{"role": "user", "text": "Edit."}, {"role": "assistant", "text": "done"}]])
    assert Prompts().apply(batch, ["full"]).conversations == [[{"role": "user", "text": "Edit."}]]


def test_shares_of_dropout():
    dropout = ConditionDropout(0.2, 0.0, 0.1, 0.2, 0.3)
    versions = dropout(["edit"] * 20000, torch.Generator().manual_seed(0))
    for version, share in (("image", 0.1), ("text", 0.2), ("nothing", 0.3), ("full", 0.4)):
        assert versions.count(version) / 20000 == pytest.approx(share, abs=0.015)
    versions = dropout(["text_to_image"] * 10000, torch.Generator().manual_seed(1))
    assert versions.count("nothing") / 10000 == pytest.approx(0.2, abs=0.015)
    assert set(dropout(["reconstruction", "unconditional"] * 50)) == {"image", "nothing"}
    with pytest.raises(ValueError, match="expected 0 to 1 in sum"):
        ConditionDropout(edit_text=0.6, edit_both=0.6)


def test_weights_are_those_of_the_objectives_guidance():
    unc, rec, full = (Tokens(torch.zeros(1, 1, 1)) for _ in range(3))
    guidance = Guidance(4.0, 2.0, 3.0, 5.0)
    expected = {"text_to_image": guide(unc, full, 4.0), "edit": guide_edit(unc, rec, full, 2.0, 3.0), "composition": guide(unc, full, 5.0)}  # fmt: skip  # noqa: E501
    for task, branches in expected.items():
        assert list(guidance.weights(task).values()) == [branch.weight for branch in branches]
        assert sum(guidance.weights(task).values()) == 1
    assert Guidance(composition=None).weights("composition") == Guidance().weights("edit")


def test_chosen_rows_keep_their_images():
    batch = requests(1, 0, 2)
    batch.extras = {"latents": torch.arange(3.0), "of_images": torch.zeros(4)}
    chosen = select_rows(batch, [2, 0])
    assert chosen.keys == ["row 2", "row 0"] and torch.equal(chosen.images, batch.images[[1, 2, 0]])
    assert torch.equal(chosen.targets, batch.targets[[2, 0]]) and chosen.extras["latents"].tolist() == [2.0, 0.0]
    assert list(chosen.extras) == ["latents"]
