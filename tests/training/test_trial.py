"""What the first batch would refuse for its sizes is refused by the check, which has neither weights nor data."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from umm_zoo.errors import UserError
from umm_zoo.fit import main as fit
from umm_zoo.training import trial

LLAVA, VLM, SANA, SD3 = (f"experiments/tiny/{name}.yaml" for name in ("llava", "vlm", "sana", "sd3"))
BRIDGE, UAE = "experiments/wemmu/toy/stage2.yaml", "experiments/uae/toy/stage1.yaml"
VOCABULARY = "tokenizer: found ids up to 1023, expected fewer than the language model's 10"


@pytest.mark.parametrize(
    ("file", "override", "expected"),
    [
        (LLAVA, "data.image_size=33", "data.image_size: found images of 33x33 pixels, expected the vision tower's 32x32"),
        (LLAVA, "method.vlm.language_model.vocab_size=10", VOCABULARY),
        (LLAVA, "method.vlm.language_model.num_attention_heads=32", "method.vlm: blocks that cannot take images of 32 x 32 px"),
        (LLAVA, "method.vlm.config.vision_feature_layer=-9", "method.vlm: blocks that cannot take"),
        (VLM, "vars.vlm.config.text_config.vocab_size=10", VOCABULARY),
        (SANA, "data.image_size=36", "data.image_size: found images of [36, 36] pixels, expected multiples of 8"),
        (SD3, "method.decoder.config.patch_size=3", "expected [B, 16, h, w] with h and w multiples of 3"),
        (SD3, "method.decoder.config.pos_embed_max_size=2", "pos_embed_max_size"),
        (BRIDGE, "data.target_size=36", "found images of [36, 36] pixels, expected multiples of 8"),
        (BRIDGE, "method.connector.positions.max_width=3", "found a grid of 4 x 4 tokens, expected at most"),
        (UAE, "data.image_size=64", "method.renderer: blocks that cannot take images of 64 x 64 px"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(file: str, override: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    assert fit([file, "--check", override]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert expected in line and time.process_time() - began < 20  # about one second


class Looks(nn.Module):
    """A block of a user's that looks at numbers, or at shapes, before it takes an image."""

    def __init__(self, needs: str) -> None:
        super().__init__()
        self.needs, self.layer = needs, nn.Linear(3, 4, device="meta")

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        means = self.layer(inputs.mean(dim=(2, 3)))
        if self.needs == "numbers" and means.sum().item() > 0:
            raise AssertionError
        if self.needs == "places":
            means[means > 0].sum()
        if self.needs == "cpu":
            torch.zeros(4, device="cpu") + means
        if self.needs == "width":
            self.layer(means)


@pytest.mark.parametrize("needs", ["numbers", "places", "cpu", "nothing"])
def test_a_block_that_needs_numbers_is_let_be(needs: str) -> None:
    trial.try_part(Looks(needs), [torch.empty(1, 3, 5, 5, device="meta")] * 2, "method.block", "FILE")


def test_a_block_that_a_width_does_not_fit_is_refused_by_its_place() -> None:
    with pytest.raises(UserError, match=r"^FILE: method.block: blocks that cannot take images of 5 x 5 px \(.*\)$"):
        trial.try_part(Looks("width"), [torch.empty(1, 3, 5, 5, device="meta")] * 2, "method.block", "FILE")
