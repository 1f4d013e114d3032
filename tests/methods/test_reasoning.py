"""Reasoning before an image: what of a text is generated from, the loop that refines, and Think-Then-Generate's two losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from thinking_parts import Says, answers, prompts, thinker
from torch.testing import assert_close
from uae_parts import images, vlm

from umm_zoo.backbones.thoughts import Reflects, Thinks, Thought
from umm_zoo.batch import Batch, Task
from umm_zoo.errors import UserError
from umm_zoo.methods.reasoning import Reasoner, Refine, rewrite_in, told
from umm_zoo.methods.uae.readers import BaseTextReader, RewriteReader
from umm_zoo.outputs import Answers, Draws


@pytest.mark.parametrize(
    ("text", "rewrite"),
    [
        ("It is red. Revised Prompt:\na red circle\non grey", "a red circle\non grey"),
        ("It is red. Revised Prompt: a red circle", "a red circle"),
        ("A Revised Prompt: follows. Revised Prompt:\na red circle", "a red circle"),  # the one that ends its line
        ("a red circle", None),
        ("It is red. Revised Prompt:\n ", None),
    ],
)
def test_the_rewrite_stands_behind_the_marker(text: str, rewrite: str | None) -> None:
    assert rewrite_in(text, "Revised Prompt:") == rewrite
    found = Reasoner().thought("the fruit of tree B", text)
    assert found == Thought(text, rewrite or "the fruit of tree B", rewrite is not None)
    assert Reasoner(missing="all").thought("fruit", text).request == (rewrite or text)  # as in the release


def test_all_of_a_text_goes_behind_the_prompt() -> None:
    irg = Reasoner(marker="", keep="all", stop="No change needed.")
    assert irg.thought("a red circle", "It is blue.") == Thought("It is blue.", "a red circle\nIt is blue.")
    assert irg.thought("a red circle", "no change needed").ends and not irg.thought("a red circle", "").ends


def test_a_rewrite_needs_a_marker_and_a_question_a_place() -> None:
    for arguments in ({"marker": ""}, {"prompt": "Think."}, {"prompt": "{} {}"}):
        with pytest.raises(ValueError, match="Reasoner"):
            Reasoner(**arguments)


def test_a_question_keeps_the_images_before_the_users_words() -> None:
    rows = Batch(["a"], [[{"role": "user", "text": "<image>\n<image>\nthe fruit"}]], images(2), [2])
    asked = Reasoner("Think about: {}.").asked(rows)
    assert asked.conversations == [[{"role": "user", "text": "<image>\n<image>\nThink about: the fruit."}]]
    assert told(asked, [Thought("", "a <image> circle")]).user_texts() == ["<image>\n<image>\na  circle"]


def test_a_thought_depends_on_its_row_and_seed_alone() -> None:
    model, rows = vlm().eval(), prompts("a red circle", "the fruit of tree B", "nothing")
    hot = Reasoner(max_new_tokens=6, temperature=1.0)
    together = hot(model, rows, [4, 5, 6])
    assert hot(model, rows.select([1]), [5]) == together[1:2]
    assert hot(model, rows.select([1]), [7]) != together[1:2]
    assert Reasoner(max_new_tokens=6)(model, rows, [4, 5, 6]) == Reasoner(max_new_tokens=6)(model, rows, [0, 0, 0])


# -- rounds ------------------------------------------------------------------------------------------------------------------


class Darker:
    """Says a row's words until its image is dark, and makes it darker by the seed."""

    def reflect(self, batch: Batch, seeds: list[int]) -> list[Thought]:
        means = [float(image.mean()) for image in batch.images]
        return [Thought(f"{mean:.1f}", "darker", ends=mean < 0) for mean in means]

    def generate(self, batch: Batch, seeds: list[int], sampling: object = None) -> list[torch.Tensor]:
        assert batch.user_texts() == ["<image>\ndarker"] * len(batch) and batch.tasks == [Task.EDIT] * len(batch)
        return [image - 0.1 * seed for image, seed in zip(batch.images, seeds, strict=True)]


def test_every_row_is_refined_until_nothing_is_left_to_do() -> None:
    shown = [torch.full((3, 4, 4), 0.14), torch.full((3, 8, 4), 0.12), torch.full((3, 4, 4), -1.0)]
    rows = Batch(list("abc"), [[{"role": "user", "text": "<image>\nx"}]] * 3, shown, [1] * 3, tasks=[Task.EDIT] * 3)
    found = Refine(3)(Darker(), rows, [1, 2, 3])
    assert [[own.thought.text for own in one] for one in found] == [["0.1", "0.0", "-0.1"], ["0.1", "-0.1"], ["-1.0"]]
    assert [[own.image is None for own in one] for one in found] == [[False, False, True], [False, True], [True]]
    assert_close(found[0][1].image, torch.full((3, 4, 4), -0.06))
    assert len(Refine(1)(Darker(), rows, [1, 2, 3])[0]) == 1
    with pytest.raises(UserError, match="2 input images"):
        Refine()(Darker(), Batch(["a"], [[{"role": "user", "text": "x"}]], shown[:2], [2]), [0])


# -- Think-Then-Generate -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_reader_of_rewrites_leaves_out_what_stands_before_them() -> None:
    model, texts = vlm().eval(), ["a red circle", "blue"]
    whole, own = BaseTextReader("user")(model, texts, None), RewriteReader()(model, texts, None)
    opening = len(model.tokenizer("<|im_start|>user\n")["input_ids"])
    lengths = [len(model.tokenizer(f"{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]) for text in texts]
    assert own.mask.sum(1).tolist() == lengths and whole.mask.sum(1).tolist() == [length + opening for length in lengths]
    for row, length in enumerate(lengths):
        assert_close(own.values[row, -length:], whole.values[row, -length:])
    assert RewriteReader()(model, texts[:1], None).mask is None


def test_each_loss_reaches_its_own_parts() -> None:
    rows, words = prompts("a red circle", "a square"), answers(("fruit?", "a red circle"))

    def touched(batch: Batch) -> set[str]:
        method = thinker()
        torch.nn.init.normal_(method.adapter.layers["model/layers/0/mlp/up_proj"].up)
        method.training_losses(batch)["loss"].backward()
        parts = method.parts().items()
        return {name for name, part in parts if any(p.grad is not None and p.grad.any() for p in part.parameters())}

    assert touched(rows) == {"connector", "decoder"} and touched(words) == {"adapter"}


def test_a_mixed_batch_has_the_mean_of_each_kind_over_its_own_rows() -> None:
    method, words = thinker(), answers(("fruit?", "a red circle"), ("b", "c"))
    rows = prompts("a red circle", "a square")
    turns = [*words.conversations, *rows.conversations]
    both = Batch([*words.keys, *rows.keys], turns, targets=[None, None, *rows.requested])

    def losses(batch: Batch) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return method.training_losses(batch)

    found = losses(both)
    assert_close(found["text_loss"], losses(words)["text_loss"])
    torch.manual_seed(3)
    torch.rand(2)  # of the prompts that are dropped
    expected = method.renderer.losses(rows, method.condition(["a red circle", "a square"]))["loss"]
    assert_close(found["image_loss"], expected)
    assert_close(found["loss"], found["text_loss"] + found["image_loss"])
    assert losses(words)["image_loss"] == 0 and losses(rows)["text_loss"] == 0


def test_rows_that_train_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="an image to generate"):
        thinker(["adapter"]).check_rows(prompts("a"), scoring=False)
    with pytest.raises(UserError, match="a text to answer"):
        thinker(["connector"]).check_rows(answers(("a", "b")), scoring=False)
    thinker(["adapter"]).check_rows(prompts("a"), scoring=True)
    with pytest.raises(UserError, match="vision_tower"):
        thinker(["vision_tower"])


def test_validation_generates_from_the_rewrite_and_counts_missing_markers() -> None:
    rows = prompts("the fruit", "a square")
    for text, marked, shown in (("Red. Revised Prompt:\na red circle", 1.0, "a red circle"), ("Red.", 0.0, None)):
        method = thinker(reasoner=Says(text)).eval()
        with torch.no_grad():
            found = method.validation_step(rows, 0)
            words = [shown or own for own in ("the fruit", "a square")]
            expected = thinker(reasoner=None).eval().validation_step(replace(rows, conversations=prompts(*words).conversations), 0)
        assert found.scalars["marked"] == marked and found.answers == [text] * 2
        assert_close(found.generated, expected.generated)


def test_what_a_thinker_can() -> None:
    method, silent = thinker(), thinker(reasoner=None)
    assert isinstance(method, Answers | Draws) and isinstance(method, Thinks) and not isinstance(method, Reflects)
    assert "think" in silent.refuses and "think" not in method.refuses
    with pytest.raises(UserError, match="reasoner"):
        silent.think(prompts("a"), [0])
