"""Equal work of a rollout is done once: equal captions of an image, and images of equal captions from one noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_uae import stir
from torch import Tensor
from torch.testing import assert_close
from uae_parts import Redness, batch, second_stage

from umm_zoo.backbones.equals import distinct
from umm_zoo.backbones.feature_encoder import features_of
from umm_zoo.backbones.generation import Samples
from umm_zoo.methods.uae import captioner_grpo, token_policy
from umm_zoo.methods.uae.rollouts import IndependentNoise, Rollouts, portions_of_equals
from umm_zoo.objectives.grpo import GRPO

#: Of each of 2 x 4 samples, the one that it repeats.
REPEATS = [0, 1, 0, 0, 4, 4, 6, 4]


def repeating(method: Any) -> Any:
    """The method, some of whose captions are the same."""
    sample = method.vlm.sample_from

    def sample_from(*arguments: Any) -> Samples:
        own, rows = sample(*arguments), torch.tensor(REPEATS)
        return replace(own, tokens=own.tokens[rows], mask=own.mask[rows], texts=[own.texts[row] for row in REPEATS])

    method.vlm.sample_from = sample_from
    return method


def stage(monkeypatch: pytest.MonkeyPatch, apart: bool, **arguments: Any) -> Any:
    """The second stage; with every sample for itself where they are ``apart``."""
    if apart:
        monkeypatch.setattr(captioner_grpo, "distinct", lambda items: 2 * (list(range(len(list(items)))),))
        own = portions_of_equals
        monkeypatch.setattr(token_policy, "portions_of_equals", lambda rows, kinds, size: own(rows, rows.tolist(), size))
    method = repeating(second_stage(**{"rollouts": Rollouts(4), **arguments}))
    stir(method)
    torch.manual_seed(3)
    return method


class Counting(Redness):
    def score(self, candidates: list[Tensor], batch: Any) -> Tensor:
        self.count = len(set(map(id, candidates)))
        return super().score(candidates, batch)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_equal_samples_together_are_each_apart(micro_batch, monkeypatch):
    found = []
    for apart in (False, True):
        method = stage(monkeypatch, apart, objective=GRPO(kl_weight=0.1), rollouts=Rollouts(4, micro_batch=micro_batch))
        losses = method.training_losses(batch())
        losses["loss"].backward()
        values = {name: value for name, value in losses.items() if "seconds" not in name}
        found.append((values, method.rollout.rewards, {name: p.grad for name, p in method.adapter.named_parameters()}))
    assert found[0][0]["kl"] > 0 and any(grad.any() for grad in found[0][2].values())
    assert_close(found[0], found[1], atol=3e-5, rtol=1e-3)


def test_equal_samples_are_generated_rewarded_and_scored_once(monkeypatch):
    method = stage(monkeypatch, False, reward=Counting(), objective=GRPO())
    generated, scored = [], []
    make, score = method.renderer.generate, method.vlm.answer_log_probs
    monkeypatch.setattr(method.renderer, "generate", lambda *given: generated.append(len(given[1])) or make(*given))
    monkeypatch.setattr(method.vlm, "answer_log_probs", lambda *given: scored.append(len(given[1])) or score(*given))
    method.training_losses(batch())
    assert generated == [4] and method.reward.count == 4 and scored == [4, 4]  # with and without the adapter
    images = method.rollout.generated
    assert [next(other for other in range(8) if images[other] is image) for image in images] == REPEATS


def test_images_of_equal_captions_from_noise_of_their_own_are_not_the_same(monkeypatch):
    method = stage(monkeypatch, False, reward=Counting(), rollouts=Rollouts(4, noise=IndependentNoise()))
    method.training_losses(batch())
    images = method.rollout.generated
    assert method.reward.count == 8 and not torch.equal(images[0], images[2])


def test_an_image_that_is_there_twice_is_encoded_once():
    sizes, stack = [], torch.rand(3, 3, 4, 4)
    encoder: Any = lambda images: sizes.append(len(images)) or images.flatten(1)  # noqa: E731
    first, other = stack[0], stack[1]
    assert torch.equal(features_of(encoder, [first, other, first]), stack[[0, 1, 0]].flatten(1))
    assert torch.equal(features_of(encoder, stack), stack.flatten(1)) and sizes == [2, 3]


def test_distinct_items_are_the_first_of_their_kind():
    assert distinct("abacb") == ([0, 1, 3], [0, 1, 0, 2, 1])
