"""Two processes with uneven rows must give what one process gives."""

import pytest
import torch
from torchmetrics import Metric
from values_over_ranks import check_every_rank

from umm_zoo.batch import Batch
from umm_zoo.metrics import (
    BLEU,
    PSNR,
    AnswerAccuracy,
    AttentionBias,
    CIDEr,
    LanguagePrior,
    Means,
    PairedAccuracy,
    Perplexity,
    Retrieval,
    YesNo,
)
from umm_zoo.outputs import Outputs, QueryAttention

pytestmark = pytest.mark.processes

#: Rows of each rank: uneven, and a kind that only one of them sees; the last case leaves a rank without rows.
SPLITS = {"uneven": [range(0, 4), range(4, 19)], "one rank without rows": [range(19), range(0)]}
NUM_ROWS, NUM_FEATURES = 19, 5


def all_metrics() -> dict[str, Metric]:
    return {
        "answers": AnswerAccuracy(),
        "attention": AttentionBias(),
        "bleu": BLEU(smooth=True),
        "cider": CIDEr(),
        "yes_no": YesNo(kinds=["exists"]),
        "means": Means(),
        "paired": PairedAccuracy(),
        "perplexity": Perplexity(),
        "prior": LanguagePrior(),
        "psnr": PSNR(),
        "retrieval": Retrieval(),
    }


def step(rows: range) -> tuple[Outputs, Batch]:
    """The given rows of a fixed set of 19, and what a model makes of them."""
    generator = torch.Generator().manual_seed(1)
    images, targets = (torch.rand(NUM_ROWS, 3, 4, 4, generator=generator) * 2 - 1 for _ in range(2))
    features = torch.randn(2, NUM_ROWS, NUM_FEATURES, generator=generator)
    nll = torch.rand(NUM_ROWS, generator=generator) * 7
    kinds = ["only first rank" if i < 3 else "exists" if i % 2 else "only second rank" for i in range(NUM_ROWS)]
    chosen = list(rows)
    seen = nll[chosen][[i % 3 == 0 for i in chosen]]  # nothing in some batches: a mean that is NaN, counted 0 times
    outputs = Outputs(
        {"loss": nll[chosen].mean(), "mark_accuracy": seen.mean()},
        {"mark_accuracy": len(seen)},
        answers=["yes" if i % 3 else "no" if i % 5 else "perhaps" for i in chosen],
        nll=nll[chosen],
        num_tokens=torch.tensor([1 + i % 4 for i in chosen]),
        generated=images[chosen],
        image_features=features[0, chosen],
        text_features=features[0, chosen] + features[1, chosen],
        attention=QueryAttention(seen.mean(), -seen.mean(), len(seen)),
    )
    batch = Batch(
        keys=[f"toy/0:{i}" for i in chosen],
        conversations=[
            [{"role": "user", "text": f"question {i % 6}"}, {"role": "assistant", "text": "yes" if i % 4 else "no"}] for i in chosen
        ],
        targets=targets[chosen],
        meta=[{"kind": kinds[i], "pair": i % 10, "negative": "random" if i < 9 else "popular"} for i in chosen],
    )
    return outputs, batch


def test_every_rank_has_the_value_of_one_process() -> None:
    expected = check_every_rank(all_metrics, step, SPLITS, NUM_ROWS)
    assert len(expected) > 20
