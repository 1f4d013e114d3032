"""Values that no run can have are refused by the check, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipelines.shards.expanding import expand
from data_pipelines.shards.loading import ValidationBatchSampler
from umm_zoo.compare import main as compare
from umm_zoo.errors import UserError
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment
from umm_zoo.experiment.limits import MAX_DEPTH, check_depth
from umm_zoo.fit import main as fit

FILE, CALLBACKS = "experiments/llava/shapes.yaml", "lightning.pytorch.callbacks"

REFUSED = [
    ("seed=-1", "seed: found -1, expected a number from 0 on and up to 4294967295"),
    ("seed=100000000000000000000", "seed: found 1"),
    ("name=.", "name: found '.'"),
    ("name=a/./b", "name: found 'a/./b'"),
    ("vars.weight=.nan", ""),
    ("training.optimizer.lr=.inf", "training.optimizer.lr: found inf, expected a finite number from 0 on"),
    ("training.optimizer.lr=-0.1", "training.optimizer.lr: found -0.1"),
    ("training.optimizer.lr=.nan", "training.optimizer.lr: found nan, expected a number"),
    ("training.optimizer.weight_decay=-1", "weight_decay: found -1"),
    ("training.optimizer.betas=[0.9,1.0]", "training.optimizer.betas[1]: found 1.0, expected a number from 0 on and below 1"),
    ("training.schedule.warmup_ratio=1", "warmup_ratio: found 1"),
    ("training.max_skipped_steps=-1", "max_skipped_steps: found -1"),
    ("data.num_workers=-1", "data.num_workers: found -1, expected a number from 0 on and up to 1024"),
    ("data.num_workers=100000", "data.num_workers: found 100000"),
    ("data.image_size=1000000", "data.image_size: found 1000000"),
    ("data.max_skips=-1", "data.max_skips: found -1"),
    ("data.window=-1", "data.window: found -1"),
    ("data.train.captions.weight=-2", "weight: found -2"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval: found 0, expected a number from 1 on"),
    ("trainer.val_check_interval=0.5", "trainer.val_check_interval: found 0.5, expected a number from 1 on"),
    ("trainer.val_check_interval=801", "found 801, which is above trainer.max_steps 800: nothing would ever be validated"),
    ("trainer.limit_val_batches=0.5", "limit_val_batches: found 0.5, expected a whole number"),
    ("trainer.accumulate_grad_batches=0", "accumulate_grad_batches: found 0"),
    ("trainer.gradient_clip_val=-1", "gradient_clip_val: found -1"),
    ("trainer.devices=0", "trainer.devices: found 0"),
    ("trainer.devices=100000", "trainer.devices: found 100000, expected a number from 1 on and up to 1024"),
    ("data.batch_size=1000000000", "data.batch_size: found 1000000000"),
    ("data.val_batch_size=1000000000", "data.val_batch_size: found 1000000000"),
    ("method.vlm.language_model.num_hidden_layers=-1", "language_model.num_hidden_layers: found -1, expected a number from 1 on"),
    (
        "method.vlm.language_model.num_hidden_layers=1000000",
        "num_hidden_layers: found 1000000, expected a number from 1 on and up to",
    ),
    ("method.vlm.language_model.intermediate_size=0", "language_model.intermediate_size: found 0"),
    ("method.vlm.language_model.vocab_size=-5", "language_model.vocab_size: found -5"),
    ("vars.width=1000000000", "language_model.hidden_size: found 1000000000"),
    (f"method.vlm.{'.'.join('a' * 500)}=1", f"a key of 502 parts, expected at most {MAX_DEPTH}"),
    ("trainer.max_time=00:00:00:00", "expected days:hours:minutes:seconds"),
    ("data.batch_size=true", "data.batch_size: found true (true or false), expected a whole number"),
    ("trainer.fast_dev_run=true", "expected trainer.max_steps=2"),
    ("trainer.fast_dev_run=3", "trainer.fast_dev_run: found 3"),
    ("trainer.barebones=true", "Throughput"),
    ("trainer.limit_test_batches=2", "expected trainer.limit_val_batches"),
    ("trainer.enable_model_summary=true", "expected fit FILE --check"),
    ("trainer.gradient_clip_algorithm=nrom", "expected one of norm, value; did you mean 'norm'?"),
    ("trainer.profiler=simpel", "expected one of simple, advanced, pytorch, xla"),
    ("trainer.deterministic=always", "trainer.deterministic: found 'always'"),
    ("callbacks.a={_target_: lightning.pytorch.callbacks.Timer, duration: '00:00:00:09'}", "expected trainer.max_time"),
    ("trainer.max_time=soon", "expected days:hours:minutes:seconds"),
    (
        "trainer.max_epochs=3",
        "max_epochs: found 3, but the training data has no epochs: it never ends, expected trainer.max_steps",
    ),
    ("trainer.check_val_every_n_epoch=1", "expected trainer.val_check_interval, in optimiser steps"),
    ("trainer.overfit_batches=2", "trainer.overfit_batches: found 2"),
    ("trainer.limit_train_batches=3", "trainer.limit_train_batches: found 3"),
    (
        "callbacks.a={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.1}",
        "expected umm_zoo.training.ema.EMA",
    ),
    (
        "callbacks.a={_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {0: 2}}",
        "accumulate_grad_batches",
    ),
]


def lines_of(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        check(load_experiment(FILE, overrides))
    return error.value.lines()


@pytest.mark.parametrize(("override", "expected"), REFUSED)
def test_a_value_out_of_range_is_one_line(override: str, expected: str) -> None:
    first, *more = lines_of(override)
    assert expected in first and not more


def test_statistics_are_not_synchronised_on_the_cpu() -> None:
    (line,) = lines_of("trainer.sync_batchnorm=true", "trainer.accelerator=cpu")
    assert "trainer.sync_batchnorm: found true on the CPU" in line


def test_processes_on_the_cpu_are_as_many_as_it_can_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    on_cpu = "trainer.accelerator=cpu"
    (line,) = lines_of(on_cpu, "trainer.devices=13")
    assert "trainer.devices: found 13 processes on the CPU, expected at most 12 on this machine" in line
    check(load_experiment(FILE, [on_cpu, "trainer.devices=12"]))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    check(load_experiment(FILE, [on_cpu, "trainer.devices=8"]))


@pytest.mark.parametrize(
    "override", ["seed=4294967295", "training.optimizer.lr=0.0", "trainer.limit_val_batches=0", "trainer.devices=-1"]
)
def test_values_at_the_limits_are_allowed(override: str) -> None:
    check(load_experiment(FILE, [override]))


@pytest.mark.parametrize(
    "text", ["[" * 3000 + "]" * 3000, "{a: " * 100_000, "- " * 3000 + "1", "\n".join(" " * i + "a:" for i in range(3000))]
)
def test_text_nested_too_deep_is_not_parsed(text: str, tmp_path: Any) -> None:
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(UserError, match=f"levels deep, expected at most {MAX_DEPTH} levels"):
        load_experiment(tmp_path / "deep.yaml")


def test_text_of_the_greatest_depth_is_parsed() -> None:
    check_depth("[" * MAX_DEPTH + "]" * MAX_DEPTH, "here")


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_limit_of_validation_batches_keeps_the_same_samples_for_any_number_of_ranks(limit: int | None, ranks: int) -> None:
    def samples(count: int) -> list[int]:
        shares = [ValidationBatchSampler([7, 3, 6], 4, count, rank, limit) for rank in range(count)]
        assert limit is None or all(len(share) <= limit for share in shares)
        return sorted(sample for share in shares for batch in share.batches for sample in batch)

    first = [range(4), range(4, 7), range(7, 10), range(10, 14), range(14, 16)]
    assert samples(ranks) == samples(1) == [sample for batch in first[:limit] for sample in batch]


@pytest.mark.parametrize("pattern", ["a-{0..99999999}.tar", "a-{0..9999}-{0..9999}.tar"])
def test_ranges_of_millions_of_shards_are_not_written_out(pattern: str) -> None:
    with pytest.raises(UserError, match=r"ranges of 100,000,000 names, expected at most 1,000,000 shards"):
        expand(pattern)


def test_a_comparison_of_no_jobs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(["experiments/compare/bridge.yaml", "--jobs", "-2"]) == 2
    assert capsys.readouterr().err == "error: --jobs: found -2, expected 1 or more\n"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.trained=[]", "training.trained: found [], which hold no weights, expected at least one part that does"),
        ("data.train.captions.shards=[]", "data.train.captions: found no shards"),
        ("trainer.devices=3", "data.batch_size: found 32, which 3 ranks x 1 micro-batches"),
        ("ckpt=best", "ckpt: found 'best', but there is no such file"),
    ],
)
def test_the_check_refuses_what_a_run_would_refuse(override: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit([FILE, "--check", override]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert expected in line


def test_the_check_notes_that_nothing_will_be_scored(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit([FILE, "--check", "trainer.limit_val_batches=0"]) == 0
    assert "note: trainer.limit_val_batches is 0: none of the metrics (" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_the_check_refuses_a_file_for_the_run_folders(below: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("")
    assert fit([FILE, "--check", "--runs", f"{tmp_path}/runs{below}"]) == 2
    assert "runs: found a file, expected a folder for the run folders" in capsys.readouterr().err
