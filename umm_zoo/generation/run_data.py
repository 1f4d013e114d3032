"""What the data of a run says of images: how those of a user become inputs of its method."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umm_zoo.experiment.build import build_embedded

#: Arguments of a run's data that say what becomes of an image.
ABOUT_IMAGES = ("image_size", "target_size", "resize", "target_resize")

#: Module of the base class of image policies.
POLICIES = "data_pipelines.transforms.resize"


@dataclass(frozen=True)
class RunData:
    """The ``data`` map of a run, as far as it is about images; empty for a method that comes from no run.

    Args:
        values: the arguments, policies as nodes.
        source: the run, for messages.
        trust: modules beside this package whose classes the nodes may name.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    source: str | Path = ""
    trust: Sequence[str] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str | Path, trust: Sequence[str] = ()) -> RunData:
        """What the ``data`` of an experiment says."""
        return cls({name: data[name] for name in ABOUT_IMAGES if data.get(name) is not None}, source, trust)

    def get(self, name: str) -> int | None:
        """A size in pixels; None where nothing is said."""
        return self.values.get(name)

    def built(self, name: str) -> Any:
        """An image policy; None where nothing is said.

        Raises:
            UserError: it cannot be built, or its class is not trusted.
        """
        node = self.values.get(name)
        if node is None:
            return None
        kind = importlib.import_module(POLICIES).Resize  # by name: what makes data knows this package
        return build_embedded(node, kind, f"data.{name}", self.source, self.trust)
