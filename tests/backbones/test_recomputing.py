"""What is switched for a time is switched so too where a layer that ran in that time is computed again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.feature_injection import FeatureInjection
from umm_zoo.backbones.recomputing import recomputed
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.batch import Tokens
from umm_zoo.blocks.resampler import PerceiverResampler
from umm_zoo.methods.interleaved import MODES, InterleavedTuning
from umm_zoo.methods.reasoning import Reasoner
from umm_zoo.training.recomputation import recompute

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
from bridge_parts import metaquery
from test_interleaved import ALL, rows
from uae_parts import DECODER, lively

Gradients = dict[str, Tensor]


def gradients(module: nn.Module) -> Gradients:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def stirred(adapter: nn.Module) -> None:
    torch.manual_seed(4)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("on", [True, False])
def test_a_layer_without_its_adapter_is_computed_again_without_it(on: bool) -> None:
    found = []
    for run in (lambda layer, x: layer(x), recomputed):
        torch.manual_seed(0)
        network, adapter, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), LoRA(rank=2, alpha=4.0), torch.randn(2, 3)
        adapter.attach(network)
        stirred(adapter)
        if on:
            made = run(network, x.requires_grad_())
        else:
            with adapter.disabled():
                made = run(network, x.requires_grad_())
        made.square().sum().backward()
        found.append({"x": x.grad, **gradients(adapter)})
    assert len(found[0]) == (3 if on else 1) and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def injected(again: bool) -> Gradients:
    torch.manual_seed(0)
    decoder = lively(StableDiffusion3.from_config({**DECODER, "qk_norm": "rms_norm"}, gradient_checkpointing=again))
    resampler = PerceiverResampler(7, 20, 12, num_queries=3, depth=2, num_heads=2, head_dim=4)
    adapter = FeatureInjection(resampler, zero_values=False)
    adapter.attach(decoder.train().requires_grad_(False))  # type: ignore[arg-type]
    stirred(adapter)
    with adapter.features(torch.randn(2, 9, 7)):
        made = decoder(torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.8]), Tokens(torch.randn(2, 5, 20)))
    made.square().sum().backward()
    return gradients(adapter)


def interleaved(again: bool) -> Gradients:
    torch.manual_seed(0)
    own = InterleavedTuning(metaquery(), LoRA(rank=2, alpha=4.0), Reasoner(**ALL), Reasoner(**ALL))  # type: ignore[arg-type]
    own.train_only(["adapter", "queries", "connector"])
    stirred(own.adapter)
    recompute(own.train(), int(again))
    torch.manual_seed(5)
    own.training_losses(rows(*MODES))["loss"].backward()
    return gradients(own)


@pytest.mark.parametrize("made", [injected, interleaved])
def test_gradients_are_those_of_what_is_kept(made: object) -> None:
    kept, again = (made(own) for own in (False, True))  # type: ignore[operator]
    assert len(kept) > 8 and kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
