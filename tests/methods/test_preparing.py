"""Rows that a method has prepared are those that its steps ask for."""

from dataclasses import replace

import pytest
import torch
from bridge_parts import metaquery, requests, wemmu
from transformers import PreTrainedTokenizerBase

from umm_zoo.batch import Batch, Task
from umm_zoo.methods.conditioning import ConditionDropout


@pytest.fixture
def calls(monkeypatch):
    seen, call = [], PreTrainedTokenizerBase.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "__call__", lambda own, texts, **options: seen.append(texts) or call(own, texts, **options)
    )
    return seen


@pytest.mark.parametrize("make", [wemmu, metaquery])
@pytest.mark.parametrize("scoring", [False, True])
def test_a_bridge_asks_for_no_row_that_was_not_prepared(make, scoring, calls):
    method = make(dropout=ConditionDropout(0.3, 0.3, 0.3, 0.3, 0.3))
    batch = replace(requests(0, 1, 2, 1), tasks=[Task.TEXT_TO_IMAGE, Task.EDIT, Task.COMPOSE, Task.RECONSTRUCT])
    prepare = method.preparation(scoring)
    prepare.take(prepare(batch, []))
    assert len(calls) == 1
    if scoring:
        method.validation_step(batch, 0)
    for seed in range(0 if scoring else 4):
        torch.manual_seed(seed)
        method.encode_prompt(batch, method.dropout(batch.tasks))
    method.check_rows(batch, scoring)
    assert len(calls) == 1


def test_rows_of_a_bridge_that_ask_for_no_image_are_prepared_as_they_are(calls):
    method = metaquery()
    batch = Batch(["a"], [[{"role": "user", "text": "Is it?"}, {"role": "assistant", "text": "yes"}]])
    prepare = method.preparation(scoring=True)
    prepare.take(prepare(batch, []))
    method.validation_step(batch, 0)
    assert len(calls) == 1
