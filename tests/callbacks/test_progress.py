"""The total that the progress bar counts to."""

from types import SimpleNamespace

import pytest

from umm_zoo.callbacks.progress import Progress


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
