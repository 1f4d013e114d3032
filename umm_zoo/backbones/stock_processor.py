"""What the image processor stored beside an encoder's weights does, where it is not the one of the encoder's first release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: PIL's numbers, as the files write them.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_STEPS = ("do_resize", "do_rescale", "do_normalize")


def stock_processor(said: Mapping[str, Any], source: str, crops: bool) -> dict[str, Any]:
    """Attributes of ``LibraryEncoder`` (``stock_size``, ``crop_ratio``, ``interpolation``, ``mean``, ``std``) that the file states.

    Args:
        said: ``preprocessor_config.json``; empty where there is none.
        source: of it, for the message.
        crops: whether the encoder's first release cuts a centre out, where the file does not say.

    Raises:
        ValueError: it makes images in another way than by resizing, cutting out the centre and normalising.
    """
    stated: dict[str, Any] = {}
    for key, found, accepted in (
        *((step, said.get(step), (None, True)) for step in _STEPS),
        ("rescale_factor", round(255 * said.get("rescale_factor", 1 / 255), 3), (1.0,)),
        ("resample", said.get("resample"), (None, *_RESAMPLING)),
    ):
        if found not in accepted:
            raise ValueError(f"{source}: image processor: {key}: found {said[key]}, expected {' or '.join(map(str, accepted))}")
    if said.get("resample") is not None:
        stated["interpolation"] = _RESAMPLING[said["resample"]]
    for name in ("mean", "std"):
        if said.get(f"image_{name}"):
            stated[name] = tuple(said[f"image_{name}"])
    if (edges := said.get("size")) is None:
        return stated
    cut = crops if said.get("do_center_crop") is None else said["do_center_crop"]
    shortest = edges if isinstance(edges, int) else edges.get("shortest_edge")
    size = _side(said.get("crop_size") or shortest) if cut else _side(edges)
    if size is None or (cut and (shortest is None or shortest < size)):
        found = f"size {edges}, crop_size {said.get('crop_size') if cut else None}"
        raise ValueError(f"{source}: image processor: found {found}, expected a square, or one cut out of a shortest edge")
    return {**stated, "stock_size": size, "crop_ratio": shortest / size if cut else None}


def _side(edges: Any) -> Any:
    """The side of a square; None where it is none."""
    if not isinstance(edges, Mapping):
        return edges
    return edges.get("height") if edges.get("height") == edges.get("width") else None
