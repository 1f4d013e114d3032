"""Mask2Former through transformers, read as mmdetection 2 reads it: GenEval's own detector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from umm_zoo.backbones.loading import assert_known, find_source, load_checkpoint, on_meta_device
from umm_zoo.backbones.precomputable import weights_hash
from umm_zoo.benchmarks.geneval.detector import COCO, Detector, assert_coco_order, device_of, exact_arithmetic
from umm_zoo.benchmarks.geneval.opencv import resize
from umm_zoo.errors import Count
from umm_zoo.metrics.geneval_rule import Detections

#: Longest and shortest side of the resized image, at most.
SCALE = (1333, 800)
_MULTIPLE, _PAD = 32, 128


class Mask2Former(Detector):
    """Instance segmentation of COCO's 80 classes (Cheng et al., 2022, arXiv 2112.01527).

    Before and behind the network everything is as in mmdetection 2.28's ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``, which
    GenEval runs: OpenCV's resizing into 1,333 x 800, padding to multiples of 32 with level 128, the 100 best of queries x classes,
    mask logits enlarged to the padded image and, its padding cut off, once more to the original; a pixel is inside where its logit
    is positive; the score is the class probability times the mean probability inside. transformers' own reading differs in all of
    these. It runs in float32 without TF32, whatever the precision of the run.

    GenEval's weights are mmdetection's; the public ones in transformers' format, ``facebook/mask2former-swin-small-coco-instance``,
    are those of the paper's authors for the same network.

    Args:
        model: the library's network.
        batch_size: images of one size at a time.
        max_objects: of an image.
    """

    def __init__(self, model: Mask2FormerForUniversalSegmentation, batch_size: Count = 8, max_objects: Count = 100) -> None:
        super().__init__(batch_size)
        labels: Mapping[Any, str] = model.config.id2label or {}
        assert_coco_order("Mask2Former", [labels[place] for place in sorted(labels)])
        self.model: Any = model.float().requires_grad_(False).eval()
        self.max_objects = max_objects

    @classmethod
    def from_config(cls, config: dict[str, Any], batch_size: Count = 8) -> Self:
        """Random weights, for tests; ``config`` holds the library's keys, and classes are COCO's 80."""
        assert_known("Mask2Former.config", config, {*Mask2FormerConfig().to_dict(), "num_labels"})
        return cls(Mask2FormerForUniversalSegmentation(_config(config)), batch_size)

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "facebook/mask2former-swin-small-coco-instance", batch_size: Count = 8, max_objects: Count = 100
    ) -> Self:
        """A name on the hub or a folder in transformers' format.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: the weights do not fill the network exactly, or its classes are not COCO's 80 in their order.
        """
        kind = Mask2FormerForUniversalSegmentation
        if on_meta_device():
            return cls(kind(_config({})), batch_size, max_objects)
        return cls(load_checkpoint(kind, find_source(source, kind), "float32"), batch_size, max_objects)

    def digest(self) -> str:
        """``Mask2Former`` and a hash of its weights."""
        return f"Mask2Former {weights_hash(self.model)[:16]}"

    @torch.no_grad()
    def detect(self, images: Tensor, least: float = 0.0) -> list[Detections]:
        """Boxes are those of the masks, ``[left, top, right + 1, bottom + 1]``; 0 where a mask is empty, as is its score."""
        device = device_of(self.model)
        original = (images.shape[-2], images.shape[-1])
        resized = resized_to(*original)
        small = resize(images.to(device), *resized)
        with exact_arithmetic(device):
            output = self.model(pixel_values=normalised(small))
            rows = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
            return [self._read(classes, masks, resized, original, least) for classes, masks in rows]

    def _read(
        self, classes: Tensor, masks: Tensor, resized: tuple[int, int], original: tuple[int, int], least: float
    ) -> Detections:
        """Detections of one image from the logits ``[Q, 81]`` and ``[Q, h, w]`` of its queries."""
        probabilities = F.softmax(classes, dim=-1)[:, :-1]
        number = min(self.max_objects, probabilities.numel())
        scores, which = probabilities.flatten().topk(number, sorted=False)
        which, scores = which[scores > least], scores[scores > least]  # what a mask makes of a score is less than it
        queries, owners = torch.unique(which // len(self.names), return_inverse=True)
        logits = enlarged(masks[queries], resized, original)
        inside = logits > 0
        area = inside.flatten(1).sum(1).float()
        quality = (logits.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
        return Detections(
            names=[self.names[place] for place in (which % len(self.names)).tolist()],
            scores=(scores * quality[owners]).cpu().numpy(),
            boxes=boxes_of(inside)[owners].cpu().numpy(),
            masks=inside[owners].cpu().numpy(),
        )


def _config(config: dict[str, Any]) -> Any:
    kind: Any = Mask2FormerConfig
    return kind(**{"num_labels": len(COCO), **config})


def resized_to(height: int, width: int) -> tuple[int, int]:
    """Height and width of an image that is resized into ``SCALE``, whichever way it lies."""
    factor = min(max(SCALE) / max(height, width), min(SCALE) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def normalised(images: Tensor) -> Tensor:
    """What the network sees of ``[B, 3, H, W]`` uint8: padded below and on the right with grey, then normalised as ImageNet's."""
    bottom, right = (-side % _MULTIPLE for side in images.shape[-2:])
    padded = F.pad(images, (0, right, 0, bottom), value=_PAD).float()
    mean, std = (255 * padded.new_tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (padded - mean) / std


def enlarged(logits: Tensor, resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Mask logits ``[n, h, w]`` at the size of the original image, by way of the padded one; ``[n, *original]``."""
    if not len(logits):
        return logits.new_empty(0, *original)
    padded = [side + -side % _MULTIPLE for side in resized]
    large = F.interpolate(logits[:, None], size=padded, mode="bilinear", align_corners=False)
    large = large[..., : resized[0], : resized[1]]
    return F.interpolate(large, size=original, mode="bilinear", align_corners=False)[:, 0]


def boxes_of(masks: Tensor) -> Tensor:
    """The box around each mask of ``[n, H, W]``, ``[n, 4]`` float32; zeros around an empty one."""
    edges = []
    for used in (masks.any(dim=1), masks.any(dim=2)):  # columns, rows
        places = torch.arange(1, used.shape[1] + 1, device=masks.device)
        last = (used * places).amax(dim=1)
        first = (used * places.flip(0)).amax(dim=1)
        edges.append((torch.where(last > 0, used.shape[1] - first, 0), last))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()
