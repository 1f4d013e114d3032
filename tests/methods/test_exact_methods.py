"""Every method: an optimiser step is the same however its rows are shared out over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import bagel_parts
import forge_parts
import harmon_parts
import janus_parts
import pytest
import torch
import uae_parts
from bridge_parts import metaquery, requests, wemmu
from shared_steps import Step, check_same, keys, over_ranks, shared_out, splits, taken
from test_ross import VARIANTS
from test_ross import build as ross
from thinking_parts import answers, dual, prompts, thinker
from torch import Tensor
from unified_parts import unified_stage

from tests.methods import test_interleaved as interleaved
from tests.methods import test_llava_method as llava
from tests.pretraining import test_autoencoder as autoencoder
from tests.pretraining import test_contrastive as contrastive
from tests.pretraining import test_self_supervised as self_supervised
from tests.pretraining import test_supervised_tower as tower
from tests.pretraining import test_text_to_image as text_to_image
from tests.pretraining import test_tokenizers as tokenizers
from tests.pretraining import test_vision_warmup as warmup
from umm_zoo.backbones.codecs import DCCodec, KLCodec
from umm_zoo.batch import Batch, stacked
from umm_zoo.method import Method
from umm_zoo.methods.conditioning import ConditionDropout
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.rollouts import Rollouts
from umm_zoo.methods.uae.segments import ImageSampling, SegmentWeights
from umm_zoo.objectives.advantages import BatchStandardised, GroupStandardised
from umm_zoo.objectives.contrast import WordSwaps
from umm_zoo.objectives.flow_grpo import FlowGRPO
from umm_zoo.objectives.flow_matching import ContrastiveFlowMatching
from umm_zoo.objectives.grpo import GRPO, ConstantLength, SequenceMean, TokenMean
from umm_zoo.objectives.reduction import ReleasedReduction
from umm_zoo.pretraining.autoencoder import Autoencoder, DecoderTuning


@dataclass
class Case:
    """A method, a batch whose rows differ, and the names of the samples that draws are made for."""

    make: Callable[[], Method]
    rows: Callable[[], Batch]
    names: Callable[[Batch], list[str]] = keys
    side_by_side: bool = False
    tensors: Callable[[Method], dict[str, Tensor]] | None = None

    @cached_property
    def _made(self) -> tuple[Method, Tensor]:
        return self.make(), torch.get_rng_state()

    def step(self, parts: list[Batch]) -> Step:
        method, state = self._made
        method = deepcopy(method)  # building it takes as long as a step
        torch.set_rng_state(state)
        return taken(method, parts, self.names, self.side_by_side, self.tensors)

    @cached_property
    def whole(self) -> Step:
        """The step of all rows in one micro-batch."""
        return self.step([self.rows()])


def talk(*answers: str | None, counts: Sequence[int], size: int, seed: int = 1) -> Batch:
    """Rows with so many images each; a row whose answer is None has no labelled token."""
    images = torch.rand(sum(counts), 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    rows: list[Any] = []
    for answer, count in zip(answers, counts, strict=True):
        rows.append([{"role": "user", "text": "<image>" * count + "\nWhich colour?"}])
        rows[-1] += [] if answer is None else [{"role": "assistant", "text": answer}]
    return Batch([f"row{i}" for i in range(len(rows))], rows, images, list(counts))


def conversations(size: int) -> Batch:
    answers = ["red", "red " * 17, None, "a blue circle", "green", "blue " * 5]
    return talk(*answers, counts=[1, 0, 0, 2, 1, 0], size=size)


def samples_of_ross(released: bool) -> Callable[[Batch], list[str]]:
    def names(batch: Batch) -> list[str]:
        rows = zip(batch.keys, batch.image_counts, strict=True)
        found = [f"{key} {i}" for key, count in rows for i in range(count or int(released))]
        return found or ["flat"]

    return names


def fresh_requests() -> Batch:
    batch = requests(0, 1, 2, 0, 1, 0)
    for row, conversation in enumerate(batch.conversations):
        conversation[0]["text"] += " very" * (row * 3 % 7)
    return batch


def captioned() -> Batch:
    batch = uae_parts.batch(5)
    for row, conversation in enumerate(batch.conversations):
        conversation[1]["text"] = "a small red circle " * (1 + 2 * row % 5)
    return batch


def stirred(method: Any) -> Any:
    """With adapters off zero, so that all of their parameters have a gradient."""
    torch.manual_seed(11)
    with torch.no_grad():
        for part in (method.adapter, method.decoder_adapter):
            for parameter in [] if part is None else part.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return method


class Odd(uae_parts.Redness):
    """The same for all samples of a row with an odd key: nothing to compare there.

    In steps of 1/256: an advantage divides by a small deviation, and would make much of how sums are rounded.
    """

    def score(self, candidates: Tensor, batch: Batch) -> Tensor:
        odd = torch.tensor([int(key[-1]) % 2 for key in batch.keys]).repeat_interleave(len(candidates) // len(batch))
        return super().score(candidates, batch).mul(256).round().div(256).where(odd == 0, 0.25)


def captioner(objective: Callable[[], GRPO], **more: Any) -> Case:
    def make() -> Method:
        return stirred(uae_parts.second_stage(objective=objective(), reward=Odd(), **more))

    return Case(make, captioned, side_by_side=True)


def decoder(objective: Callable[[], FlowGRPO], **more: Any) -> Case:
    def make() -> Method:
        return stirred(uae_parts.third_stage(objective=objective(), reward=Odd(), **more))

    return Case(make, captioned, side_by_side=True)


def unified(objective: Callable[[], GRPO], trained: str = "adapter", **more: Any) -> Case:
    def make() -> Method:
        return stirred(unified_stage([trained], objective=objective(), reward=Odd(), **more))

    return Case(make, captioned, side_by_side=True)


def dual_grpo(objective: Callable[[], GRPO]) -> Case:
    def make() -> Method:
        flow = FlowGRPO(num_steps=3, clip=1e-2, kl_weight=0.1, advantage=GroupStandardised())
        return stirred(dual(objective=objective(), image_objective=flow, text_reward=Odd(), image_reward=Odd()))

    return Case(make, lambda: prompts("a red circle", "a square", "the fruit of tree B", "blue", "two"), side_by_side=True)


def shown(batch: Batch) -> Batch:
    return replace(batch, images=list(torch.rand(stacked(batch.images).shape, generator=torch.Generator().manual_seed(4)) * 2 - 1))


def seeded(make: Callable[[], Method], *trained: str) -> Callable[[], Method]:
    def made() -> Method:
        torch.manual_seed(0)
        method = make()
        if trained:
            method.train_only(list(trained))
        return method.train()

    return made


def codec_statistics(method: Method) -> dict[str, Tensor]:
    return {"scaling": method.codec.scaling, "shift": method.codec.shift}


def tables(method: Method) -> dict[str, Tensor]:
    codec = method.codec
    books = {f"{name} codebook": codec.branch(name).bottleneck.quantizer.stages[0].codebook for name in ("pixel", "semantic")}
    return {"scaling": codec.scaling, "shift": codec.shift, **books}


def half_labelled() -> Batch:
    batch = shown(tower.batch(6))
    return replace(
        batch,
        meta=[
            {"scene": {"background": "dark", "objects": []}} if row in (1, 2, 5) else meta for row, meta in enumerate(batch.meta)
        ],
    )


def of_images(batch: Batch) -> list[str]:
    return [key for key, asks in zip(batch.keys, batch.has_target, strict=True) if asks]


def thoughts_and_images() -> Batch:
    asked, told = prompts("a red circle", "two", "a square"), answers(("fruit of A?", "red " * 5), ("of B?", "blue"))
    turns = [*asked.conversations, *told.conversations]
    return Batch([*asked.keys, *told.keys], turns, targets=[*asked.targets, None, None]).select([0, 3, 1, 4, 2])


def trajectories() -> Batch:
    batch = interleaved.rows(*interleaved.MODES)
    for row, conversation in enumerate(batch.conversations):
        conversation[-1]["text"] += " very" * (row * 3 % 7)
    return batch


#: Texts alone weigh half; all images weigh alike, so that one call of the bridge draws for them.
WEIGHTS = {mode: 0.5 if mode.endswith("understanding") else 1.0 for mode in interleaved.MODES}
DROPOUT = ConditionDropout(text_to_image=0.5, edit_text=0.4, edit_image=0.3)
CASES = {
    "llava": Case(seeded(lambda: llava.method(["projector", "language_model"])), lambda: conversations(8)),
    **{
        f"ross {variant} {reduction}": Case(
            seeded(lambda variant=variant, make=make: ross(*VARIANTS[variant](), reduction=make())),
            lambda: conversations(12),
            samples_of_ross(reduction == "released"),
        )
        for variant in ("r-pixel", "d", "r-teacher")
        for reduction, make in (("images", lambda: None), ("released", ReleasedReduction))
    },
    "bagel": Case(bagel_parts.method, bagel_parts.alike, bagel_parts.names),
    "janus": Case(lambda: janus_parts.method(dropout=0.5, image_weight=0.4), janus_parts.rows),
    "harmon": Case(lambda: harmon_parts.still(dropout=0.5, image_weight=0.4), harmon_parts.rows),
    "metaquery": Case(seeded(lambda: metaquery(dropout=DROPOUT)), fresh_requests),
    "wemmu": Case(seeded(lambda: wemmu(dropout=DROPOUT)), fresh_requests),
    "forge and quench": Case(
        seeded(lambda: forge_parts.method(forge=forge_parts.forge(drop_prompt=0.5), drop_text=0.5)),
        lambda: forge_parts.rows("red", "two blue squares and a star", "a", "three green circles", "blue star"),
    ),
    "thinker": Case(seeded(lambda: thinker(drop_prompt=0.5)), thoughts_and_images, of_images),
    "interleaved": Case(seeded(lambda: interleaved.method(modes=WEIGHTS)), trajectories, of_images),
    "uae stage 1": Case(lambda: uae_parts.first_stage(drop_caption=0.5), captioned),
    "grpo by sequence": captioner(lambda: GRPO(kl_weight=0.0, aggregation=SequenceMean())),
    "grpo by constant": captioner(lambda: GRPO(kl_weight=0.1, aggregation=ConstantLength(5))),
    "grpo in portions": captioner(lambda: GRPO(kl_weight=0.1), rollouts=Rollouts(3, micro_batch=2)),
    "grpo over the batch": captioner(lambda: GRPO(kl_weight=0.0, advantage=BatchStandardised())),
    "flow grpo": decoder(lambda: FlowGRPO(num_steps=3, clip=1e-2)),
    "flow grpo with kl": decoder(lambda: FlowGRPO(num_steps=3, clip=1e-2, kl_weight=0.1, advantage=GroupStandardised())),
    "unified": unified(lambda: GRPO(kl_weight=0.1, aggregation=ConstantLength(5)), guidance=1.5),
    "unified, one sequence": unified(
        lambda: GRPO(kl_weight=0.0, aggregation=TokenMean()),
        "language_model",
        weights=SegmentWeights(concatenated=True),
        captions=CaptionSampling(uae_parts.PROMPT, max_new_tokens=40),
    ),
    "unified, several images": unified(
        lambda: GRPO(kl_weight=0.1, aggregation=SequenceMean()), rollouts=Rollouts(3, micro_batch=4), images=ImageSampling(2)
    ),
    "unified, images alone": unified(lambda: GRPO(kl_weight=0.0), "language_model", segments=["image"]),
    "dual grpo": dual_grpo(lambda: GRPO(kl_weight=0.1, aggregation=ConstantLength(5))),
    "autoencoder": Case(
        seeded(lambda: Autoencoder(KLCodec.from_config(autoencoder.KL)), "codec"),
        lambda: autoencoder.batch(5),
        tensors=codec_statistics,
    ),
    "autoencoder without noise": Case(
        seeded(lambda: Autoencoder(DCCodec.from_config(autoencoder.DC)), "codec"),
        lambda: autoencoder.batch(5),
        tensors=codec_statistics,
    ),
    "decoder tuning": Case(
        seeded(lambda: DecoderTuning(KLCodec.from_config(autoencoder.KL)), "decoder"),
        lambda: autoencoder.batch(5, targets=True),
    ),
    "tokenizer with averages": Case(
        seeded(lambda: tokenizers.dual_token(), "encoder", "branches", "decoder"), lambda: tokenizers.batch(5), tensors=tables
    ),
    "decoder against a discriminator": Case(
        seeded(autoencoder.against_a_discriminator, "decoder", "discriminator"),
        lambda: autoencoder.batch(5),
    ),
    "text to image": Case(
        lambda: text_to_image.text_to_image(drop_text=0.5),
        lambda: text_to_image.batch(["red", "two blue squares and a star", "a", "three green circles", "blue star"]),
    ),
    "supervised tower": Case(lambda: tower.tower(), half_labelled),
    "vision warmup": Case(lambda: warmup.warmup(), lambda: shown(warmup.batch(4))),
    "masked images": Case(lambda: self_supervised.masked(), lambda: shown(self_supervised.batch(5))),
}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_of_any_sizes_take_the_step_of_the_whole(name: str) -> None:
    case = CASES[name]
    whole = case.whole
    assert any(gradient.abs().max() > 1e-4 for gradient in whole[0].values())
    for parts in splits(case.rows(), seed=len(name)):
        check_same(case.step(parts), whole, str([len(part) for part in parts]))


@pytest.mark.parametrize("name", CASES)
def test_rows_that_stand_in_for_bad_ones_weigh_nothing(name: str) -> None:
    case = CASES[name]
    first, second = shared_out(case.rows(), [1, len(case.rows()) - 1])
    check_same(case.step([first, replace(second, stands_in=True), second]), case.whole)


@pytest.mark.processes
@pytest.mark.parametrize(
    "name",
    [
        "llava",
        "bagel",
        "janus",
        "harmon",
        "ross d images",
        "ross r-pixel released",
        "wemmu",
        "thinker",
        "interleaved",
        "forge and quench",
        "grpo by constant",
        "flow grpo",
        "unified",
        "decoder against a discriminator",
        "tokenizer with averages",
    ],
)
def test_two_ranks_with_unequal_shares_take_the_step_of_one(name: str) -> None:
    case = CASES[name]
    rows = case.rows()
    (first, rest), parts = shared_out(rows, [1, len(rows) - 1]), shared_out(rows, [1] * len(rows))
    even = len(rows) // 2 * 2
    whole = case.whole
    shares = [
        ([[first], [rest]], whole),
        ([[rows], [replace(first, stands_in=True)]], whole),
        ([parts[0:even:2], parts[1:even:2]], case.step([rows.select(range(even))])),
    ]
    for steps in over_ranks(case.step, [share for share, _ in shares]):
        for number, (found, (_, expected)) in enumerate(zip(steps, shares, strict=True)):
            check_same(found, expected, f"share {number}")


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_images_without_an_advantage_are_dropped_before_the_mean_and_their_kl_with_them(kl_weight: float) -> None:
    """As in Flow-GRPO's release; rows 1 and 3 have rewards that are all equal."""
    case = decoder(lambda: FlowGRPO(num_steps=3, clip=1e-2, kl_weight=kl_weight, advantage=GroupStandardised()))
    rows = shared_out(captioned(), [1, 1, 1, 1, 1])
    alone = case.step([merged(rows[0], rows[2])])
    beside = case.step([merged(rows[0], rows[1], rows[2], rows[3])])
    check_same((beside[0], {}), (alone[0], {}))
    assert beside[1]["zero_advantage"] == 0.5 and alone[1]["zero_advantage"] == 0
    for name in ("loss", "kl", "clip_fraction", "ratio_spread"):
        assert beside[1][name] == pytest.approx(alone[1][name], abs=1e-6)
    flat = case.step([rows[1]])  # all of them: the step moves nothing
    assert flat[1]["loss"] == flat[1]["kl"] == 0 and not any(gradient.any() for gradient in flat[0].values())


def test_a_caption_without_an_advantage_counts_in_the_mean() -> None:
    case = captioner(lambda: GRPO(kl_weight=0.0))
    rows = shared_out(captioned(), [1, 1, 1, 1, 1])
    alone, beside = case.step([rows[0]]), case.step([merged(rows[0], rows[1])])
    check_same((beside[0], {}), ({name: gradient / 2 for name, gradient in alone[0].items()}, {}))


def merged(*parts: Batch) -> Batch:
    whole, names = captioned(), [key for part in parts for key in part.keys]
    return whole.select([whole.keys.index(name) for name in names])


def test_each_micro_batch_of_a_step_has_rollouts_of_its_own_rows_and_the_next_step_uses_them_again() -> None:
    method = stirred(uae_parts.second_stage(rollouts=Rollouts(3, updates_per_rollout=2)))
    first, later = shared_out(captioned(), [3, 2]), shared_out(captioned(), [1, 4])
    seen = []
    for number, parts in enumerate((first, later, later)):
        method.step.begin(2, method.begin_step(parts), torch.device("cpu"))
        for part in parts:
            with method.step.training():
                losses = method.training_losses(part)
            method.step.add(losses, part.keys)
            seen.append(method.rollout.batch.keys)
            assert ("seconds/caption" in losses) == (number != 1)
            assert losses["clip_fraction"] == 0  # nothing has moved
    assert seen == [part.keys for parts in (first, first, later) for part in parts]


UPDATED = {
    "grpo": captioner(lambda: GRPO(kl_weight=0.1), rollouts=Rollouts(3, updates_per_rollout=2, micro_batch=2)),
    "flow grpo": decoder(
        lambda: FlowGRPO(num_steps=3, clip=1e-2, kl_weight=0.1, advantage=GroupStandardised()),
        rollouts=Rollouts(4, updates_per_rollout=2),
    ),
}


@pytest.mark.parametrize(("name", "rate"), [("grpo", 0.02), ("flow grpo", 0.5)])
def test_several_updates_on_the_same_rollouts_are_those_of_the_whole(name: str, rate: float) -> None:
    """The third step rolls out again, under weights that two updates have moved."""

    def steps(parts: list[Batch]) -> list[Step]:
        method, found = UPDATED[name].make().double(), []  # rounding grows from step to step
        for _ in range(3):
            found.append(taken(method, parts, keys, side_by_side=True))
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter.data -= rate * parameter.grad
                    parameter.grad = None
        return found

    rows = captioned()
    whole = steps([rows])
    assert whole[1][1]["kl"] > 0 and whole[0][1]["reward"] == whole[1][1]["reward"] != whole[2][1]["reward"]
    for number, (one, other) in enumerate(zip(steps(shared_out(rows, [1, 4])), whole, strict=True)):
        check_same(one, other, f"step {number}")


COUPLED = {
    "contrastive": Case(lambda: contrastive.clip(swaps=False), lambda: contrastive.batch(["red", "green", "blue", "red", "blue"])),
    "vicreg": Case(seeded(self_supervised.vicreg), lambda: shown(self_supervised.batch(5))),
    "contrastive flow matching": Case(
        seeded(lambda: wemmu(objective=ContrastiveFlowMatching(weight=0.5))), lambda: fresh_requests().select(range(5))
    ),
}


@pytest.mark.parametrize("words", [["red", "green"], ["red", "blue"], ["blue", "grey"], ["pink", "grey"]])
def test_wins_over_hard_negatives_are_weighed_by_the_rows_that_have_some(words: list[str]) -> None:
    def make() -> Method:
        method = contrastive.clip()
        method.negatives = WordSwaps([words])
        return method

    colours = ["red", "green", "blue", "red", "blue"]
    case = Case(make, lambda: contrastive.batch(colours), names=lambda batch: [])  # two words a group: nothing is drawn
    parts = shared_out(case.rows(), [3, 2])
    wins = [case.step([part])[1]["hard_accuracy"] for part in parts]
    counts = [sum(colour in words for colour in own) for own in (colours[:3], colours[3:])]
    expected = (counts[0] * wins[0] + counts[1] * wins[1]) / max(1, sum(counts))
    assert case.step(parts)[1]["hard_accuracy"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", COUPLED)
def test_rows_that_are_compared_within_their_micro_batch_weigh_alike(name: str) -> None:
    """The step is another one than that of the whole, but the mean over rows of its micro-batches' own."""
    case = COUPLED[name]
    parts = shared_out(case.rows(), [2, 3])
    alone = [case.step([part]) for part in parts]
    gradients = {key: 0.4 * alone[0][0][key] + 0.6 * alone[1][0][key] for key in alone[0][0]}
    terms = {key: 0.4 * alone[0][1][key] + 0.6 * alone[1][1][key] for key in alone[0][1]}
    found, whole = case.step(parts), case.step([case.rows()])
    check_same(found, (gradients, terms))
    assert abs(found[1]["loss"] - whole[1]["loss"]) > 1e-4
    if "flow" in terms:  # the error itself compares nothing
        assert found[1]["flow"] == pytest.approx(whole[1]["flow"], abs=1e-6)
