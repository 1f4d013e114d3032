"""Slot of detectors: what they find in images, under the names that GenEval's prompts use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.batch import Images, by_size
from umm_zoo.errors import Count
from umm_zoo.metrics.geneval_rule import Detections

_NAMES = (
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|bench|bird|cat|"
    "dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|"
    "kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|"
    "sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|"
    "computer mouse|tv remote|computer keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|"
    "teddy bear|hair drier|toothbrush"
)
#: COCO's 80 classes in the order of detectors' outputs, with GenEval's words for three of them.
COCO = tuple(_NAMES.split("|"))
#: Other spellings in annotations and in the labels of detectors.
SPELLINGS = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


class Detector(FrozenBackbone, ABC):
    """A detector of objects, which never trains.

    Args:
        batch_size: images of one size at a time.

    Attributes:
        names: of its classes.
    """

    names: tuple[str, ...] = COCO

    def __init__(self, batch_size: Count = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    @abstractmethod
    def detect(self, images: Tensor, least: float) -> list[Detections]:
        """What B images of one size show, each as if it were alone.

        Args:
            images: ``[B, 3, H, W]`` uint8, red first.
            least: objects whose scores do not exceed it may be left out.
        """

    @abstractmethod
    def digest(self) -> str:
        """What it is, for the card: its kind and a hash of its weights."""

    @torch.no_grad()
    def forward(self, images: Images, least: float = 0.0) -> list[Detections]:
        """What each of M images ``[3, H, W]`` in [-1, 1], of any sizes, shows in 8 bits."""
        found = dict[int, Detections]()
        for places, stack in by_size(images):
            if not places:  # a stand-in
                continue
            for start in range(0, len(places), self.batch_size):
                some = eight_bits(stack[start : start + self.batch_size])
                found.update(zip(places[start : start + self.batch_size], self.detect(some, least), strict=True))
        return [found[place] for place in range(len(images))]


def eight_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] in 8 bits, as their PNG files hold them."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def coco_name(label: str) -> str | None:
    """GenEval's name of a class of COCO however a detector spells it; None where it is no such class."""
    label = label.strip().lower().replace("_", " ")
    name = SPELLINGS.get(label, label)
    return name if name in COCO else None


def assert_coco_order(source: str, labels: Sequence[str]) -> None:
    """Refuse labels that are COCO's in another order, or not 80; labels without a meaning (``LABEL_0``) are taken for COCO's.

    Raises:
        ValueError: names the first label that is out of place.
    """
    if len(labels) != len(COCO):
        raise ValueError(f"{source}: found {len(labels)} classes, expected COCO's {len(COCO)}")
    for place, label in enumerate(labels):
        if (name := coco_name(label)) is not None and name != COCO[place]:
            raise ValueError(f"{source}: found the class {place} '{label}', expected '{COCO[place]}': COCO's 80 in their order")


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Float32 without TF32, and no autocast: scores near a threshold are otherwise another GPU generation's."""
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.cudnn.conv)
    before, default = [setting.fp32_precision for setting in settings], torch.get_default_dtype()
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        torch.set_default_dtype(torch.float32)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def device_of(module: nn.Module) -> torch.device:
    """Where its weights are."""
    return next(module.parameters()).device
