"""Colours of objects as GenEval asks CLIP for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.features import CLIPFeatures
from umm_zoo.benchmarks.geneval.colours import CLIPColours, Subject, shown
from umm_zoo.metrics.geneval_rule import COLOURS, Found

SIZES = {"intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 16, "image_size": 12, "patch_size": 4, **SIZES}
TEXT = {"hidden_size": 8, "max_position_embeddings": 24, **SIZES}


@pytest.fixture(scope="module")
def colours() -> CLIPColours:
    torch.manual_seed(0)
    return CLIPColours(CLIPFeatures.from_config({"vision_config": VISION, "text_config": TEXT, "projection_dim": 6}), batch_size=2)


def subject(image: Tensor, box: tuple[float, float, float, float], mask: np.ndarray | None = None, name: str = "dog") -> Subject:
    return Subject(image, name, Found(np.array(box, np.float32), 1.0, mask))


def levels(one: Subject, size: int) -> list[list[int]]:
    return np.asarray(shown(one, size))[..., 0].tolist()


def ramp(height: int, width: int) -> Tensor:
    """Columns of levels 0, 10, 20 …"""
    return (torch.arange(width) * 10 / 127.5 - 1).expand(3, height, width)


def test_an_object_is_cut_out_by_its_box() -> None:
    assert levels(subject(ramp(6, 8), (2, 1, 4, 3)), 2) == [[20, 30], [20, 30]]
    assert levels(subject(ramp(6, 8), (2.5, 1, 4.5, 3)), 2) == [[20, 30], [20, 30]]  # halves go to the even number
    assert levels(subject(ramp(6, 8), (7, 0, 9, 2)), 2) == [[70, 0], [70, 0]]  # black beyond the edge
    assert levels(subject(ramp(6, 8), (3, 2, 3.4, 2.2)), 2) == [[30, 30], [30, 30]]


def test_outside_the_mask_is_grey() -> None:
    mask = np.zeros((6, 8), bool)
    mask[2, 3] = True
    assert levels(subject(ramp(6, 8), (2, 1, 4, 3), mask), 2) == [[153, 153], [153, 30]]


@pytest.mark.parametrize(("width", "first"), [(2, 0), (3, 0), (4, 10), (5, 20), (6, 20), (9, 40)])
def test_of_a_long_object_the_middle_is_seen(width: int, first: int) -> None:
    # (width - 2) / 2 columns are cut off on the left; of halves, the even number: .5 is 0, 1.5 is 2, 3.5 is 4
    assert levels(subject(ramp(2, width), (0, 0, width, 2)), 2)[0] == [first, first + 10]


def test_likeness_is_that_of_a_mean_of_three_texts(colours: CLIPColours) -> None:
    image, encoder = torch.rand(3, 12, 12) * 2 - 1, colours.encoder
    (told,) = colours([subject(image, (0, 0, 12, 12), name="wine glass")])
    seen = encoder(((image[None] + 1) * 127.5).round() / 127.5 - 1)[0]
    likeness, means = [], []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} wine glass", f"a photo of a {colour}-colored wine glass", f"a photo of a {colour} object"]
        vectors = [encoder.encode_text([text])[0] for text in texts]
        mean = sum(vector / vector.norm() for vector in vectors) / 3
        means.append(mean / mean.norm())
        likeness.append(float(F.cosine_similarity(mean, seen, dim=0)))
    assert told == COLOURS[int(np.argmax(likeness))] and np.ptp(likeness) > 1e-3
    torch.testing.assert_close(colours._classifier("wine glass", torch.device("cpu")), torch.stack(means))


def test_objects_together_as_alone(colours: CLIPColours) -> None:
    torch.manual_seed(2)
    some = [
        subject(torch.rand(3, 9 + i, 12) * 2 - 1, (i, 0, 12, 9), name=name)
        for i, name in enumerate(["dog", "cat", "dog", "bus", "tv"])
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = colours(some)
    assert together == [colours([one])[0] for one in some] and colours([]) == []
    assert not colours.train().training and colours.digest() == CLIPColours(colours.encoder).digest()
