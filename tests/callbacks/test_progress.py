"""The bar and the lines of a run's progress."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from umm_zoo.batch import Batch
from umm_zoo.callbacks.progress import Progress, ProgressLines, progress_of_run
from umm_zoo.errors import lasting


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "batches", "accumulated", "done", "total"),
    [
        (-1, 800, float("inf"), 1, 12, 800),
        (-1, 800, float("inf"), 4, 48, 3200),
        (-1, 800, 30, 1, 12, 30),
        (2, -1, 30, 4, 12, 30),
        (-1, 20, float("inf"), 1, 36, 44),  # 12 steps of 3 batches, then 8 of one
        (-1, 20, float("inf"), 5, 12, 52),
    ],
)
def test_a_resumed_run_counts_to_the_batches_of_the_whole_run(max_epochs, max_steps, batches, accumulated, done, total):
    bar = Progress()
    bar._trainer = SimpleNamespace(
        max_epochs=max_epochs,
        max_steps=max_steps,
        global_step=12,
        num_training_batches=batches,
        accumulate_grad_batches=accumulated,
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(completed=done)))
        ),
    )
    assert bar.total_train_batches == total


def trainer_at(step: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=400, callback_metrics={"loss": torch.tensor(0.59375)}, is_global_zero=True)


def test_lines_say_step_loss_speed_time_left_and_the_next_validation(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("umm_zoo.callbacks.progress.time.monotonic", lambda: clock[0])
    lines, batch = ProgressLines(every=50, interval=30), Batch(["a"] * 4, [[]] * 4, [torch.zeros(3, 2, 2)] * 4, [1] * 4)
    lines.on_train_start(trainer_at(100), None)
    for step in range(101, 131):
        clock[0] += 1
        if step == 110:  # a validation of two minutes takes nothing from the speed
            lines.on_validation_start(trainer_at(109), None)
            clock[0] += 120
            lines.on_validation_end(trainer_at(109), None)
        lines.on_train_batch_end(trainer_at(step), None, None, batch, 0)
    assert capsys.readouterr().out == "step 130/400, loss 0.5938, 4 images/s, 4 min 30 s left, validation at 150\n"


@pytest.mark.parametrize(
    ("terminal", "encoding", "kind"),
    [(True, "utf-8", Progress), (True, "UTF8", Progress), (True, "ascii", ProgressLines), (False, "utf-8", ProgressLines)],
)
def test_a_bar_is_for_a_terminal_that_can_show_one(terminal, encoding, kind, monkeypatch):
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: terminal, encoding=encoding))
    assert type(progress_of_run(5)) is kind


@pytest.mark.parametrize(("seconds", "words"), [(11.6, "12 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_times_are_said_as_people_do(seconds, words):
    assert lasting(seconds) == words


def test_ranks_beside_the_first_say_nothing(capsys):
    lines = ProgressLines(every=5, interval=0)
    lines.setup(SimpleNamespace(is_global_zero=False), None, "fit")
    lines.on_train_start(trainer_at(0), None)
    trainer = trainer_at(1)
    trainer.is_global_zero = False
    lines.on_train_batch_end(trainer, None, None, None, 0)
    assert capsys.readouterr().out == ""
