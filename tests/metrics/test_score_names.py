"""Names under which scores are logged, known before any of them is computed."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import Metric

from umm_zoo import metrics
from umm_zoo.fit import main as fit
from umm_zoo.metrics.scores import names_of, unknown_score
from umm_zoo.shapes.geneval_metrics import ShapesGenEval


class Silent(Metric):
    """A metric of a user's that says nothing about what it gives."""

    def update(self) -> None: ...

    def compute(self):  # type: ignore[no-untyped-def]
        return torch.tensor(0.0)


RUN = {
    "accuracy": metrics.AnswerAccuracy(),
    "perplexity": metrics.Perplexity(),
    "pairs": metrics.PairedAccuracy(),
    "flow": metrics.Means(names=["flow", "text"]),
    "geneval": ShapesGenEval(),
    "silent": Silent(),
}


@pytest.mark.parametrize(
    "score",
    ["accuracy/overall", "accuracy/top_left", "perplexity", "pairs/single", "flow/text", "geneval/counting", "silent", "silent/x"],
)
def test_a_score_that_a_metric_gives_or_may_give(score: str) -> None:
    assert unknown_score(score, RUN) is None


@pytest.mark.parametrize(
    ("score", "meant"),
    [
        ("accuracy/overal", "accuracy/overall"),
        ("accuracy", "accuracy/*"),
        ("perplexity/mean", "perplexity"),
        ("perplxity", "perplexity"),
        ("pairs/sinlge", "pairs/single"),
        ("flow/flwo", "flow/flow"),
        ("geneval/overal", "geneval/overall"),
        ("zzz", ""),
    ],
)
def test_a_score_that_none_gives(score: str, meant: str) -> None:
    assert unknown_score(score, RUN) == meant


def test_pairs_say_what_they_compute() -> None:
    paired = metrics.PairedAccuracy()
    paired.add_rows([[1] * 20, [1] * 20])
    assert set(paired.compute()) == set(names_of(paired) or ())


MONITOR = "callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: %s}"


@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        ("val/accuracy/overal", "did you mean 'val/accuracy/overall'?"),
        ("val/loss", "found 'val/loss', which nothing logs"),
        ("val_loss", "found 'val_loss', which nothing logs"),
        ("train_loss", "did you mean 'train/loss'?"),
    ],
)
def test_a_monitor_that_nothing_logs_is_refused(monitor: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(["experiments/tiny/llava.yaml", "--check", MONITOR % monitor]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: experiments/tiny/llava.yaml: callbacks.stop.monitor: ") and expected in error


@pytest.mark.parametrize("monitor", ["val/accuracy/overall", "val/accuracy/top_left", "val/perplexity", "train/loss", "loss"])
def test_a_monitor_of_what_is_logged_passes(monitor: str) -> None:
    assert fit(["experiments/tiny/llava.yaml", "--check", MONITOR % monitor]) == 0
