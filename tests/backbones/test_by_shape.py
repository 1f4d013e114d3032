"""Tensors that shapes decide: made once, on the CPU, and fit for training; and positions of rows of text and images."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from umm_zoo.backbones.by_shape import by_shape, triangle
from umm_zoo.backbones.mrope import row_positions
from umm_zoo.batch import Grid

CPU = torch.device("cpu")


def test_made_once_for_each_size_and_type():
    calls = []
    made = by_shape(lambda size, dtype: calls.append((size, dtype)) or torch.ones(size, dtype=dtype))
    found = [made(CPU, size, dtype) for _ in range(3) for size in (2, 3) for dtype in (torch.float32, torch.float64)]
    assert len(calls) == 4 and found[0] is found[4] and found[3].dtype == torch.float64


def test_few_are_kept():
    calls = []
    made = by_shape(lambda size: calls.append(size) or torch.ones(size))
    for size in (*range(100), *range(100)):
        made(CPU, size)
    assert len(calls) == 200


def test_what_inference_made_serves_training():
    made, weight = by_shape(lambda size: torch.arange(size) / size), torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        made(CPU, 3)
    (weight * made(CPU, 3)).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([0, 1 / 3, 2 / 3]))


def test_what_a_trial_without_numbers_made_has_numbers():
    made = by_shape(lambda size: torch.arange(size))
    with FakeTensorMode():
        made(CPU, 3)
    assert made(CPU, 3).tolist() == [0, 1, 2]


def test_on_meta_it_has_a_shape_and_is_not_kept():
    with torch.device("meta"):
        assert triangle(torch.device("meta"), 3).is_meta
        assert triangle(CPU, 5).sum() == 15  # made on the CPU all the same


def test_compiled_it_is_a_part_of_the_graph():
    graphs = []
    run = torch.compile(
        lambda x: x * triangle(x.device, len(x)), backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True
    )
    assert torch.equal(run(torch.ones(7)), torch.ones(7, 7).tril()) and len(graphs) == 1


@pytest.mark.parametrize("library", [Qwen2_5_VLModel, Qwen3VLModel])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_positions_are_the_librarys(library, left):
    rows = [[3, Grid(2, 5), 1, Grid(3, 1), 4], [9], [1, Grid(4, 4)], [2, Grid(2, 5), 6]]  # words, and images among them
    flags = [
        [isinstance(part, Grid) for part in row for _ in range(part.num_cells if isinstance(part, Grid) else part)] for row in rows
    ]
    longest = max(map(len, flags))
    whole = [([None] * (longest - len(own)) + own if left else own + [None] * (longest - len(own))) for own in flags]
    real, shown = (torch.tensor([[test(flag) for flag in own] for own in whole]) for test in (lambda f: f is not None, bool))
    grids = [part for row in rows for part in row if isinstance(part, Grid)]
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)))
    model.get_vision_position_ids = lambda *args, **kwargs: library.get_vision_position_ids(model, *args, **kwargs)
    patches = torch.tensor([[1, 2 * grid.h, 2 * grid.w] for grid in grids])
    expected, _ = library.get_rope_index(model, real.long(), shown.int(), image_grid_thw=patches, attention_mask=real)
    assert torch.equal(row_positions(real, shown, grids), expected)
