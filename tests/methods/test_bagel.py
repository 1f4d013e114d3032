"""Bagel: losses, what a row depends on, one pass against the sampler's steps, capabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.learning import losses_of
from tests.methods.bagel_parts import TRAINED, build, image, only, rows
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.mixture_vlm import plan_of
from umm_zoo.batch import Batch, Grid, Task, Turn
from umm_zoo.blocks.sequence_plan import Item
from umm_zoo.errors import UserError
from umm_zoo.methods.bagel import Bagel
from umm_zoo.methods.context_steps import ContextSteps
from umm_zoo.methods.packed_pass import Passed
from umm_zoo.methods.packed_rows import ItemDropout, PackedRows
from umm_zoo.objectives.guidance import ContextGuidance
from umm_zoo.outputs import Answers, Draws, Reconstructs, Sampling, Wanted
from umm_zoo.training.recomputation import recompute


def adam(parts: Mapping[str, Sequence[torch.nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.Adam([parameter for own in parts.values() for parameter in own], lr=5e-3)


@cache
def model() -> Bagel:
    return build()


def test_losses_of_words_and_of_latent_tokens_are_a_pencil_s() -> None:
    own = build()
    plan = own._run(rows(), None).plan
    flow = torch.tensor([1.0, 2.0])  # of images of two tokens and of one, whose errors are (2, 0) and (2)
    made = Passed(plan, {"loss": flow}, torch.tensor([2, 1]), torch.tensor([2.0, 4.0]), torch.zeros(()))
    own._run = lambda *_: made  # type: ignore[method-assign]
    assert own.training_losses(rows())["loss"] == pytest.approx(2.08333, abs=1e-5)  # .25 * 3 + 4 / 3


def test_a_row_s_losses_depend_on_no_other_and_on_no_padding() -> None:
    batch, generator = rows(), torch.Generator
    whole = model()._run(batch.select([0, 0, 0]), None)
    assert_close(whole.nll.chunk(3)[1], model()._run(batch.select([0]), None).nll)
    mixed = model()._run(batch, None, generator().manual_seed(3))
    assert_close(mixed.nll, whole.nll.chunk(3)[0])
    alone = model()._run(batch.select([1]), None, generator().manual_seed(3))  # drawn first: the same time and noise
    assert_close(mixed.terms["flow"][0], alone.terms["flow"][0])


def test_units_count_what_losses_are_means_over() -> None:
    made = model()._run(rows(), ItemDropout(1.0, 1.0, 1.0))  # whatever is dropped
    assert model().units(rows()) == {"tokens": len(made.nll), "image_tokens": int(made.num_tokens.sum()), "rows": 4}


def test_the_sampler_s_first_velocity_is_that_of_one_pass() -> None:
    batch, own = only(Task.COMPOSE), build()
    latents = own.codec.target_latents(batch)
    drawn = own.objective.draw(latents[0][None], torch.Generator().manual_seed(4))
    seen: list[torch.Tensor] = []
    own.objective.terms = lambda denoiser, groups, generator: seen.append(denoiser()) or {"loss": torch.zeros(1)}  # type: ignore[method-assign,assignment,func-returns-value]
    own._run(batch, None, torch.Generator().manual_seed(4))
    contexts, noisy = own.sampling.contexts(batch, ["whole"]), (drawn.noisy, drawn.time)
    steps = ContextSteps(own.vlm, own.latents, ContextGuidance.none(), contexts, Grid(*latents[0].shape[-2:]))
    assert_close(steps(*noisy), seen[0], atol=1e-5, rtol=1e-4)


def test_answers_are_the_likeliest_words_of_one_pass() -> None:
    batch = rows().select([0, 0])
    batch = replace(batch, conversations=[batch.conversations[0], [Turn(role="user", text="<image>\nAnd now, what is it?")]])
    said = iter(model().answer(batch, 4))
    for row in range(2):
        context = model().packer.row(batch, row, False, answers=False)
        ids: list[int] = []
        for _ in range(4):  # each word again from nothing
            packed = PackedRows()
            packed.add([*context[0], Item("text", ids, learnt=True)], [*context[1], None])
            ids.append(_next_word(packed))
        assert next(said) == model().vlm._text(ids)


def _next_word(packed: PackedRows) -> int:
    own = model()
    plan = plan_of(own.vlm, packed.items)
    states = own.vlm(plan, own.packed._embedded(plan, packed)[0])
    return int(own.vlm.lm_head(states[0, plan.label_places[-1]]).argmax())


def test_every_item_is_dropped_for_itself_and_answers_and_targets_never() -> None:
    items = [Item("clean", num_tokens=4), Item("seen", num_tokens=4), Item("text", [1]), Item("text", [2], learnt=True)]
    generator, dropout = torch.Generator().manual_seed(0), ItemDropout()
    drawn = torch.tensor([[own.dropped for own in dropout([*items, Item("noise")], generator)] for _ in range(4000)]).double()
    assert_close(drawn.mean(0), torch.tensor([0.3, 0.3, 0.1, 0, 0]).double(), atol=0.03, rtol=0)
    assert abs(float(torch.corrcoef(drawn[:, :2].T)[0, 1])) < 0.05


def test_contexts_leave_out_the_last_words_or_the_images() -> None:
    own, batch = model().packer, only(Task.EDIT)
    kinds = {name: [item.kind for item in own.row(batch, 0, True, name)[0]] for name in ("whole", "no_text", "no_image")}  # type: ignore[arg-type]
    assert kinds == {"whole": ["clean", "seen", "text"], "no_text": ["clean", "seen"], "no_image": ["text"]}


def test_reconstructions_have_no_words_and_reasoning_is_learnt_before_its_image() -> None:
    own, batch = model().packer, only(Task.EDIT)
    rebuilt = own.row(replace(batch, tasks=[Task.RECONSTRUCT]), 0, True)[0]
    assert [item.kind for item in rebuilt] == ["clean", "seen"]
    thought = replace(batch, conversations=[[*batch.conversations[0], Turn(role="assistant", text="I think.")]])
    assert [item.learnt for item in own.row(thought, 0, True)[0]] == [False, False, False, True]
    assert len(own.row(thought, 0, True, answers=False)[0]) == 3


def test_an_image_depends_on_its_row_and_its_seed_alone() -> None:
    batch = rows().select([1, 2, 3])
    together = model().generate(batch, [5, 6, 7], Sampling(size=(24, 8)))
    for row, seed in enumerate([5, 6, 7]):
        assert_close(together[row], model().generate(batch.select([row]), [seed], Sampling(size=(24, 8)))[0], atol=1e-5, rtol=0)
    again = model().sample(["a small red circle"] * 2, seed=3)
    assert_close(again[1], model().sample(["a small red circle"], seed=4)[0], atol=1e-5, rtol=0)
    assert not torch.equal(again[0], again[1])


def test_guidance_without_images_is_by_the_words_alone() -> None:
    guided = [ContextGuidance(3.0, scale, low=0.0) for scale in (1.0, 1.5)]
    plain, demo = (model().sample(["a circle"], guidance=own) for own in guided)
    assert torch.equal(plain, demo)
    assert not torch.equal(plain, model().sample(["a circle"], guidance=ContextGuidance.none()))


def test_every_part_gets_a_gradient_from_rows_of_any_kind() -> None:
    for batch in (only(Task.QUESTION), only(Task.TEXT_TO_IMAGE), rows()):
        own = build()
        own.train_only(TRAINED)
        own.training_losses(batch)["loss"].backward()
        frozen = set(own.codec.parameters()) | {p for p in own.vlm.vlm.vision_tower.parameters() if not p.requires_grad}
        lost = [name for name, p in own.named_parameters() if p.grad is None and p not in frozen]
        assert lost == []


def test_with_a_frozen_understanding_expert_words_stay_what_they_were() -> None:
    own, batch = build(), rows().select([0, 1])
    own.train_only(["generation_expert", "latent_in", "latent_out", "time_in"], adam)
    before = own._run(batch, None).nll.detach()
    assert losses_of(own, batch.select([1]), 2) and torch.equal(own._run(batch, None).nll, before)


def test_it_learns_words_and_an_image() -> None:
    own, batch = build(), rows().select([0, 1])
    own.train_only(TRAINED, adam)
    losses = losses_of(own, batch, 30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_validation_makes_what_it_says_also_of_images_of_unequal_sizes() -> None:
    own = model()
    own.wanted = Wanted(max_new_tokens=2)
    read, made = own.validation_step(only(Task.QUESTION), 0), own.validation_step(rows().select([1, 2]), 0)
    assert read.num_tokens is not None and read.num_tokens.tolist() == [len(own.vlm.words("It is red.")) + 1]
    assert made.generated is not None and [own.shape[-2:] for own in made.generated] == [(24, 8), (16, 16)]
    assert {*read.scalars, *made.scalars} <= set(own.makes) and made.counts["flow"] == 12 + 16


def test_it_answers_generates_and_reconstructs_in_each_size() -> None:
    assert all(isinstance(model(), capability) for capability in (Answers, Draws, Reconstructs))
    made = model().reconstruct([image(1), image(2)], seed=2)
    assert_close(made[1], model().reconstruct([image(2)], seed=3)[0], atol=1e-5, rtol=0)


def test_one_expert_is_a_model_without_the_other() -> None:
    own = build(experts=1)
    assert "generation_expert" not in own.parts() and own.training_losses(rows())["loss"] > 0
    own.train_only([name for name in TRAINED if name != "generation_expert"])


def test_half_precision_gives_the_losses_of_full_one() -> None:
    batch, seed = rows(), torch.Generator
    whole, half = build(), build().bfloat16()
    narrow = batch._map(lambda tensor: tensor.bfloat16())
    expected = whole._run(batch, None, seed().manual_seed(0)).means()["loss"]
    assert_close(half._run(narrow, None, seed().manual_seed(0)).means()["loss"], expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (replace(rows(), targets=[None, image(1, 14, 8), None, None]), "14 x 8 px"),
        (replace(rows(), targets=[None, image(1, 80, 16), None, None]), "40 x 8 cells"),
        (replace(rows(), image_counts=[2, 0, 0, 2], tasks=rows().tasks), "1 <image> markers"),
    ],
)
def test_rows_that_cannot_be_used_are_user_errors(batch: Batch, found: str) -> None:
    with pytest.raises(UserError, match=found):
        model().check_rows(batch, False)


def test_a_row_that_is_too_long_is_refused() -> None:
    own = build()
    own.vlm.max_length = 20
    with pytest.raises(UserError, match="at most 20"):
        own.packed.context(PackedRows([[Item("text", range(30))]]))


def test_a_request_whose_image_finds_no_room_is_refused_by_its_row() -> None:
    own, texts = build(), ["", "red", "a b c"]
    own.vlm.max_length = len(own.vlm.words("red")) + 2 + 16 + 2  # the image and its marks
    assert own.sample(texts[:2]).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="expected at most") as caught:
        own.sample(texts)
    assert caught.value.row == 2


@pytest.mark.parametrize("asked", [{"size": (0, 16)}, {"size": (16, -4)}, {"num_steps": 0}])
def test_sizes_and_steps_that_no_image_has_are_user_errors(asked: dict) -> None:
    with pytest.raises(UserError, match="expected 1 or more"):
        model().sample(["red"], **asked)


def test_what_encodes_its_images_is_no_model_to_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="given its language model to another network"):
        build().vlm.vlm.save(tmp_path)  # type: ignore[operator]


def test_markers_in_what_a_system_says_are_words() -> None:
    own, batch = model().packer, only(Task.EDIT)
    told = [Turn(role="system", text="You see <image>."), *batch.conversations[0]]
    kinds = [item.kind for item in own.row(replace(batch, conversations=[told]), 0, True)[0]]
    assert kinds == ["text", "clean", "seen", "text"]


def test_layers_that_are_computed_again_have_the_same_gradients() -> None:
    found = []
    for every in (0, 1):
        own = build()
        own.train_only(TRAINED)
        recompute(own, every)
        torch.manual_seed(5)
        own.training_losses(rows())["loss"].backward()
        found.append([p.grad for p in own.parameters() if p.grad is not None])
    assert len(found[0]) > 40 and all(map(torch.equal, *found))


def test_an_adapter_stands_beside_one_expert_alone() -> None:
    own = build()
    own.adapt("generation_expert", LoRA(rank=2, alpha=4.0, targets=["q_proj_moe_gen", "up_proj"]))
    names = {f"layers/{layer}/{name}" for layer in range(2) for name in ("self_attn/q_proj_moe_gen", "mlp_moe_gen/up_proj")}
    assert set(own.adapters["generation_expert"].layers) == names  # type: ignore[arg-type]
    own.train_only(["generation_expert_adapter"])
    own.training_losses(rows())["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in own.parameters())
