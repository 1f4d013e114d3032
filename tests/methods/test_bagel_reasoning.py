"""Reasoning on Bagel: what is written before an image stands before it, six modes of rows, and the loop that refines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from bagel_parts import TRAINED, build, image
from test_interleaved import TEXTS
from thinking_parts import Says
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.backbones.answers import AnswersInTokens, Decoding
from umm_zoo.backbones.mixture_vlm import Context, plan_of
from umm_zoo.backbones.thoughts import Reflects, Thinks, Thought
from umm_zoo.batch import Batch, Task, Turn
from umm_zoo.blocks.sequence_plan import Item, SequencePlan
from umm_zoo.errors import UserError
from umm_zoo.methods.bagel import Bagel
from umm_zoo.methods.packed_rows import ItemDropout, PackedRows
from umm_zoo.methods.reasoning import Reasoner, Refine, told
from umm_zoo.methods.trajectories import MODES, Interleaving
from umm_zoo.outputs import Sampling, Wanted

EXACT: dict[str, float] = {"atol": 1e-10, "rtol": 0}
TURN: dict[str, Any] = {"marker": "", "keep": "turn", "max_new_tokens": 5}
WRITERS = {"reasoner": Says("plan it", **TURN), "reflector": Says("darker", **TURN)}


@cache
def model() -> Bagel:
    return build(reasoning=Interleaving(Reasoner(**TURN), Reasoner(**TURN)))


def rows(*modes: str) -> Batch:
    """A row of each mode, with targets of 12 x 4 and 8 x 8 cells in turn."""
    turns, images, targets, tasks = [], [], [], []
    for place, mode in enumerate(modes):
        half, _, what = mode.partition("_")
        answer, wanted = TEXTS[what]
        improves = half == "improving"
        images += [image(place + 1)] * improves
        targets.append(image(place + 9, *((24, 8), (16, 16))[place % 2]) if wanted else None)
        said = Turn(role="assistant" if answer else "user", text="the text of it")
        turns.append([Turn(role="user", text="<image>\n" * improves + "a red circle"), said])
        tasks.append(Task.EDIT if improves else Task.TEXT_TO_IMAGE)
    counts = [int(mode.startswith("improving")) for mode in modes]
    return Batch(list(modes), turns, images, counts, targets, tasks=tasks)


def items(own: Bagel, batch: Batch, **options: Any) -> list[str]:
    return [item.kind + "*" * item.learnt for item in own.packer.row(batch, 0, True, **options)[0]]


def test_a_row_with_reasoning_is_the_same_in_one_pass_and_behind_kept_keys_and_values() -> None:
    own, batch = build().double(), rows("improving_full")._map(lambda tensor: tensor.double())
    found, images = own.packer.row(batch, 0, True)
    row, noisy, time = PackedRows(), torch.randn(1, 4, 6, 4).double(), torch.tensor([0.3])
    row.add([*found, Item("noise", num_tokens=6)], [*images, None])
    plan = plan_of(own.vlm, row.items)
    packed = own.vlm(plan, own.packed._embedded(plan, row, list(noisy), list(time))[0])
    prompts = replace(batch, conversations=batch.prompts())
    asked, whole = (own.sampling.contexts(one, ["whole"])["whole"] for one in (prompts, batch))
    text = plan_of(own.vlm, [[found[-1]]], asked.next_positions.tolist())
    noise = plan_of(own.vlm, [[Item("noise", num_tokens=6)]], whole.next_positions.tolist())
    begins, ends = asked.real.shape[1], whole.real.shape[1]
    assert_close(read(own, text, asked), packed[:, begins:ends], **EXACT)
    assert_close(read(own, noise, whole, list(own.latents.enter(noisy, time))), packed[:, ends:], **EXACT)


def read(own: Bagel, plan: SequencePlan, context: Context, noise: Sequence[Tensor] = ()) -> Tensor:
    """States of what stands behind a context."""
    mask = context.mask(plan.mask(torch.device("cpu")))
    return own.vlm.stack.read(own.vlm.embed(plan, {"noise": noise}), plan.route, plan.positions, mask, context.cache, keep=False)


def test_thinking_changes_the_context_by_its_own_tokens() -> None:
    own, batch = model(), replace(rows("initial_full"), conversations=[[Turn(role="user", text="a red circle")]])
    thought = Says("It is round.", **TURN)(own, batch, [0])[0]
    plain, more = (own.sampling.contexts(one, ["whole"])["whole"] for one in (batch, told(batch, [thought])))
    added = len(own.vlm.words("It is round.")) + 2
    assert more.next_positions.tolist() == [int(plain.next_positions[0]) + added]
    length = plain.real.shape[1]
    assert more.real.shape[1] == length + added
    for kept, whole in zip(plain.cache.layers, more.cache.layers, strict=True):
        assert_close(whole.keys[:, :, :length], kept.keys, atol=1e-6, rtol=0)
    assert told(batch, [Thought("", "a red circle")]).conversations == batch.conversations


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_its_own_losses_and_the_first_image_none(mode: str) -> None:
    own, batch = model(), rows(mode)
    made = own._run(batch, None)
    text, wanted = TEXTS[mode.partition("_")[2]]
    losses = own.training_losses(batch)
    assert (losses["text_loss"] > 0) == text and (losses["flow"] > 0) == wanted
    assert text or losses["text_loss"] == 0
    assert wanted or (losses["flow"] == 0 and len(made.plan.places["noise"]) == 0)
    assert made.num_tokens.tolist() == [12] * wanted  # of the image to generate, 24 x 8 px
    shown = torch.cat([made.plan.places["clean"], made.plan.places["seen"]])
    assert len(shown) == (16 + 4 if mode.startswith("improving") else 0) and not torch.isin(made.plan.label_places, shown).any()


def test_a_given_text_and_one_to_be_learnt_are_the_same_sequence() -> None:
    own = model()
    plans = [own._run(rows(f"improving_{what}"), None).plan for what in ("full", "generation", "understanding")]
    assert torch.equal(plans[0].token_ids, plans[1].token_ids) and torch.equal(plans[0].positions, plans[1].positions)
    length = plans[2].token_ids.shape[1]  # what is written before an image is written behind the same forms of the first one
    assert torch.equal(plans[0].token_ids[:, :length], plans[2].token_ids) and len(plans[1].labels) == 0


def test_the_modes_weigh_their_rows() -> None:
    names = ["initial_full", "improving_understanding", "improving_full", "initial_generation"]
    weights = {"initial_full": 1.0, "improving_understanding": 0.5, "improving_full": 0.25, "initial_generation": 2.0}
    own, batch = build(reasoning=Interleaving(modes=weights)), rows(*names)
    torch.manual_seed(5)
    made = own._run(batch, own.dropout)
    torch.manual_seed(5)
    losses = own.training_losses(batch)
    words = torch.tensor([1.0, 0.5, 0.25]).repeat_interleave(len(own.vlm.words("the text of it")) + 1)
    assert_close(losses["text_loss"], (words * made.nll).mean())
    flow = torch.tensor([1.0, 0.25, 2.0]) * made.terms["loss"] * torch.tensor([12, 12, 16])
    assert made.num_tokens.tolist() == [12, 12, 16]
    assert_close(losses["loss"], 0.25 * losses["text_loss"] + flow.sum() / 40)
    with pytest.raises(UserError, match="initial_understanding"):
        own.check_rows(rows("initial_understanding"), scoring=False)


def test_losses_of_images_of_unequal_sizes_stand_in_the_order_of_their_rows() -> None:
    own, latents = model(), [torch.ones(4, 12, 4), 30 * torch.ones(4, 8, 8), torch.ones(4, 12, 4)]
    noise = [[Item("noise", num_tokens=count)] for count in (12, 16, 12)]
    made = own.packed(PackedRows(noise), latents, own.objective)
    assert made.num_tokens.tolist() == [12, 16, 12] and made.terms["loss"].argmax() == 1


def test_guidance_leaves_out_the_reasoning_with_what_it_is_about() -> None:
    own, first, second = model(), rows("initial_full"), rows("improving_full")
    assert items(own, first) == ["text", "text*"] and items(own, first, context="no_text") == []
    assert items(own, second, context="no_text") == ["clean", "seen"]
    assert items(own, second, context="no_image") == ["text", "text*"]
    turns = [[*first.conversations[0], Turn(role="user", text="<image>"), Turn(role="assistant", text="darker")]]
    whole = replace(second, conversations=turns)
    assert items(own, whole, context="no_text") == ["text", "text*", "clean", "seen"]  # the reflection alone


def test_a_thought_depends_on_its_row_and_seed_alone_and_leaves_its_context() -> None:
    own, batch = model(), rows("initial_generation", "initial_understanding", "initial_generation")
    hot = Reasoner(**TURN, temperature=1.0)
    together = hot(own, batch, [4, 5, 6])
    assert hot(own, batch.select([1]), [5]) == together[1:2] and hot(own, batch.select([1]), [8]) != together[1:2]
    context = own.sampling.contexts(batch, ["whole"])["whole"]
    twice = [[answer.ids for answer in own.vlm.write(context, Decoding(4, 0.0, None))] for _ in range(2)]
    assert twice[0] == twice[1] and context.cache.get_seq_length() == context.real.shape[1]


def test_instructions_stand_before_the_request_also_when_it_is_generated_from() -> None:
    own, batch = model(), replace(rows("initial_full"), conversations=[[Turn(role="user", text="a red circle")]])
    reasoner = Reasoner(**TURN, system="Plan first.")
    assert [turn["role"] for turn in reasoner.asked(batch).conversations[0]] == ["system", "user"]
    asked = told(batch, [reasoner.thought("a red circle", "round")])
    assert [turn["text"] for turn in asked.conversations[0]] == ["Plan first.", "a red circle", "round"]
    assert items(own, asked, context="no_text") == ["text"]


def test_a_missing_marker_falls_back_to_the_prompt_and_is_counted() -> None:
    batch = rows("initial_full", "initial_full")
    plain = model().generate(replace(batch, conversations=batch.prompts()), [3, 4], Sampling(size=(16, 16)))
    for keep in ("rewrite", "turn"):
        silent = Says("It is red.", marker="Revised Prompt:", keep=keep)
        own = build(reasoning=Interleaving(silent))
        thoughts = own.think(batch, [3, 4])
        assert not any(thought.marked for thought in thoughts)
        assert_close(own.generate(told(batch, thoughts), [3, 4], Sampling(size=(16, 16))), plain)
        assert own.validation_step(batch.select([0]), 0).scalars["marked"] == 0
    all_of_it = Reasoner(marker="Revised Prompt:", keep="turn", missing="all").thought("a circle", "It is red.")
    assert (all_of_it.marked, all_of_it.request, all_of_it.reply) == (False, "a circle", "It is red.")


def test_validation_thinks_generates_and_refines() -> None:
    own = build(reasoning=Interleaving(**WRITERS, rounds=Refine(2)))
    batch = replace(rows("initial_full", "improving_full"), targets=[image(9), image(10)])
    own.wanted = Wanted(max_new_tokens=2)
    found = own.validation_step(batch, 0)
    assert found.answers == ["plan it\ndarker\ndarker", "darker"] and found.scalars["marked"] == 1
    assert found.columns is not None and found.generated is not None and {"flow", "text_loss", "ended"} <= set(found.scalars)
    assert {*found.scalars, "columns"} <= set(own.makes)
    plain = replace(batch, conversations=batch.prompts())  # rows without a text are generated as they are
    assert own.validation_step(plain, 0).answers == ["", ""]
    expected = own.generate(told(plain.select([1]), own.reflect(plain.select([1]), [0])), [0], Sampling(size=(16, 16)))
    assert not torch.equal(expected[0], own.generate(plain.select([1]), [0], Sampling(size=(16, 16)))[0])


def test_what_it_can() -> None:
    own, silent = model(), build()
    assert all(isinstance(own, capability) for capability in (Thinks, Reflects, AnswersInTokens)) and own.refuses == frozenset()
    assert silent.refuses == {"think", "refine"}
    for call in (silent.think, silent.reflect):
        with pytest.raises(UserError, match=r"method\.reasoning"):
            call(rows("initial_full"), [0])
    with pytest.raises(UserError, match="without a reflector"):
        Interleaving(rounds=Refine())


def test_every_part_gets_a_gradient_from_rows_of_any_mode() -> None:
    own = build(dropout=ItemDropout(0, 0, 0), reasoning=Interleaving(**WRITERS))
    own.train_only(TRAINED)
    own.training_losses(rows("improving_understanding"))["loss"].backward()
    assert all(p.grad is not None for p in own.parameters() if p.requires_grad)
