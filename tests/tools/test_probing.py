import pytest
import torch

from tools import probing
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.batch import Batch

CELLS = ["top left", "top right", "bottom left", "bottom right"]


def batch(rows: int = 200, informative: bool = True) -> Batch:
    """A red or green square in one cell; the background is dark or light."""
    generator = torch.Generator().manual_seed(0)
    images, meta = torch.zeros(rows, 3, 8, 8), []
    for row in range(rows):
        colour, cell, light = torch.randint(2, (3,), generator=generator).tolist()
        images[row] += 0.5 * light
        if informative:
            images[row, colour, :4, cell * 4 : cell * 4 + 4] = -1.0
        objects = [{"cell": CELLS[cell], "colour": ["red", "green"][colour], "jitter": [0, 0]}]
        meta.append({"scene": {"background": ["dark", "light"][light], "objects": objects}})
    images += 0.05 * torch.randn(images.shape, generator=generator)
    return Batch([f"row{i}" for i in range(rows)], [[] for _ in range(rows)], images, [1] * rows, meta=meta)


def test_pixels_carry_what_is_drawn() -> None:
    result = probing.probe(None, [batch()], "colour", -1, CELLS)
    assert result.linear == result.mlp == 1.0
    assert result.num_test == 50 and result.num_train == 150 and 0.5 <= result.chance < 0.7


def test_what_is_not_drawn_stays_at_chance() -> None:
    result = probing.probe(None, [batch(400, informative=False)], "colour", -1, CELLS)
    assert result.mlp < 0.7


def test_attributes_of_the_scene() -> None:
    assert probing.probe(None, [batch()], "background", -1, CELLS, hidden=0).linear == 1.0


def test_cells_get_their_own_tokens() -> None:
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert probing.cell_features(tokens, (4, 4), 2)[0].tolist() == expected
    assert probing.cell_features(tokens, (4, 4), 3).shape == (1, 9, 1)  # does not divide: averages


def test_encoders_and_codecs_are_read() -> None:
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    tokens, grid = probing.part_features(CLIPVisionFeatures.from_config(vision), torch.zeros(2, 3, 8, 8), -2)
    assert tokens.shape == (2, 4, 8) and tuple(grid) == (2, 2)
    codec = KLCodec.from_config({"latent_channels": 3, "block_out_channels": [8], "norm_num_groups": 4})
    latents, grid = probing.part_features(codec, torch.zeros(2, 3, 8, 8), -1)
    assert latents.shape == (2, 64, 3) and grid == (8, 8)


def test_the_same_probe_twice_gives_the_same_number() -> None:
    data = [batch(120)]
    first, second = (probing.probe(None, data, "colour", -1, CELLS, steps=50) for _ in range(2))
    assert first == second


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="found 'color', expected \\['background', 'cell', 'colour'\\]"):
        probing.probe(None, [batch()], "color", -1, CELLS)
    with pytest.raises(ValueError, match="expected 40 or more"):
        probing.probe(None, [batch(10)], "colour", -1, CELLS)
