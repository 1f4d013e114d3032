"""A vision-language model of the library as parts and image tokens: what families share, and those whose images are one grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.encoded_rows import ImageLayout
from umm_zoo.backbones.frozen import rest, rest_unused
from umm_zoo.backbones.llava_loading import TOWERS, assert_tower
from umm_zoo.backbones.mrope import row_positions
from umm_zoo.backbones.qwen_images import PatchLayout
from umm_zoo.backbones.qwen_tower import batch_segments, encode
from umm_zoo.backbones.stored_template import Cutter
from umm_zoo.batch import Grid


class _Configured(NamedTuple):
    """A model of which there is the configuration alone."""

    config: Any


@dataclass
class VLMFamily:
    """A model of the library as a vision tower, a projector and a language model, and how its images become tokens.

    Args:
        model: the library's, with its output layer.
        tokenizer: beside it; None only where no row is made.
        images: its image processor.
        settings: of the image processor, in the place of its own.

    Attributes:
        tower, projector, decoder: names of the parts.
        loose: parameters beside them, which go with the projector.
        takes: what ``get_image_features`` takes of what the image processor makes.
        defaults: settings that the library's processor gives the image processor, whatever is stored.
        on_host: what of that is read there, as sizes are, and goes to no device.
    """

    model: Any
    tokenizer: Any
    images: Any
    settings: dict[str, Any]

    tower: ClassVar[str] = "vision_tower"
    projector: ClassVar[str] = "multi_modal_projector"
    decoder: ClassVar[str] = "language_model"
    loose: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ("pixel_values",)
    defaults: ClassVar[dict[str, Any]] = {}
    on_host: ClassVar[tuple[str, ...]] = ("image_grid_thw", "image_sizes", "batch_num_images")

    def __post_init__(self) -> None:
        """Look at what is given."""

    # -- structure -----------------------------------------------------------------------------------------------------------

    @classmethod
    def parts(cls, model: Any) -> dict[str, nn.Module]:
        """Vision tower, projector and language model: groups of modules which hold each parameter once."""
        inner = model.model
        projector = {"projector": getattr(inner, cls.projector)}
        if cls.loose:
            projector["loose"] = nn.ParameterDict({name: getattr(inner, name) for name in cls.loose})
        return {
            "vision_tower": nn.ModuleDict({"tower": getattr(inner, cls.tower)}),
            "projector": nn.ModuleDict(projector),
            "language_model": nn.ModuleDict({"model": getattr(inner, cls.decoder), "lm_head": model.lm_head}),
        }

    @classmethod
    def rest(cls, model: Any) -> None:
        """Take the gradient from what no loss reaches: of SigLIP what makes a pooled vector."""
        if (head := getattr(getattr(model.model, cls.tower), "head", None)) is not None:
            rest(head)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def without_weights(self) -> Self:
        """The same rules of images and texts, for another process."""
        return replace(self, model=_Configured(self.config))

    # -- images --------------------------------------------------------------------------------------------------------------

    @property
    def marker(self) -> str:
        """What the chat template puts for an image."""
        return self.token(self.config.image_token_id)

    def token(self, number: int) -> str:
        """The special token of an id of the configuration."""
        return str(self.tokenizer.convert_ids_to_tokens(number))

    @cached_property
    def cut(self) -> Cutter:
        """Of the text around images into pieces."""
        return Cutter(self.tokenizer, self.token(self.config.image_token_id))

    @cached_property
    def side(self) -> int:
        """Patches of the tower along a side of an image or tile."""
        vision = self.config.vision_config
        size, patch = ((one if isinstance(one, int) else one[0]) for one in (vision.image_size, vision.patch_size))
        return int(size // patch)

    def layout(self, height: int, width: int, count: int) -> ImageLayout:
        """What stands for an image of that many pixels in a row of ``count`` images."""
        grid = self.grid(height, width, count)
        return ImageLayout((grid.num_cells,))

    def grid(self, height: int, width: int, count: int = 1) -> Grid:
        """Its tokens as a grid; in one row where they form none (``forms_grid``)."""
        return Grid(self.side, self.side)

    def forms_grid(self, height: int, width: int) -> bool:
        """Whether the tokens of such an image are a grid over it."""
        return True

    def features(self, processed: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tokens ``[N, D]`` of all images, and what they add behind layers, ``[N, K, D]``."""
        made = self._encoded(processed).pooler_output
        return (made.flatten(0, -2) if isinstance(made, Tensor) else torch.cat(list(made))), None

    def _encoded(self, processed: dict[str, Tensor]) -> Any:
        return self.model.model.get_image_features(**{name: processed[name] for name in self.takes if name in processed})

    # -- rows ----------------------------------------------------------------------------------------------------------------

    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The running index, ``[B, L]``."""
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)

    def arguments(self, inputs: VLMInputs, cache: DynamicCache | None) -> dict[str, Any]:
        """Of the decoder over whole rows: the mask, and what it asks of their images."""
        return {"mask": inputs.mask}


class Qwen2VL(VLMFamily):
    """Qwen2-VL and Qwen2.5-VL (arXiv 2409.12191, 2502.13923): images of any size in one call, a merger in the tower, M-RoPE."""

    tower, projector = "visual", "merger"
    takes = ("pixel_values", "image_grid_thw")
    mergers: ClassVar[tuple[str, ...]] = ("merger",)

    @classmethod
    def parts(cls, model: Any) -> dict[str, nn.Module]:
        """As the base class, the merger taken out of the tower."""
        visual = model.model.visual
        return {
            "vision_tower": nn.ModuleDict({name: part for name, part in visual.named_children() if name not in cls.mergers}),
            "projector": nn.ModuleDict({name: getattr(visual, name) for name in cls.mergers}),
            "language_model": nn.ModuleDict({"model": model.model.language_model, "lm_head": model.lm_head}),
        }

    @classmethod
    def rest(cls, model: Any) -> None:
        """As the base class; and images and windows share calls of attention."""
        super().rest(model)
        batch_segments(model.model.visual)

    def __post_init__(self) -> None:
        own = dict(self.settings)
        size = {name: own.get("size", self.images.size)[name] for name in ("shortest_edge", "longest_edge")}
        for short, name in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):  # the library's older words
            size[name] = own.pop(short, None) or size[name]
        self.settings = {**own, "size": size}

    @cached_property
    def _patches(self) -> PatchLayout:
        images, size = self.images, self.settings["size"]
        areas = size["shortest_edge"], size["longest_edge"]
        return PatchLayout(images.patch_size, images.merge_size, images.temporal_patch_size, *areas)

    def grid(self, height: int, width: int, count: int = 1) -> Grid:
        """Of whole groups of patches."""
        return self._patches.grid(height, width)

    def features(self, processed: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """As the base class."""
        made = self._encoded(processed)
        behind = getattr(made, "deepstack_features", None)
        return made.pooler_output, torch.stack(list(behind), dim=1) if behind else None

    def _encoded(self, processed: dict[str, Tensor]) -> Any:
        sizes = [(h, w) for _, h, w in processed["image_grid_thw"].tolist()]
        return encode(self.model.model.visual, processed["pixel_values"], sizes)

    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grids: Sequence[Grid]) -> Tensor:
        """M-RoPE's time, row and column, ``[3, B, L]``."""
        return row_positions(attention_mask, image_mask, grids)


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: features of several layers of the tower are added behind the first layers of the decoder (DeepStack)."""

    mergers = ("merger", "deepstack_merger_list")

    def arguments(self, inputs: VLMInputs, cache: DynamicCache | None) -> dict[str, Any]:
        """As the base class."""
        if inputs.deepstack is None:
            return {"mask": inputs.mask}
        behind = inputs.deepstack[inputs.image_mask].unbind(1)
        return {"mask": inputs.mask, "visual_pos_masks": inputs.image_mask, "deepstack_visual_embeds": list(behind)}


class Llava(VLMFamily):
    """LLaVA-1.5 (arXiv 2310.03744): the patches of a square."""

    @classmethod
    def rest(cls, model: Any) -> None:
        """As the base class, and the layers behind the features."""
        stated = model.config.vision_feature_layer
        rest_unused(model.model.vision_tower, [stated] if isinstance(stated, int) else stated)

    def __post_init__(self) -> None:
        assert_tower("config.vision_config.model_type", self.config.vision_config.model_type)

    @property
    def tile_tokens(self) -> int:
        """Tokens of a square."""
        dropped = self.config.vision_feature_select_strategy == "default"
        return self.side**2 + TOWERS[self.config.vision_config.model_type][0] - dropped

    def layout(self, height: int, width: int, count: int) -> ImageLayout:
        """The patches, and the class token where it is kept."""
        return ImageLayout((self.tile_tokens,))
