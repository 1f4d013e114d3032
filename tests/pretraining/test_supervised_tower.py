import pytest
import torch
from learning import losses_of

from umm_zoo.backbones.deit import DeiT3Features
from umm_zoo.backbones.feature_encoder import LibraryEncoder
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.batch import Batch, Grid
from umm_zoo.metrics import Means
from umm_zoo.pretraining.supervised_tower import UNLABELLED, CellLabels, SupervisedTower, cell_means, labels_of_tokens
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
}  # fmt: skip
CELLS = ["top left", "top right", "bottom left", "bottom right"]
COLOURS = ["red", "green"]


def batch(rows: int = 8) -> Batch:
    """Row i has one object in cell i mod 4, red in even and green in odd halves of the rows."""
    images, meta = -torch.ones(rows, 3, 16, 16), []
    for row in range(rows):
        cell, colour = row % 4, row // 4 % 2
        y, x = divmod(cell, 2)
        images[row, colour, y * 8 + 2 : y * 8 + 6, x * 8 + 2 : x * 8 + 6] = 1.0
        objects = [{"cell": CELLS[cell], "colour": COLOURS[colour]}]
        meta.append({"scene": {"background": "dark", "objects": objects}})
    return Batch([f"row{i}" for i in range(rows)], [[] for _ in range(rows)], images, [1] * rows, meta=meta)


def tower(kind: type[LibraryEncoder] = CLIPVisionFeatures, **arguments) -> SupervisedTower:
    torch.manual_seed(0)
    labels = CellLabels(CELLS, {"colour": COLOURS})
    return SupervisedTower(kind.from_config(VISION), labels, {"background": ["dark", "light"]}, **arguments)


def test_labels_stand_in_their_cells() -> None:
    labels = CellLabels(CELLS, {"colour": COLOURS})(batch())["colour"]
    assert labels[1].tolist() == [UNLABELLED, 0, UNLABELLED, UNLABELLED]
    assert labels[6].tolist() == [UNLABELLED, UNLABELLED, 1, UNLABELLED]


def test_a_share_labels_whole_images_for_good() -> None:
    labels, data = CellLabels(CELLS, {"colour": COLOURS}, {"colour": 0.25}), batch(400)
    first = labels(data)["colour"]
    assert torch.equal(first, labels(data)["colour"])
    assert 0.18 < (first != UNLABELLED).any(dim=1).float().mean() < 0.32
    assert (labels(data, everything=True)["colour"] != UNLABELLED).any(dim=1).all()


def test_cells_average_their_own_tokens() -> None:
    tokens = torch.arange(16.0).reshape(1, 16, 1)  # a 4x4 grid in raster order
    torch.testing.assert_close(cell_means(tokens, Grid(4, 4), 2)[0, :, 0], torch.tensor([2.5, 4.5, 10.5, 12.5]))
    tokens = torch.arange(8.0).reshape(1, 8, 1)  # 2 rows of 4
    torch.testing.assert_close(cell_means(tokens, Grid(2, 4), 2)[0, :, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]))


def test_each_token_has_the_label_of_its_cell() -> None:
    labels = torch.tensor([[1, 2, 3, UNLABELLED]])
    assert labels_of_tokens(labels, Grid(4, 4), 2).tolist() == [[1, 1, 2, 2, 1, 1, 2, 2, 3, 3, -100, -100, 3, 3, -100, -100]]
    assert labels_of_tokens(labels, Grid(2, 4), 2).tolist() == [[1, 1, 2, 2, 3, 3, -100, -100]]
    assert labels_of_tokens(labels, Grid(3, 2), 2).tolist() == [[1, 2, 3, -100, 3, -100]]  # a centre on the border


@pytest.mark.parametrize("kind", [CLIPVisionFeatures, DeiT3Features])
def test_every_parameter_gets_a_gradient(kind) -> None:
    method = tower(kind)
    method.training_losses(batch())["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_without_labels_the_loss_is_still_connected() -> None:
    labels = CellLabels(CELLS, {"colour": COLOURS}, {"colour": 0.0})
    method = SupervisedTower(CLIPVisionFeatures.from_config(VISION), labels)
    losses = method.training_losses(batch())
    losses["loss"].backward()
    assert losses["colour_2"] == 0 and losses["occupied_1"] > 0


def test_the_penultimate_features_learn() -> None:
    method, data = tower(), batch()
    TrainingSetup(["tower", "heads"], AdamW(3e-3)).prepare(method)
    losses_of(method, data, 80)
    outputs = method.eval().validation_step(data, 0)
    assert outputs.scalars["colour_accuracy"] == 1 and set(method.makes) == set(outputs.scalars)


def test_held_out_scores_do_not_depend_on_the_batches() -> None:
    method, data = tower().eval(), batch(8)
    for row in (1, 5, 6):  # rows without a labelled cell, so that batches of 2 hold different numbers of them
        data.meta[row]["scene"] = {"background": "light", "objects": []}
    whole, parts = Means(), Means()
    whole.update(method.validation_step(data, 0), data)
    for start in range(0, 8, 2):
        rows = slice(start, start + 2)
        part = Batch(data.keys[rows], data.conversations[rows], data.images[rows], [1, 1], meta=data.meta[rows])
        parts.update(method.validation_step(part, start), part)
    found, expected = parts.compute(), whole.compute()
    names = {"colour_accuracy", "occupied_accuracy", "background_accuracy", "colour_1", "colour_2", "background_scene"}
    assert names < set(expected) and found.keys() == expected.keys()
    for name in names:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_user_errors_are_named() -> None:
    with pytest.raises(ValueError, match="square number"):
        CellLabels(CELLS[:3], {})
    with pytest.raises(ValueError, match="expected \\['colour'\\]"):
        CellLabels(CELLS, {"colour": COLOURS}, {"mark": 0.1})
    with pytest.raises(ValueError, match=r"row0: found 'red' in the ground truth, expected one of \['blue'\]"):
        CellLabels(CELLS, {"colour": ["blue"]})(batch(1))
    with pytest.raises(ValueError, match=r"row0: found the ground truth \[\], expected a 'scene' among it"):
        CellLabels(CELLS, {"colour": COLOURS})(Batch(["row0"], [[]]))


def test_images_of_unequal_sizes_are_seen_whole() -> None:
    method, data, seen = tower(DeiT3Features).eval(), batch(4), []  # whose processor would cut the border off
    pixels = method.tower.pixels
    method.tower.pixels = lambda images, whole: seen.append(pixels(images, whole)) or seen[-1]  # type: ignore[method-assign]
    method.validation_step(data, 0)
    for row, (height, width) in enumerate([(16, 16), (32, 16), (16, 48), (32, 48)]):
        data.images[row] = data.images[row].repeat_interleave(height // 16, dim=1).repeat_interleave(width // 16, dim=2)
    assert method.validation_step(data, 0).scalars.keys() == set(method.makes)
    assert (torch.cat(seen[1:]) - seen[0]).abs().mean() < 0.02  # with a cut 0.07 and more
