"""How alike an image and what was made of it are to the encoders that a run is scored with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from umm_zoo.experiment.build import build_embedded
from umm_zoo.experiment.types import TARGET
from umm_zoo.generation.tensors import from_pil
from umm_zoo.metrics.unified_score import UnifiedScore


def encoder_nodes(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Nodes of the encoders of a run's own Unified-Score, by the name of their column; empty where it has none."""
    nodes = [node for node in metrics.values() if str(node.get(TARGET, "")).endswith(".UnifiedScore")]
    return dict(nodes[0]["encoders"]) if nodes else {}


@dataclass
class Similarities:
    """Cosines under the encoders of a run's own Unified-Score; they are built when the first pair comes.

    Args:
        nodes: of the encoders, see ``encoder_nodes``.
        source: the run, for messages.
        trust: modules beside this package whose classes the nodes may name.
        device: of the encoders.
    """

    nodes: Mapping[str, Any] = field(default_factory=dict)
    source: str | Path = ""
    trust: Sequence[str] = ()
    device: str = "cpu"

    @cached_property
    def _score(self) -> UnifiedScore:
        node = {TARGET: f"{UnifiedScore.__module__}.UnifiedScore", "encoders": dict(self.nodes)}
        built: UnifiedScore = build_embedded(node, UnifiedScore, "metrics.unified", self.source, self.trust)
        return built.to(self.device)

    def __call__(self, image: Image.Image, made: Image.Image) -> dict[str, float]:
        """Cosines in [-1, 1] by encoder, of two images of any sizes in 8 bits.

        Raises:
            UserError: an encoder cannot be built.
        """
        if not self.nodes:
            return {}
        with torch.no_grad():
            cosines = self._score.cosines([from_pil(made).to(self.device)], [from_pil(image).to(self.device)])
        return {name: round(value, 5) for name, value in zip(self._score.encoders, cosines[:, 0].tolist(), strict=True)}
