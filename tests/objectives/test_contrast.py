import math

import pytest
import torch
import torch.nn.functional as F

from umm_zoo.objectives.contrast import ContrastiveLoss, SigmoidContrast, SoftmaxContrast, WordSwaps

SCALE, BIAS = torch.tensor(3.0), torch.tensor(-0.5)


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def some(B: int, K: int) -> dict[str, torch.Tensor]:
    return {
        "images": units(B, 5),
        "texts": units(B, 5, seed=1),
        "negatives": units(B, K, 5, seed=2),
        "scale": SCALE,
        "bias": BIAS,
        "same": torch.eye(B, dtype=torch.bool),
        "valid": torch.ones(B, K, dtype=torch.bool),
    }


def test_softmax_by_hand() -> None:
    given = some(3, 2)
    total = 0.0
    for i in range(3):

        def logit(image: torch.Tensor, text: torch.Tensor) -> float:
            return math.exp(3.0 * float(image @ text) - 0.5)

        own = logit(given["images"][i], given["texts"][i])
        row = sum(logit(given["images"][i], text) for text in [*given["texts"], *given["negatives"][i]])
        column = sum(logit(image, given["texts"][i]) for image in given["images"])
        total -= 0.5 * (math.log(own / row) + math.log(own / column)) / 3
    torch.testing.assert_close(SoftmaxContrast()(**given), torch.tensor(total))


def test_sigmoid_by_hand() -> None:
    given = some(3, 2)
    total = 0.0
    for i in range(3):
        for j in range(3):
            sign = 1 if i == j else -1
            total -= math.log(1 / (1 + math.exp(-sign * (3.0 * float(given["images"][i] @ given["texts"][j]) - 0.5))))
        for k in range(2):
            total -= math.log(1 / (1 + math.exp(3.0 * float(given["images"][i] @ given["negatives"][i, k]) - 0.5)))
    torch.testing.assert_close(SigmoidContrast()(**given), torch.tensor(total / 3))


@pytest.mark.parametrize("loss", [SoftmaxContrast(), SigmoidContrast()])
def test_an_equal_caption_is_no_negative(loss: ContrastiveLoss) -> None:
    given = some(3, 0)
    given["texts"][2] = given["texts"][0]
    blind = loss(**given)
    given["same"] = torch.eye(3, dtype=torch.bool)
    given["same"][0, 2] = given["same"][2, 0] = True
    assert loss(**given) < blind


@pytest.mark.parametrize("loss", [SoftmaxContrast(), SigmoidContrast()])
def test_missing_negatives_do_not_count(loss: ContrastiveLoss) -> None:
    given, none = some(4, 2), some(4, 0)
    given["valid"][:] = False
    torch.testing.assert_close(loss(**given), loss(**none))


def test_word_swaps_change_exactly_one_word_of_a_group() -> None:
    groups = [["top left", "top right"], ["small", "large"], ["red", "green", "blue"]]
    text = "top left: a small red circle"
    swaps = WordSwaps(groups, num=3).of([text], torch.Generator().manual_seed(0))[0]
    assert len(swaps) == len(set(swaps)) == 3
    assert "top right: a small red circle" in swaps and "top left: a large red circle" in swaps
    assert {s.split()[-2] for s in swaps} - {"red"} <= {"green", "blue"}


def test_word_swaps_find_whole_words_only() -> None:
    swaps = WordSwaps([["red", "blue"]]).of(["a covered cup"])
    assert swaps == [[]]


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="two words or more"):
        WordSwaps([["red"]])
