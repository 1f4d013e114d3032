"""python -m pytest, from this folder."""

from pathlib import Path

import torch
from my_block import GatedHead

from umm_zoo.batch import Batch, Conversation, Tokens
from umm_zoo.experiment.build import build
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment
from umm_zoo.testing import check_block

EXPERIMENT = load_experiment(Path(__file__).with_name("my_experiment.yaml"))


def test_block_is_one() -> None:
    check_block(GatedHead(8, 3), (Tokens(torch.randn(2, 4, 8)),), output_shape=(2, 3, 2, 2))  # [B, N, D] -> [B, C, h, w]


def test_experiment_passes_the_check() -> None:
    check(EXPERIMENT)


def test_steps_teach_the_head_the_colour() -> None:
    torch.manual_seed(0)
    method = build(EXPERIMENT.method)
    images = [torch.full((3, 32, 32), value) for value in (-0.5, 0.5)]
    turns: Conversation = [{"role": "user", "text": "<image>\nWhat is it?"}, {"role": "assistant", "text": "a square"}]
    batch = Batch(["dark", "bright"], [turns, turns], images=images, image_counts=[1, 1])
    optimizer = torch.optim.AdamW(method.head.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = method.training_losses(batch)["colour_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
