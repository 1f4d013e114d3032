"""Janus under the objective of hidden tokens: what it trains, logs and generates."""

from __future__ import annotations

import torch
from janus_parts import PARTS, rows

from tests.backbones.janus_parts import JANUS, spread
from umm_zoo.backbones.masked_janus import MaskedJanus
from umm_zoo.backbones.unified import NullPrompt
from umm_zoo.blocks.masking import CosineUnmasking
from umm_zoo.methods.janus import Janus
from umm_zoo.objectives.tokens import MaskedTokens
from umm_zoo.outputs import Wanted
from umm_zoo.training.optimization import AdamW, Constant
from umm_zoo.training.setup import TrainingSetup


def masked() -> Janus:
    unified = MaskedJanus.from_config(JANUS, unconditional=NullPrompt())
    spread(unified)
    own = Janus(unified, dropout=0.0, guidance=2.0, tokens=MaskedTokens(unmasking=CosineUnmasking(4)))
    own.train_only(PARTS)
    own.wanted = Wanted(max_new_tokens=2)
    return own.train()


def test_every_trained_parameter_is_reached_and_the_loss_falls() -> None:
    own, batch = masked(), rows()
    TrainingSetup(PARTS, AdamW(lr=1e-2), Constant()).prepare(own)
    optimizer = own.configure_optimizers()["optimizer"]
    torch.manual_seed(0)
    losses = []
    for _ in range(40):
        found = own.training_losses(batch)
        optimizer.zero_grad()
        found["loss"].backward()
        assert losses or all(p.grad is not None for p in own.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(found["image_loss"].item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_validation_tells_losses_apart_and_generates_every_time_the_same() -> None:
    own, batch = masked().eval(), rows().select([1, 3, 5])
    first, again = (own.validation_step(batch, 0) for _ in range(2))
    assert set(MaskedTokens.makes) <= set(own.makes) & set(first.scalars)
    assert sum(first.counts[name] for name in MaskedTokens.makes) == 3
    assert first.scalars == again.scalars and torch.equal(torch.stack(first.generated), torch.stack(again.generated))
    answers = own.validation_step(rows().select([0]), 0)
    assert all(answers.counts[name] == 0 for name in MaskedTokens.makes)
