"""Rows with and without detail tokens go through a pathway apart, where their padding costs enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.methods.bridge_parts import tiny_vlm
from umm_zoo.batch import Grid
from umm_zoo.blocks.details import Details
from umm_zoo.blocks.pathways import ExpertPathway, FrozenPathway, QueryPathway, apart


@pytest.mark.parametrize(
    ("lengths", "count", "groups"),
    [
        ([4, 0, 2, 0], 6, [[1, 3], [0, 2]]),  # a fifth of all
        ([4, 2, 2, 3], 6, [[0, 1, 2, 3]]),
        ([0, 0], 6, [[0, 1]]),
        ([4, 0, 4, 4], 12, [[0, 1, 2, 3]]),  # a sixteenth
    ],
)
def test_rows_are_apart_where_a_tenth_would_be_padding(lengths, count, groups):
    assert apart(lengths, count) == groups


@pytest.mark.parametrize("make", [ExpertPathway, FrozenPathway])
def test_rows_apart_are_rows_together(make: type[QueryPathway], monkeypatch: pytest.MonkeyPatch):
    pathway: Any = make()
    pathway.attach(tiny_vlm())
    torch.manual_seed(1)
    prefix, queries = pathway.stack.example_prefix(3, 5), torch.randn(3, 6, 32, requires_grad=True)
    images = torch.tensor([[0, 0, 1], [-1, -1, -1], [0, -1, -1]])
    tokens = torch.randn(3, 3, 32).masked_fill(images[..., None] < 0, 0.0).requires_grad_()
    together = Details(tokens, torch.arange(3).expand(3, 3, 3) + 1, images)
    calls, run = [], pathway._run
    monkeypatch.setattr(pathway, "_run", lambda *given: calls.append(given[2].shape[0]) or run(*given))
    found = []
    for details in (together, replace(together, lengths=[3, 0, 1])):
        states = pathway(prefix, details, queries, Grid(2, 3))
        found.append((states, torch.autograd.grad(states.square().sum(), [queries, tokens])))
    assert calls == [3, 1, 2] and found[0][1][1].any()
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_details_of_some_rows_are_no_longer_than_theirs():
    details = Details(torch.randn(3, 4, 2), torch.zeros(3, 3, 4), torch.zeros(3, 4), lengths=[4, 0, 2])
    assert details.select([2, 1]).tokens.equal(details.tokens[[2, 1], :2]) and details.select([2, 1]).lengths == [2, 0]
