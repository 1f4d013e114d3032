"""Interleaved reasoning on a bridge: six modes of rows, what each trains, and the loop of thinking, generating and reflecting."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from bridge_parts import tiny_vlm, wemmu
from thinking_parts import Says as Writes
from torch import Tensor
from torch.testing import assert_close

from data_pipelines.generation_tasks import Trajectories
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.thoughts import Reflects, Thinks
from umm_zoo.batch import Batch, Task
from umm_zoo.errors import UserError
from umm_zoo.methods.conditioning import ConditionDropout
from umm_zoo.methods.interleaved import InterleavedTuning
from umm_zoo.methods.reasoning import Reasoner, Refine, words_of
from umm_zoo.methods.reasoning_controls import BestOfTwo, OthersThoughts, Says, WithoutFacts
from umm_zoo.methods.trajectories import MODES, modes_of
from umm_zoo.rewards import Reward
from umm_zoo.shapes import World, make_sample

ALL = {"marker": "", "keep": "all", "max_new_tokens": 4}
TEXTS = {"understanding": (True, False), "generation": (False, True), "full": (True, True)}


def method(trained: tuple[str, ...] = ("adapter", "pathway", "connector", "detail"), **arguments: Any) -> InterleavedTuning:
    bridge = wemmu(dropout=ConditionDropout(text_to_image=0.0))
    settings = {"reasoner": Reasoner(**ALL), "reflector": Reasoner(**ALL, stop="No change needed."), **arguments}  # type: ignore
    own = InterleavedTuning(bridge, LoRA(rank=2, alpha=4.0), **settings)
    own.train_only(list(trained))
    torch.manual_seed(4)
    for parameter in own.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return own


def rows(*modes: str) -> Batch:
    """A row of each mode."""
    random = torch.Generator().manual_seed(1)
    turns, images, counts, targets = [], [], [], []
    for mode in modes:
        half, _, what = mode.partition("_")
        answer, wanted = TEXTS[what]
        counts.append(int(half == "improving"))
        images += [torch.rand(3, 32, 32, generator=random) * 2 - 1] * counts[-1]
        targets.append(torch.rand(3, 8, 8, generator=random) * 2 - 1 if wanted else None)
        said = [{"role": "assistant", "text": f"text of {mode}"}] if answer else []
        turns.append([{"role": "user", "text": "<image>\n" * counts[-1] + "a red circle"}, *said])
    return Batch(list(modes), turns, images, counts, targets)  # type: ignore[arg-type]


def losses(own: InterleavedTuning, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(8)
    return own.training_losses(batch)


def test_a_row_says_its_mode_by_what_it_has() -> None:
    assert modes_of(rows(*MODES)) == list(MODES)
    with pytest.raises(UserError, match="2 input images"):
        modes_of(Batch(["a"], [[{"role": "user", "text": "x"}]], [torch.zeros(3, 8, 8)] * 2, [2], [torch.zeros(3, 8, 8)]))
    with pytest.raises(UserError, match="neither an answer nor"):
        modes_of(Batch(["a"], [[{"role": "user", "text": "x"}]]))


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_its_own_parts(mode: str) -> None:
    own = method()
    losses(own, rows(mode))["loss"].backward()
    parts = own.parts().items()
    touched = {name for name, part in parts if any(p.grad is not None and p.grad.any() for p in part.parameters())}
    text, image = TEXTS[mode.partition("_")[2]]
    detail = {"detail"} if mode.startswith("improving") else set()
    assert touched == ({"adapter"} if text else set()) | ({"pathway", "connector"} | detail if image else set())
    assert all(p.grad is not None for p in own.parameters() if p.requires_grad)  # zeros, for ranks that wait


def test_the_first_image_is_a_condition_and_the_text_stands_in_the_request() -> None:
    own, batch = method(), rows("improving_full", "initial_full", "initial_generation")
    asked = own._asked_with_text(batch)
    assert asked.user_texts() == [
        "<image>\na red circle\ntext of improving_full",
        "a red circle\ntext of initial_full",
        "a red circle",
    ]
    assert asked.tasks == [Task.EDIT, Task.TEXT_TO_IMAGE, Task.TEXT_TO_IMAGE] and not any(asked.answers())


def test_the_losses_are_means_over_tokens_and_images_weighed_by_their_modes() -> None:
    weights = {"initial_full": 1.0, "improving_understanding": 0.5}
    own, batch = method(modes=weights), rows("initial_full", "improving_understanding", "initial_full")
    found = losses(own, batch)
    whole = own.vlm(own.vlm.inputs_of(batch))
    shares = torch.tensor([1.0, 0.5, 1.0]) * whole.nll / whole.num_tokens.sum()
    assert_close(found["text_loss"], shares.sum())
    plain = losses(method(), batch)
    assert_close(found["image_loss"], plain["image_loss"]) and assert_close(plain["text_loss"], whole.loss)
    with pytest.raises(UserError, match="improving_full"):
        own.check_rows(rows("improving_full"), scoring=False)
    with pytest.raises(ValueError, match="modes: found"):
        method(modes={"initial": 1.0})


def test_the_bridge_reads_without_the_adapter() -> None:
    own, batch = method(), rows("initial_generation")
    before = losses(own, batch)["image_loss"]
    with torch.no_grad():
        for parameter in own.adapter.parameters():
            parameter.add_(1.0)
    assert torch.equal(losses(own, batch)["image_loss"], before)
    assert torch.equal(own.generate(batch, [3])[0], own.bridge.generate(batch, [3])[0]) is False
    with own.adapter.disabled():
        assert torch.equal(own.generate(batch, [3])[0], own.bridge.generate(batch, [3])[0])


def test_validation_thinks_generates_and_refines() -> None:
    writes = {"reasoner": Writes("plan", **ALL), "reflector": Writes("darker", **ALL)}
    own, batch = method(**writes, rounds=Refine(2)), rows("initial_generation", "initial_generation")
    found = own.eval().validation_step(batch, 0)
    assert found.answers == ["plan\ndarker\ndarker"] * 2 and found.scalars["ended"] == 0
    first = method(**writes).eval().validation_step(batch, 0)
    assert_close(found.columns["first"], first.generated) and not torch.equal(found.generated[0], first.generated[0])
    stops = method(reasoner=writes["reasoner"], reflector=Writes("No change needed.", **ALL, stop="No change needed."))
    improved = stops.eval().validation_step(rows("improving_generation"), 0)
    assert improved.scalars["ended"] == 1 and torch.equal(improved.generated[0], rows("improving_generation").images[0])


def test_what_it_can() -> None:
    own = method()
    assert isinstance(own, Thinks) and isinstance(own, Reflects)
    with pytest.raises(UserError, match="language_model"):
        method(("language_model",))


def test_the_better_of_two_first_images_is_taken_by_a_reward() -> None:
    class Row(Reward):
        def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
            return torch.tensor([0.0, 1.0, 1.0, 1.0])  # the second one is better in the first row, and as good in the second

    writes, batch = {"reasoner": Writes("plan", **ALL)}, rows("initial_generation", "initial_generation")
    found = method(**writes, rounds=BestOfTwo(Row())).eval().validation_step(batch, 0)
    first = method(**writes).eval().validation_step(batch, 0)
    assert not torch.equal(found.generated[0], first.generated[0]) and torch.equal(found.generated[1], first.generated[1])


# -- data --------------------------------------------------------------------------------------------------------------------


def members(index: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    sample = make_sample(World(), 0, "train", "refinements", index)
    made = {name: value for name, value in sample.members(World()).items() if name != "__key__"}
    return {**made, "json": json.dumps(made["json"]).encode()}, sample.row


@pytest.mark.parametrize("mode", MODES)
def test_a_trajectory_becomes_a_row_of_each_mode(mode: str) -> None:
    shards, row = members(0)
    sample = Trajectories(mode)("a", dict(shards))  # type: ignore[arg-type]
    improves, (answer, wanted) = mode.startswith("improving"), TEXTS[mode.partition("_")[2]]
    text = row["reflection" if improves else "thinking"]
    roles = ["user", "assistant" if answer else "user"]
    assert [turn["role"] for turn in sample.conversation] == roles and sample.task is (
        Task.EDIT if improves else Task.TEXT_TO_IMAGE
    )
    assert [turn["text"] for turn in sample.conversation] == ["<image>\n" * improves + row["prompt"], text]
    assert sample.images == [shards["0.png"]] * improves
    assert words_of(Batch(["a"], [sample.conversation])) == [row["prompt"] if answer else f"{row['prompt']}\n{text}"]
    assert sample.target == (None if not wanted else shards["target.png" if improves else "0.png"])
    assert sample.meta["target_scene"] == row["target_scene" if improves or not wanted else "scene"] or not wanted
    names = Trajectories(mode).image_names(["0.png", "json", "target.png"])  # type: ignore[arg-type]
    assert names == (["0.png"] * improves, None if not wanted else "target.png" if improves else "0.png")


def test_the_first_image_may_be_left_to_the_second_ones_place() -> None:
    shards, row = members(0)
    sample = Trajectories("initial_full", initial="second")("a", shards)
    assert sample.target == shards["target.png"] and sample.meta["target_scene"] == row["target_scene"]
    assert members(3)[1]["reflection"] == "No change needed." and members(3)[0]["0.png"] == members(3)[0]["target.png"]


# -- controls ----------------------------------------------------------------------------------------------------------------


def test_controls_say_something_else_of_the_same_form() -> None:
    model, batch = tiny_vlm(), rows("initial_generation", "initial_generation", "initial_generation")

    class Numbers(Reasoner):
        def __call__(self, vlm: Any, batch: Batch, seeds: Any) -> Any:
            return self.thoughts(batch, [f"It is {k}. Revised Prompt:\na very large blue square {k}" for k in range(len(batch))])

    own = Numbers()
    others = OthersThoughts(own)(model, batch, [0, 0, 0])
    assert [thought.request[-1] for thought in others] == ["1", "2", "0"]
    filled = WithoutFacts(own)(model, batch, [0, 0, 0])
    assert {thought.request for thought in filled} == {"a red circle; there is no fruit"}
    assert Says(own, "Revised Prompt: x")(model, batch, [0, 0, 0])[2].request == "x"
    with pytest.raises(ValueError, match="filler"):
        WithoutFacts(own, "")
    with pytest.raises(UserError, match="one row"):
        OthersThoughts(own)(model, batch.select([0]), [0])
