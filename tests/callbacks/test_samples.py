"""The sample grid: what is chosen, what is written, what the pixels are."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageFont

from umm_zoo.batch import Batch, Task
from umm_zoo.callbacks.cards import BORDER, LINE, MARGIN, RIGHT, WRONG, Card, draw_cards, legible, resized, wrap
from umm_zoo.callbacks.metrics import MetricCallback
from umm_zoo.callbacks.samples import SampleGrid, card_of
from umm_zoo.generation.tensors import to_pil
from umm_zoo.metrics.rows import RowMetric
from umm_zoo.outputs import Outputs


def batch(kinds: list[str], truths: list[str]) -> Batch:
    return Batch(
        keys=[f"s/0:{i}" for i in range(len(kinds))],
        conversations=[
            [{"role": "user", "text": "<image>\nWhat  is it?"}, {"role": "assistant", "text": truth}] for truth in truths
        ],
        images=torch.linspace(-1, 1, len(kinds))[:, None, None, None].expand(-1, 3, 32, 32),
        image_counts=[1] * len(kinds),
        meta=[{"kind": kind} for kind in kinds],
    )


def fake_trainer(folder: Path, sanity_checking: bool = False) -> SimpleNamespace:
    whose = {"loggers": [], "callbacks": [], "default_root_dir": str(folder), "is_global_zero": True}
    return SimpleNamespace(global_step=42, sanity_checking=sanity_checking, **whose)


def validate(grid: SampleGrid, trainer: SimpleNamespace, *steps: tuple[Outputs, Batch]) -> None:
    grid.on_validation_start(trainer, None)  # type: ignore[arg-type]
    for index, (outputs, rows) in enumerate(steps):
        grid.on_validation_batch_end(trainer, None, outputs, rows, index)  # type: ignore[arg-type]
    grid.on_validation_epoch_end(trainer, None)  # type: ignore[arg-type]


def test_a_grid_of_the_expected_size_is_written_under_the_run_folder(tmp_path: Path) -> None:
    rows = batch(["a"] * 5, ["red"] * 5)
    validate(
        SampleGrid(num_samples=3, image_size=70, cards_per_row=2), fake_trainer(tmp_path), (Outputs(answers=["red"] * 5), rows)
    )
    with Image.open(tmp_path / "samples" / "step-000042.png") as image:
        card = 200 + 2 * (MARGIN + BORDER)  # the text sets the width: 64 pixels of image are less
        assert image.width == MARGIN + 2 * (card + MARGIN)
        assert image.height > 2 * (64 + 3 * 18)


def test_the_same_samples_of_every_kind_in_turn() -> None:
    grid = SampleGrid(num_samples=4)
    trainer = fake_trainer(Path("unused"), sanity_checking=False)
    for index, kinds in enumerate((["a", "a", "a"], ["a", "b", "b"], ["a", "c", "c"])):
        rows = batch(kinds, [f"{index}{row}" for row in range(3)])
        grid.on_validation_batch_end(trainer, None, Outputs(), rows, index)  # type: ignore[arg-type]
    assert [(card.title, card.truth) for card in grid._in_turn()] == [("a", "00"), ("b", "11"), ("c", "21"), ("a", "01")]


def test_nothing_is_written_in_the_sanity_check(tmp_path: Path) -> None:
    validate(SampleGrid(), fake_trainer(tmp_path, sanity_checking=True), (Outputs(answers=["x"]), batch(["a"], ["x"])))
    assert list(tmp_path.iterdir()) == []


def test_a_card_holds_the_texts_and_the_verdict() -> None:
    card = card_of(1, Outputs(answers=["Red.", "blue"]), batch(["a", "a"], ["red", "green"]), title="a")
    assert (card.question, card.answer, card.truth, card.right) == ("What is it?", "blue", "green", False)
    assert list(card.images) == ["input"]


def test_a_generated_image_stands_between_input_and_target() -> None:
    made = torch.zeros(1, 3, 8, 8)
    card = card_of(0, Outputs(generated=made, references=made + 1), batch(["a"], ["x"]), title="a")
    assert list(card.images) == ["input", "generated", "target"]
    assert card.images["target"].getpixel((0, 0)) == (255, 255, 255)


def test_a_row_that_asks_for_an_image_shows_no_answer() -> None:
    rows = batch(["text_to_image", "a"], ["", "red"])
    assert [card_of(row, Outputs(answers=["", ""]), rows, title="a").answer for row in (0, 1)] == [None, ""]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Background: grey; top right: a large blue  square; top left: a small red circle", True),
        ("top left: a small red circle; background: grey", False),
        ("top left: a small blue circle; top right: a large red square; background: grey", False),
        ("top left: a small red circle; top left: a small red circle; top right: a large blue square; background: grey", False),
    ],
    ids=["another order", "one clause less", "colours swapped", "one clause twice"],
)
def test_clauses_of_a_caption_may_stand_in_any_order(answer: str, right: bool) -> None:
    truth = "top left: a small red circle; top right: a large blue square; background: grey"
    assert card_of(0, Outputs(answers=[answer]), batch(["caption_long"], [truth]), title="a").right is right


def test_a_caption_in_free_words_is_neither_right_nor_wrong() -> None:
    rows = replace(batch(["caption"], ["A dog runs ."]), tasks=[Task.CAPTION])
    assert card_of(0, Outputs(answers=["A brown dog ."]), rows, title="caption").right is None
    of_a_table = replace(rows, tasks=[Task.QUESTION], meta=[{"task": "caption"}])
    text = batch(["text"], [" ".join("word" for _ in range(17))])
    assert all(card_of(0, Outputs(answers=["x"]), own, title="").right is None for own in (of_a_table, text))


def test_columns_take_the_place_of_input_and_target() -> None:
    columns = {"original": torch.zeros(1, 3, 8, 8), "round trip": torch.ones(1, 3, 8, 8)}
    card = card_of(0, Outputs(columns=columns), batch(["a"], ["x"]), title="a")
    assert list(card.images) == ["original", "round trip"]
    assert card.right is None


@pytest.mark.parametrize(("right", "colour"), [(True, RIGHT), (False, WRONG)])
def test_the_border_tells_right_from_wrong(right: bool, colour: tuple[int, int, int]) -> None:
    card = Card("a", "q", "x", "y", right, {"input": Image.new("RGB", (32, 32))})
    assert draw_cards([card], 64, 1).getpixel((MARGIN, MARGIN)) == colour


def test_images_become_eight_bit_and_small_ones_keep_hard_pixels() -> None:
    image = to_pil(torch.tensor([-1.0, 1.0, 3.0]).expand(3, 1, 3))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (255, 255, 255), (255, 255, 255)]
    large = resized(image, 10)
    assert large.size == (9, 3)
    assert large.getpixel((2, 2)) == (0, 0, 0) and large.getpixel((3, 0)) == (255, 255, 255)


def test_no_line_is_wider_than_the_card_and_no_letter_is_lost() -> None:
    font = ImageFont.load_default(14)
    text = "a few words and " + "x" * 100
    lines = wrap(text, 90, font, max_lines=50)
    assert max(font.getlength(line) for line in lines) <= 90
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert len(wrap(text, 90, font, max_lines=2)) == 2


def test_letters_that_the_font_lacks_are_told_apart() -> None:
    font = ImageFont.load_default(14)
    assert legible("a dog … ~ «it»", font) == "a dog … ~ «it»"
    assert legible("hund ä 你", font) == r"hund \xe4 \u4f60"
    assert wrap("你好", 500, font) == [r"\u4f60\u597d"]


def test_what_a_row_is_worth_alone_stands_on_its_card(tmp_path: Path) -> None:
    likeness, nothing = RowMetric(), RowMetric()
    likeness.of_rows = {1: {"clip": 83.14, "dino": 9.0}}
    trainer = fake_trainer(tmp_path)
    trainer.callbacks = [MetricCallback({"unified": likeness, "other": nothing})]
    grid = SampleGrid()
    outputs = Outputs(rewards=torch.tensor([0.25, 0.5]))
    grid.on_validation_batch_end(trainer, None, outputs, batch(["a", "a"], ["x", "y"]), 0)  # type: ignore[arg-type]
    assert [card.scores for card in grid._in_turn()] == [["reward: 0.250"], ["unified: clip 83.1, dino 9.0", "reward: 0.500"]]


def test_a_line_more_makes_a_card_taller() -> None:
    card = Card("a", "q", None, "", None, {"input": Image.new("RGB", (32, 32))})
    before = draw_cards([card], 64, 1).height
    card.scores = ["reward: 0.500"]
    assert draw_cards([card], 64, 1).height == before + LINE
