"""MetricCallback inside a real, tiny Lightning run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from toy_parts import OneWeight

from umm_zoo.batch import Batch
from umm_zoo.callbacks import MetricCallback, Validation
from umm_zoo.errors import UserError
from umm_zoo.metrics import AnswerAccuracy, AttentionBias, Perplexity, YesNo
from umm_zoo.outputs import Outputs

ANSWERS = ["red", "blue", "red", "red", "red"]


def rows(indices: list[int]) -> Batch:
    return Batch(
        keys=[f"toy/0:{i}" for i in indices],
        conversations=[[{"role": "user", "text": "?"}, {"role": "assistant", "text": ANSWERS[i]}] for i in indices],
        meta=[{"kind": "colour"} for _ in indices],
    )


class Toy(OneWeight):
    """Answers "red"; each row costs (its index + 1) nats over two tokens."""

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        nll = torch.tensor([float(key.split(":")[1]) + 1 for key in batch.keys])
        return Outputs(answers=["Red"] * len(batch), nll=nll, num_tokens=torch.full((len(batch),), 2))


def loader() -> DataLoader:
    return DataLoader(range(5), batch_size=2, collate_fn=rows)


def trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


EXPECTED = {"val/answers/overall": 4 / 5, "val/answers/colour": 4 / 5, "val/perplexity": 2.718281828459045 ** (15 / 10)}


def test_values_are_logged_in_fit_and_survive_a_second_validation(tmp_path: Path) -> None:
    scores = MetricCallback({"answers": AnswerAccuracy(), "perplexity": Perplexity(), "yes_no": YesNo()}, show_table=False)
    run = trainer(tmp_path, scores, max_epochs=2, enable_checkpointing=False)
    run.fit(Toy(), loader(), loader())
    logged = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("val/")}
    assert logged == pytest.approx(EXPECTED)  # the sanity check is not counted, nor the first validation in the second


def test_values_are_logged_in_validate_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = MetricCallback({"answers": AnswerAccuracy(), "perplexity": Perplexity()})
    run = trainer(tmp_path, scores)
    (result,) = run.validate(Toy(), loader(), verbose=False)
    assert result == pytest.approx(EXPECTED)
    printed = capsys.readouterr().out
    assert "answers/colour" in printed and "0.8" in printed


def test_metrics_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    scores = MetricCallback({"answers": AnswerAccuracy()}, show_table=False)
    run, method = trainer(tmp_path, scores, max_epochs=1), Toy()
    method.train_only(["layer"])
    run.fit(method, loader(), loader())
    run.save_checkpoint(tmp_path / "toy.ckpt")
    saved = torch.load(tmp_path / "toy.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"layer.weight", "layer.bias"}
    assert saved["callbacks"].get("MetricCallback", {}) == {}


def test_something_else_than_outputs_is_refused(tmp_path: Path) -> None:
    class Old(Toy):
        def validation_step(self, batch: Batch, batch_idx: int) -> Any:
            return {"answers": ["Red"] * len(batch)}

    with pytest.raises(UserError, match=r"^method: validation_step of Old returned a dict, expected Outputs$"):
        trainer(tmp_path, MetricCallback({"answers": AnswerAccuracy()})).validate(Old(), loader(), verbose=False)


def test_the_method_learns_what_the_callbacks_want_of_it(tmp_path: Path) -> None:
    scores = MetricCallback({"answers": AnswerAccuracy(), "attention": AttentionBias()}, show_table=False)
    method = Toy()
    trainer(tmp_path, scores, Validation(max_new_tokens=5, num_generated_batches=2)).validate(method, loader(), verbose=False)
    assert method.wanted.on_request == {"attention"} and method.wanted.max_new_tokens == 5
    assert [method.wanted.generates(batch) for batch in (0, 1, 2)] == [True, True, False]


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Validation\.num_generated_batches: found -1"):
        Validation(num_generated_batches=-1)


def test_a_metric_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"metrics\.layer: found a Linear"):
        MetricCallback({"layer": nn.Linear(1, 1)})  # type: ignore[dict-item]
