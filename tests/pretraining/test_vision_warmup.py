"""The stage that teaches a language model's vision side to name what stands in each cell."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_configs
import torch
from learning import losses_of
from torch import nn

from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.methods.llava import LLaVA
from umm_zoo.pretraining.supervised_tower import CellLabels
from umm_zoo.pretraining.vision_warmup import VisionWarmup
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.run import load_weights
from umm_zoo.training.setup import TrainingSetup

CELLS = ["top left", "top right", "bottom left", "bottom right"]
COLOURS = ["red", "green"]
EYES = {"hidden_size": 24, "intermediate_size": 40, "initializer_range": 0.06}
TINY = tiny_configs.qwen(32, [2, 3, 3], EYES, intermediate_size=48, num_hidden_layers=1)


def batch(rows: int = 8) -> Batch:
    """Row i has one object in cell i mod 4, red in the first four rows, green in the next."""
    images, meta = -torch.ones(rows, 3, 32, 32), []
    for row in range(rows):
        cell, colour = row % 4, row // 4 % 2
        y, x = divmod(cell, 2)
        images[row, colour, y * 16 + 4 : y * 16 + 12, x * 16 + 4 : x * 16 + 12] = 1.0
        meta.append({"scene": {"objects": [{"cell": CELLS[cell], "colour": COLOURS[colour]}]}})
    return Batch([f"row{i}" for i in range(rows)], [[] for _ in range(rows)], images, [1] * rows, meta=meta)


def vlm(seed: int) -> Qwen25VL:
    torch.manual_seed(seed)
    return Qwen25VL.from_config(TINY)


def warmup(trained: tuple[str, ...] = ("vision_tower", "projector", "heads")) -> VisionWarmup:
    method = VisionWarmup(vlm(0), CellLabels(CELLS, {"colour": COLOURS}))
    TrainingSetup(list(trained), AdamW(3e-3)).prepare(method)
    return method


def after() -> LLaVA:
    """A stage over the same model that trains its language model and projector."""
    method = LLaVA(vlm(1))
    method.train_only(["projector", "language_model"])
    return method


def saved(method: VisionWarmup, folder: Path) -> Path:
    checkpoint = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "last.ckpt")
    return folder / "last.ckpt"


def reached(part: nn.Module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.any()) for p in part.parameters()]


def test_gradients_reach_vision_and_heads_only() -> None:
    method = warmup(("vision_tower", "projector", "language_model", "heads"))
    method.training_losses(batch())["loss"].backward()
    parts = method.parts()
    assert not any(reached(parts["language_model"]))
    for name in ("vision_tower", "projector", "heads"):
        assert all(reached(parts[name])), name


def test_the_loss_is_the_sum_of_its_terms() -> None:
    losses = warmup().training_losses(batch())
    assert set(losses) == {"loss", "colour", "occupied"}
    torch.testing.assert_close(losses["loss"], losses["colour"] + losses["occupied"])


def test_images_of_unequal_sizes_weigh_by_their_tokens() -> None:
    method, data = warmup().eval(), batch(4)
    data.images[1], data.images[2] = data.images[1][:, :, 8:], torch.cat([data.images[2]] * 2, dim=1)
    outputs = method.validation_step(data, 0)
    alone = [method.validation_step(data.select([row]), 0) for row in range(4)]
    for name in ("colour", "occupied", "colour_accuracy"):
        counts = torch.tensor([one.counts[name] for one in alone])
        mean = (torch.stack([one.scalars[name] for one in alone]) * counts).sum() / counts.sum()
        torch.testing.assert_close(outputs.scalars[name], mean, msg=name)
    assert [one.counts["occupied"] for one in alone] == [16, 12, 32, 16]


def test_objects_and_their_colours_are_learnt() -> None:
    method, data = warmup(), batch()
    first = losses_of(method, data, 40)[0]
    outputs = method.eval().validation_step(data, 0)
    assert outputs.scalars["colour_accuracy"] == outputs.scalars["occupied_accuracy"] == 1
    assert outputs.scalars["loss"] < 0.2 * first and set(method.makes) == set(outputs.scalars)
    assert outputs.counts["colour_accuracy"] == outputs.counts["colour"] == 4 * 8  # the four tokens of each object's cell
    assert outputs.counts["occupied_accuracy"] == 16 * 8


def test_a_checkpoint_holds_the_heads_and_a_later_stage_takes_the_rest(tmp_path: Path) -> None:
    first, second = warmup(), after()
    file = saved(first, tmp_path)
    checkpoint = torch.load(file, weights_only=True)
    heads = {f"heads.{key}" for key in first.heads.state_dict()}
    assert set(checkpoint["stage_only"]) == heads and heads <= set(checkpoint["state_dict"])
    load_weights(second, file, "second.yaml")
    own, taken = second.state_dict(), checkpoint["state_dict"].keys() - heads
    assert taken and all(torch.equal(own[key], checkpoint["state_dict"][key]) for key in taken)
    kept = second.checkpoint_keys()
    assert taken <= kept and not heads & kept  # the vision tower, frozen in this stage, is in its checkpoints


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    class Unmarked(VisionWarmup):
        stage_only = ()

    method = Unmarked(vlm(0), CellLabels(CELLS, {"colour": COLOURS}))
    method.train_only(["heads"])
    with pytest.raises(UserError, match=r"second\.yaml: after: tensor 'heads\..*' of the earlier stage has no place"):
        load_weights(after(), saved(method, tmp_path), "second.yaml")


def test_every_token_names_the_scene_and_a_value_that_is_not_listed_is_refused() -> None:
    data = batch()
    for row, meta in enumerate(data.meta):
        meta["scene"]["background"] = "dark" if row % 3 else "light"
        data.images[row][2] = -1.0 if row % 3 else 1.0  # type: ignore[index]
    method = VisionWarmup(vlm(0), CellLabels(CELLS, {"colour": COLOURS}), {"background": ["dark", "light"]})
    TrainingSetup(["vision_tower", "projector", "heads"], AdamW(3e-3)).prepare(method)
    losses_of(method, data, 40)
    outputs = method.eval().validation_step(data, 0)
    assert outputs.scalars["background_accuracy"] == 1 and outputs.counts["background_accuracy"] == 16 * 8
    data.meta[2]["scene"]["background"] = "striped"
    with pytest.raises(ValueError, match=r"row2: found 'striped' in the ground truth, expected one of \['dark', 'light'\]"):
        method.training_losses(data)
    del data.meta[3]["scene"]["background"]
    data.meta[2]["scene"]["background"] = "dark"
    with pytest.raises(ValueError, match=r"row3: found a scene with \['objects'\], expected 'background'"):
        method.training_losses(data)


def test_an_attribute_of_the_scene_may_not_hide_an_object_s() -> None:
    for name in ("colour", "occupied"):
        with pytest.raises(ValueError, match=f"VisionWarmup.scene_attributes: found '{name}'"):
            VisionWarmup(vlm(0), CellLabels(CELLS, {"colour": COLOURS}), {name: ["a", "b"]})
