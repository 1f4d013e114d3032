"""Parts that torch compiles for training steps: the same numbers and keys, few graphs, and refusals of one line."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toy_parts import Body, Head, Toy

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.batch import Batch, Grid, Tokens
from umm_zoo.blocks.metaquery_connector import MetaQueryConnector
from umm_zoo.errors import UserError
from umm_zoo.training.compilation import Compilation, CompiledParts
from umm_zoo.training.estimate import estimate
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import Built, TrainingSetup

ROWS = Batch(keys=["a", "bb"], conversations=[[], []])


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    trace = logging.getLogger("torch.__trace")
    trace.disabled = True  # pytest would have every graph printed for it
    yield
    trace.disabled = False
    torch._dynamo.reset()


class Bridge(Toy):
    """A toy whose head is a connector of layers."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(Body(4, 8), Head(8))
        self.connector = MetaQueryConnector(8, 8, depth, 2)

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "connector": self.connector}


def made() -> Bridge:
    torch.manual_seed(0)
    method = Bridge()
    method.adapt("connector", LoRA(rank=2, targets=["q_proj"]))
    TrainingSetup(["connector_adapter"], AdamW(lr=0.1), compile=["connector"]).prepare(method)
    nn.init.normal_(method.adapters["connector"].layers[next(iter(method.adapters["connector"].layers))].up)  # type: ignore[index, operator]
    return method


def through(method: Bridge, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The connector's output, and the gradient of the first addition."""
    states = torch.randn(2, sides[0] * sides[1], 8, generator=torch.Generator().manual_seed(1))
    out = method.connector(Tokens(states), Grid(*sides)).values
    gradient = torch.autograd.grad(out.square().sum(), list(method.adapters.parameters())[1])[0]
    return out.detach(), gradient


def test_layers_of_one_part_share_few_graphs_however_many_shapes_there_are() -> None:
    plain, method = made(), made()
    keys = set(method.state_dict())
    Compilation(["connector"], backend="eager").apply(method)
    for sides in ((2, 3), (3, 3), (4, 3), (2, 7)):  # buckets
        for mine, theirs in zip(through(method, sides), through(plain, sides), strict=True):
            torch.testing.assert_close(mine, theirs)
    # at most: a size that is taken for constant, one that changes, and the first layer, which no gradient enters
    assert 0 < counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"]
    assert set(method.state_dict()) == keys and copy.deepcopy(method).connector.connector[0].layers[0]._compiled_call_impl is None


def test_without_gradients_everything_runs_as_it_is() -> None:
    method = made()
    Compilation(["connector"], backend="eager").apply(method)
    with torch.no_grad():
        method.connector(Tokens(torch.randn(2, 6, 8)), Grid(2, 3))
    assert not counters["stats"]


class Reading(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_break_is_one_line_with_its_place() -> None:
    method = Toy(Reading(4, 3), Head(3))
    Compilation(["body"], backend="eager").apply(method)
    with pytest.raises(
        UserError, match=r"training\.compile: found 'body', which does not compile at .*test_compilation\.py:\d+ \("
    ):
        method.training_losses(ROWS)


def test_a_part_that_no_step_runs_is_refused_behind_the_first() -> None:
    callback = CompiledParts(Compilation(["body", "connector"], backend="eager"))
    method = Bridge()
    callback.setup(None, method, "fit")  # type: ignore[arg-type]
    method.training_losses(ROWS)["loss"].backward()
    with pytest.raises(
        UserError, match=r"found 'connector', which no training step runs with gradients, expected parts that learn"
    ):
        callback.on_train_batch_end(None, method)  # type: ignore[arg-type]
    callback.on_train_batch_end(None, method)  # type: ignore[arg-type]


def test_check_refuses_what_its_trial_step_does_not_run() -> None:
    data = SimpleNamespace(batch_size=2, train_dataloader=lambda: [ROWS], transform=None)
    with torch.device("meta"):
        method = Bridge()
    setup = TrainingSetup(["head"], AdamW(lr=0.1), compile=["head", "body", "connector"])
    setup.prepare(method)
    experiment = SimpleNamespace(trainer={}, file="own.yaml")
    with pytest.raises(UserError, match=r"own.yaml: training.compile: found 'connector', which no training step runs with grad"):
        estimate(Built(method, data, {}, {}, setup), experiment, {}, has_data=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["connecter"], "found 'connecter', expected parts of body, connector, head; did you mean 'connector'"),
        (["connector_adapter"], "found 'connector_adapter', expected the part that the adapter stands in"),
        (["body"], "found 'body', which training.offload names too, expected one of the two"),
    ],
)
def test_names_that_cannot_be_compiled_are_refused(names: list[str], said: str) -> None:
    method = Bridge()
    method.adapt("connector", LoRA(rank=2))
    with pytest.raises(UserError, match=said):
        TrainingSetup(["head"], AdamW(lr=0.1), offload=["body"], compile=names).prepare(method)
