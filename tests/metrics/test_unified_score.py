"""Unified-Score and the clauses of captions, from numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from values_over_ranks import scored

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.batch import Batch, Grid
from umm_zoo.metrics.unified_score import UnifiedScore
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.caption_metrics import CaptionClauses, clause_counts


class Corner(FeatureEncoder):
    """The first or the last pixel."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.weight = place, torch.nn.Parameter(torch.ones(()))
        self.width = self.token_width = 3
        self.num_layers, self.grid, self.image_size = 1, Grid(1, 1), 2

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, self.place, self.place] * self.weight

    def tokens(self, images: Tensor, layer: int = -1) -> Tensor:
        return self(images)[:, None]


def image(first: tuple[float, float, float], last: tuple[float, float, float]) -> Tensor:
    made = torch.zeros(3, 2, 2)
    made[:, 0, 0], made[:, 1, 1] = torch.tensor(first), torch.tensor(last)
    return made


RED, GREEN, BOTH = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.5, 0.0)
ORIGINALS = torch.stack([image(RED, RED), image(GREEN, GREEN), image(RED, GREEN)])
PARTS = slice(2), slice(2, None)
GENERATED = torch.stack([image(RED, GREEN), image(RED, GREEN), image(BOTH, GREEN)])


def rows(count: int = 3) -> Batch:
    return Batch([f"row{i}" for i in range(count)], [[] for _ in range(count)], meta=[{"kind": f"kind{i}"} for i in range(count)])


def score(**arguments: object) -> UnifiedScore:
    return UnifiedScore({"first": Corner(0), "last": Corner(1)}, **arguments)


def test_mean_per_encoder_and_their_plain_mean():
    steps = [(Outputs(generated=GENERATED[part], references=ORIGINALS[part]), rows(len(GENERATED[part]))) for part in PARTS]
    first, last = 100 * (1 + 0 + 0.5**0.5) / 3, 100 * (0 + 1 + 1) / 3
    expected = {"first": first, "last": last, "unified": (first + last) / 2}
    assert_close(scored(score(), *steps), expected)


def test_a_image_and_itself_score_100():
    step = Outputs(generated=GENERATED, from_true_captions=ORIGINALS, references=ORIGINALS), rows()
    assert_close(scored(score(images="from_true_captions"), step)["unified"], 100.0)


def test_rows_of_a_kind_only_and_nothing_without_rows():
    metric = score(kinds=["kind1"])
    assert metric.compute() == {}
    values = scored(metric, (Outputs(generated=GENERATED, references=ORIGINALS), rows()))
    assert values["first"] == 0 and values["last"] == 100


def test_no_partner_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="no true images"):
        score().update(Outputs(generated=GENERATED), rows())
    with pytest.raises(ValueError, match=r"found 2 images generated, 3 to compare with, 3 rows"):
        score().update(Outputs(generated=GENERATED[:2], references=ORIGINALS), rows())
    with pytest.raises(ValueError, match="'from_true_captions' among"):
        score(images="from_true_captions").update(Outputs(generated=GENERATED, references=ORIGINALS), rows())
    with pytest.raises(ValueError, match="unified"):
        UnifiedScore({"unified": Corner(0)})


def test_encoders_are_frozen_and_follow_the_metric():
    metric = score()
    assert not any(p.requires_grad for p in metric.parameters())
    assert metric.double().encoders["first"].weight.dtype in (torch.float32, torch.float64)


SCENE = {
    "background": "grey",
    "objects": [
        {"cell": "top left", "size": "small", "colour": "red", "shape": "circle"},
        {"cell": "top right", "size": "large", "colour": "blue", "shape": "square"},
        {"cell": "bottom left", "size": "small", "colour": "green", "shape": "square"},
    ],
}


def test_clauses_of_a_caption():
    caption = "Top left: a small red  circle; top right: a large red square;top left: a small red circle; background: grey"
    counts = clause_counts(caption, SCENE)
    assert counts == (3, 1, 3, 2, 1, 1, 0, 1, 20)


def test_an_empty_caption_mentions_nothing():
    assert clause_counts("", SCENE)[:2] == (0, 0)


def test_rates_over_captions():
    batch = Batch(["a", "b", "c"], [[]] * 3, meta=[{"scene": SCENE}, {"scene": SCENE}, {}])
    texts = ["top left: a small red circle", "top right: a large blue square; bottom left: a small red square", "no scene"]
    found = scored(CaptionClauses(), (Outputs(answers=texts), batch))
    expected = {"precision": 2 / 3, "recall": 2 / 6, "small": 1 / 4, "large": 1 / 2, "faithful": 1 / 2, "background": 0.0}
    assert_close({name: found[name] for name in expected}, expected)
    assert found["mentioned"] == 1.5 and found["words"] == 9


def test_each_row_of_the_last_batch_is_told_alone():
    metric = score(kinds=["kind0", "kind2"])
    metric.update(Outputs(generated=GENERATED, references=ORIGINALS), rows())
    assert_close(metric.of_rows, {0: {"first": 100.0, "last": 0.0}, 2: {"first": 100 * 0.5**0.5, "last": 100.0}})
    metric.update(Outputs(), rows())  # nothing was generated: those of an earlier batch are not taken for its own
    assert metric.of_rows == {}
