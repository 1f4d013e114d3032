"""Janus's training: both losses against plain passes of the library's model, dropped prompts, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from janus_parts import PARTS, ROWS, method, rows
from learning import losses_of
from torch import Tensor
from torch.testing import assert_close
from values_over_ranks import scored

from umm_zoo.backbones.templates import IGNORE
from umm_zoo.backbones.unified import NullPrompt, PaddedPrompt
from umm_zoo.batch import Batch, Task, stacked
from umm_zoo.errors import UserError
from umm_zoo.methods.janus import Janus
from umm_zoo.methods.requests import request_batch
from umm_zoo.metrics import AnswerAccuracy, Means, Perplexity
from umm_zoo.outputs import Answers, Draws, RefusesRows, Sampling, Wanted
from umm_zoo.training.optimization import AdamW, Constant
from umm_zoo.training.setup import TrainingSetup

IMAGES = [row for row, (_, _, text) in enumerate(ROWS) if text is not None]


def text_sum(own: Janus, batch: Batch, row: int) -> tuple[Tensor, int]:
    """Cross-entropy of a row's answer by the library's own forward pass, and how many tokens it has."""
    whole, images = own.vlm._whole[0], batch.images_of(row)
    inputs = own.vlm.embed([batch.conversations[row]], images, [len(images)])
    count = int((inputs.labels != IGNORE).sum())
    if not count:
        return torch.zeros(()), 0
    pixels = ((stacked(images) + 1) / 2 - own.vlm.image_mean) / own.vlm.image_std if images else None
    return whole(input_ids=inputs.token_ids, pixel_values=pixels, labels=inputs.labels).loss * count, count


def image_sum(own: Janus, ids: Tensor, prompt: list[int]) -> Tensor:
    """Cross-entropy of the image tokens ``[N]`` behind a prompt, of the library's own parts, one row at a time."""
    body = own.vlm._whole[0].model
    words = body.language_model.embed_tokens(torch.tensor([prompt]))
    tokens = body.generation_aligner(body.generation_embeddings(ids[None, :-1]))
    states = body.language_model(inputs_embeds=torch.cat([words, tokens], 1)).last_hidden_state
    return F.cross_entropy(body.generation_head(states[0, len(prompt) - 1 :]), ids, reduction="sum")


def prompt_of(own: Janus, text: str) -> list[int]:
    return own.vlm.image_prompt([text]).token_ids[0].tolist()


def expected_image_loss(own: Janus, batch: Batch, prompt: object = prompt_of) -> Tensor:
    ids = own.vlm.codec.codes(stacked(batch.requested))[..., 0]
    sums = [image_sum(own, row, prompt(own, ROWS[place][2])) for row, place in zip(ids, IMAGES, strict=True)]
    return torch.stack(sums).sum() / ids.numel()


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_losses_are_means_over_answer_tokens_and_over_image_tokens(weight: float) -> None:
    own, batch = method(dropout=0.0, image_weight=weight), rows()
    found = own.training_losses(batch)
    sums, counts = zip(*(text_sum(own, batch, row) for row in range(len(ROWS)) if row not in IMAGES), strict=True)
    text = torch.stack(sums).sum() / sum(counts)
    image = expected_image_loss(own, batch)
    assert counts == (2, 8, 0) or sum(counts) > 8
    assert_close(found["text_loss"], text)
    assert_close(found["image_loss"], image)
    assert_close(found["loss"], text + weight * image)
    assert own.units(batch) == {"tokens": sum(counts), "image_tokens": 3 * 16, "rows": 6}


def test_heads_that_know_nothing_are_logged_beside_the_losses() -> None:
    own = method()
    found = own.training_losses(rows())
    assert float(found["image_loss_uniform"]) == pytest.approx(math.log(20))
    assert float(found["text_loss_uniform"]) == pytest.approx(math.log(1024))
    with torch.no_grad():
        for layer in (own.vlm.image_head, own.vlm.lm_head):
            for parameter in layer.parameters():
                parameter.zero_()
    found = own.training_losses(rows())
    assert_close(found["image_loss"], found["image_loss_uniform"])
    assert_close(found["text_loss"], found["text_loss_uniform"])


def padded(own: Janus, text: str) -> list[int]:
    """What Janus's release puts in the place of a prompt: all but its ends become padding."""
    *others, last = prompt_of(own, text)
    assert own.vlm.tokenizer.bos_token_id is None  # or it would stay
    return [*(own.vlm.pad_id for _ in others), last]


def null(own: Janus, text: str) -> list[int]:
    return prompt_of(own, text)[-1:]


@pytest.mark.parametrize("form, prompt", [(PaddedPrompt(), padded), (NullPrompt(), null)])
def test_dropped_prompts_are_those_that_guidance_starts_from(form: object, prompt: object) -> None:
    own, batch = method(form=form, dropout=1.0), rows()
    assert_close(own.training_losses(batch)["image_loss"], expected_image_loss(own, batch, prompt))
    batch.tasks = [Task.UNCONDITIONAL if has else task for has, task in zip(batch.has_target, batch.tasks, strict=True)]
    own.dropout = 0.0
    assert_close(own.training_losses(batch)["image_loss"], expected_image_loss(own, batch, prompt))


def test_the_share_of_dropped_prompts_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3,000 image rows; three standard errors."""
    own, seen = method(dropout=0.1), []
    monkeypatch.setattr(
        own, "_prompts", lambda chosen, dropped: seen.extend(dropped.tolist()) or own.vlm.image_prompt([""] * len(chosen))
    )
    monkeypatch.setattr(own, "_image_loss", lambda prompts, ids: torch.zeros(()))
    torch.manual_seed(3)
    batch = rows([(0, None, "red")] * 150)
    for _ in range(20):
        own.training_losses(batch)
    assert len(seen) == 3000 and abs(sum(seen) / 3000 - 0.1) < 3 * math.sqrt(0.09 / 3000)


@pytest.mark.parametrize("chosen", [[1, 3, 5], [0, 2, 4]])
def test_a_batch_of_one_kind_has_the_losses_of_its_rows_and_reaches_every_parameter(chosen: list[int]) -> None:
    own = method(dropout=0.0)
    found = own.training_losses(rows().select(chosen))
    whole = own.training_losses(rows())
    here, missing = ("image_loss", "text_loss") if chosen[0] in IMAGES else ("text_loss", "image_loss")
    assert_close(found[here], whole[here])
    assert found[missing] == 0 and found["loss"] == found[here]
    found["loss"].backward()
    reached = {name for name, p in own.named_parameters() if p.grad is not None}
    own.zero_grad()
    whole["loss"].backward()
    assert reached == {name for name, p in own.named_parameters() if p.grad is not None}


STAGES = [PARTS[:4], PARTS[:5], PARTS]


@pytest.mark.parametrize("trained", STAGES)
def test_a_stage_changes_its_parts_and_no_other(trained: list[str]) -> None:
    own = method(trained)
    TrainingSetup(trained, AdamW(lr=1e-2), Constant()).prepare(own)
    own.train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    losses_of(own, rows(), 1)
    changed = {name for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= own.part_keys(trained)
    assert all(any(name in own.part_keys([part]) for name in changed) for part in trained)
    assert not own.vlm.codec.training


def test_it_learns_both_at_once() -> None:
    torch.manual_seed(0)
    own = method(dropout=0.0)
    TrainingSetup(PARTS, AdamW(lr=1e-2), Constant()).prepare(own)
    own.train()
    batch = rows()
    first = {name: float(value) for name, value in own.training_losses(batch).items()}
    losses_of(own, batch, 60)
    last = {name: float(value) for name, value in own.training_losses(batch).items()}
    assert last["text_loss"] < 0.1 * first["text_loss"] and last["image_loss"] < 0.2 * first["image_loss"]


def test_codes_that_were_stored_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own, batch = method(dropout=0.0), rows()
    expected = own.training_losses(batch)["loss"]
    [(name, item)] = own.precomputable().items()
    assert item.per == "target" and item.part is own.vlm.codec and not item.compute(rows().select([0])).numel()
    batch.extras = {name: item.compute(batch)}
    batch.entries = {name: [int(has) for has in batch.has_target]}
    monkeypatch.setattr(own.vlm.codec, "codes", lambda images: pytest.fail("codes were made again"))
    assert_close(own.training_losses(batch)["loss"], expected)
    assert_close(own.training_losses(batch.select([5, 1]))["image_loss"], own.training_losses(batch.select([1, 5]))["image_loss"])


@pytest.mark.parametrize(
    ("codes", "found"),
    [
        (torch.zeros(3, 9, 1), r"\[9, 1\] for an image, expected \[16, 1\]"),
        (torch.zeros(3, 16, 2), r"\[16, 2\]"),
        (torch.full((3, 16, 1), 20), "numbers from 20 to 20, expected 0 or more and below"),
        (torch.full((3, 16, 1), -1), "numbers from -1"),
    ],
)
def test_stored_codes_of_another_codec_are_refused(codes: torch.Tensor, found: str) -> None:
    own, batch = method(), rows()
    batch.extras, batch.entries = {"codes": codes.int()}, {"codes": [int(has) for has in batch.has_target]}
    with pytest.raises(UserError, match=f"extras.codes: found .*{found}"):
        own.check_rows(batch, scoring=False)


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, row, words",
    [
        ([(1, "red", None), (1, None, "red"), (0, None, "red")], 1, "1 input images and one to generate"),
        ([(0, None, "red"), (1, "red", None), (0, None, "red " * 3000)], 2, "at most"),
        ([(0, None, "red"), (0, "red", None), (3, "red " * 300, None)], 2, "max_length"),
    ],
)
def test_rows_that_cannot_be_used_name_themselves(chosen: list, row: int, words: str) -> None:
    own = method()
    assert isinstance(own, RefusesRows)
    own.vlm.max_length = 60
    with pytest.raises(UserError, match=words) as caught:
        own.check_rows(rows(chosen), scoring=False)
    assert caught.value.row == row
    own.vlm.max_length = 2048
    own.check_rows(rows(), scoring=True)


def test_images_of_another_size_than_the_model_generates_are_refused() -> None:
    own, batch = method(), rows()
    batch.targets[IMAGES[-1]] = torch.zeros(3, 8, 16)  # beside others that it takes
    for refuse in (own.training_losses, lambda batch: own.check_rows(batch, scoring=False)):
        with pytest.raises(UserError, match=r"data\.target_size: found 8 x 16 px, expected 8 x 8"):
            refuse(batch)


def test_the_codec_is_never_trained() -> None:
    with pytest.raises(UserError, match=r"training\.trained: found 'codec'"):
        method([*PARTS, "codec"])


# -- validation and use -----------------------------------------------------------------------------------------------------


def test_validation_of_either_kind_gives_what_metrics_read_and_no_row_counts_twice() -> None:
    own, batch = method(dropout=0.7).eval(), rows()
    batch.meta = [{"task": "ask", "kind": "ask"}] * 6
    with_answers, with_images = batch.select([0, 2]), batch.select(IMAGES)
    with torch.no_grad():
        answered, generated = own.validation_step(with_answers, 0), own.validation_step(with_images, 1)
        own.dropout = 0.0
        losses = own.training_losses(batch)
    assert answered.generated is None
    assert stacked(generated.generated).shape == stacked(generated.round_trips).shape == (3, 3, 8, 8)
    assert set(own.makes) >= set(answered.scalars) | {"nll", "num_tokens", "answers", "generated", "round_trips"}
    pairs = [(answered, with_answers), (generated, with_images)]
    means = scored(Means(["text_loss", "image_loss"]), *pairs)
    for name in ("text_loss", "image_loss"):
        assert means[name] == pytest.approx(float(losses[name]), rel=1e-5)
    assert scored(Perplexity(), *pairs)[""] == pytest.approx(float(losses["text_loss"].exp()), rel=1e-5)
    assert scored(AnswerAccuracy(), *pairs) == scored(AnswerAccuracy(), pairs[0])
    assert_close(stacked(generated.round_trips), own.vlm.codec.images(own.vlm.codec.codes(stacked(with_images.requested))))


def test_a_validation_makes_no_more_than_is_wanted() -> None:
    own = method().eval()
    own.wanted = Wanted(max_new_tokens=0, num_generated_batches=1)
    with torch.no_grad():
        assert own.validation_step(rows().select([0, 2]), 0).answers == ["", ""]
        assert own.validation_step(rows().select(IMAGES), 1).generated is None


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_depends_on_its_prompt_and_seed_alone(guidance: float) -> None:
    own = method(guidance=guidance).eval()
    texts, seeds = ["a red circle", "blue"], [4, 9]
    batch = request_batch(texts)
    together = stacked(own.generate(batch, seeds))
    assert isinstance(own, Draws) and isinstance(own, Answers) and together.shape == (2, 3, 8, 8)
    for row, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
        assert_close(own.generate(request_batch([text]), [seed])[0], together[row])
        ids = own.vlm.sample_image(own.vlm.image_prompt([text]), [seed], guidance).ids
        assert_close(own.vlm.codec.images(ids[..., None])[0], together[row])
    assert torch.equal(stacked(own.generate(batch, seeds, Sampling(guidance=1.0))), together) == (guidance == 1.0)
    assert torch.equal(own.sample(texts, seed=4)[0], together[0])


def test_without_a_prompt_guidance_changes_nothing() -> None:
    own = method(form=NullPrompt()).eval()
    batch = request_batch([""])
    assert batch.tasks == [Task.UNCONDITIONAL]
    first, second = (own.generate(batch, [3], Sampling(guidance=scale))[0] for scale in (2.0, 7.0))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "request_, sampling, words",
    [
        (rows([(1, None, "red")]), None, "1 input images, expected none"),
        (request_batch(["red"]), Sampling(num_steps=5), "num_steps: found 5, expected none"),
        (request_batch(["red"]), Sampling(size=(8, 16)), "size: found 8 x 16 px, expected 8 x 8"),
    ],
)
def test_requests_that_image_tokens_cannot_meet_say_so(request_: Batch, sampling: Sampling | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        method().generate(request_, [0], sampling)


def test_answers_do_not_look_at_the_truth() -> None:
    own, batch = method().eval(), rows().select([0, 2])
    found = own.answer(batch, 4)
    batch.conversations[0][-1]["text"] = "quite another thing"
    assert own.answer(batch, 4) == found and len(found) == 2


def test_tokens_are_counted_and_what_stands_in_for_a_kind_of_rows_is_of_no_use():
    own, batch = method(dropout=0.0), rows(ROWS[2:4])
    answer, prompt = own.vlm.inputs_of(batch.select([0])).token_ids.numel(), own.vlm.image_prompt(["red"]).token_ids.numel()
    blank, ids = own.vlm.image_prompt([""]).token_ids.numel(), own.grid.num_cells
    own.training_losses(batch.select([0]))
    assert own.token_counts == {"text": (answer, answer + blank), "image": (0, ids)}
    own.training_losses(batch.select([1]))
    assert own.token_counts["text"].useful == prompt < own.token_counts["text"].computed
    assert own.token_counts["image"] == (ids, ids)
