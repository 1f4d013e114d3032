"""Caption and retrieval metrics against the COCO server's code and values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from values_over_ranks import scored

from umm_zoo.batch import Batch
from umm_zoo.metrics import BLEU, CIDEr, EncodedRetrieval, Retrieval
from umm_zoo.outputs import Outputs

SAID = ["a dog runs on the grass", "A boy on a beach.", "two dogs", "a man in a red shirt climbs a rock wall"]
TRUE = [
    ["a brown dog runs over green grass", "a dog is running on the grass"],
    ["a boy plays on the beach", "a child on a sandy beach", "A boy runs on a beach ."],
    ["two dogs play with a ball in the snow"],
    ["a man climbs a rock", "a climber in a red shirt on a rock wall"],
]


def captions(rows: range, meta: bool = True) -> tuple[Outputs, Batch]:
    conversations = [[{"role": "user", "text": "?"}, {"role": "assistant", "text": TRUE[row][0]}] for row in rows]
    notes = [{"captions": TRUE[row]} if meta else {} for row in rows]
    return Outputs(answers=[SAID[row] for row in rows]), Batch([f"toy/0:{row}" for row in rows], conversations, meta=notes)


def test_cider_is_that_of_the_coco_servers_code_however_rows_fall_into_batches() -> None:
    # pycocoevalcap 1.2, CiderScorer on these captions, split at blanks after `normalise`
    assert scored(CIDEr(), captions(range(4)))[""] == pytest.approx(2.5555422994725907)
    assert scored(CIDEr(), captions(range(1)), captions(range(1, 4)))[""] == pytest.approx(2.5555422994725907)


def test_cider_of_two_images_by_hand() -> None:
    """Every sequence is of one image of two, so all weigh log 2 and it cancels; the four orders give 2/3, 1/2, 0 and 0."""
    batch = Batch(["a", "b"], [[{"role": "assistant", "text": text}] for text in ("one two three", "six")])
    penalty = math.exp(-1 / 72)
    first = 10 / 4 * penalty * (2 / math.sqrt(2 * 3) + 1 / math.sqrt(1 * 2))
    assert scored(CIDEr(), (Outputs(answers=["one two", ""]), batch))[""] == pytest.approx(first / 2)


def test_without_a_list_the_true_answer_is_the_reference_and_rows_without_any_are_left_out() -> None:
    batch = captions(range(4), meta=False)[1]
    perfect = Outputs(answers=[*batch.answers()])
    assert scored(CIDEr(), (perfect, batch))[""] == pytest.approx(10.0)
    assert scored(BLEU(), (perfect, batch))[""] == pytest.approx(1.0)
    silent = Batch(["x"], [[{"role": "user", "text": "?"}]])
    assert math.isnan(scored(BLEU(), (Outputs(answers=["a"]), silent))[""])
    assert math.isnan(scored(CIDEr(), (Outputs(answers=["a"]), silent))[""])


def test_bleu_by_hand() -> None:
    """6 words said, 6 in the nearest reference: 6/6, 3/5, 2/4 and 1/3 of the sequences are in one of the references."""
    truth = {"captions": ["The cat sat on the old mat!", "a cat sat on the mat"]}
    batch = Batch(["a"], [[{"role": "assistant", "text": "-"}]], meta=[truth])
    said = Outputs(answers=["cat sat on the a mat"])
    assert scored(BLEU(), (said, batch))[""] == pytest.approx((1 * (3 / 5) * (2 / 4) * (1 / 3)) ** 0.25)


def test_recall_at_k_shares_places_among_equals() -> None:
    images = torch.eye(4, 6)
    texts = torch.stack([images[0], images[1] + 2 * images[0], images[2], images[2]])  # row 3 is told like row 2
    outputs = Outputs(image_features=images, text_features=texts)
    batch = Batch(list("abcd"), [[]] * 4)
    assert scored(Retrieval(), (outputs, batch))["text_to_image"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert scored(Retrieval(at=2), (outputs, batch))["text_to_image"] == pytest.approx((1 + 1 + 1 + 1 / 3) / 4)


class Pairs(nn.Module):
    """Encoder of images by their first pixel and of texts by their number."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot((images[:, 0, 0, 0] * 10).round().long(), 8).float()

    def encode_text(self, texts: list[str]) -> Tensor:
        return nn.functional.one_hot(torch.tensor([int(text) for text in texts]), 8).float()


def test_captions_and_generated_images_are_judged_by_another_encoder() -> None:
    images = [torch.full((3, 2, 4 + row % 2), row / 10) for row in range(3)]  # of unequal sizes
    turns = [[{"role": "user", "text": f"{row}"}, {"role": "assistant", "text": "unseen"}] for row in range(3)]
    batch = Batch(list("abc"), turns, images=images, image_counts=[1, 1, 1])
    encoder = Pairs()
    found = scored(EncodedRetrieval(encoder), (Outputs(answers=["0", "2", "1"]), batch))
    assert found["text_to_image"] == pytest.approx(1 / 3)
    made = (Outputs(generated=torch.stack([images[row][..., :4] for row in (1, 0, 2)])), batch), (Outputs(), batch)
    assert scored(EncodedRetrieval(encoder, "generated"), *made)["image_to_text"] == pytest.approx(1 / 3)
