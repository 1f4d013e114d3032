"""The families whose images are cut into tiles or stand among words of their own, and all families by their names."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import DynamicCache
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image
from transformers.models.smolvlm.image_processing_pil_smolvlm import get_resize_output_image_size
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.encoded_rows import ImageLayout
from umm_zoo.backbones.frozen import rest_unused
from umm_zoo.backbones.vlm_family import Llava, Qwen2VL, Qwen3VL, VLMFamily
from umm_zoo.batch import Grid


class LlavaNext(Llava):
    """LLaVA-1.6: the whole image as a square, then its tiles without their padding, a new-line token behind each of their rows."""

    loose = ("image_newline",)
    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def layout(self, height: int, width: int, count: int) -> ImageLayout:
        """The square and the tiles."""
        config, side = self.config, self.side
        rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, config.vision_config.image_size)
        h, w = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), (height, width)).shape[1:]
        return ImageLayout((self.tile_tokens + self._tiled(h, w),))

    def _tiled(self, h: int, w: int) -> int:
        """Tokens of a grid of so many patches."""
        return h * (w + 1)

    def grid(self, height: int, width: int, count: int = 1) -> Grid:
        """In one row."""
        return Grid(1, sum(self.layout(height, width, count).runs))

    def forms_grid(self, height: int, width: int) -> bool:
        """Never."""
        return False


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision (arXiv 2408.03326): as LLaVA-1.6, large grids scaled down; of several images of a row each is one square."""

    takes = ("pixel_values", "image_sizes", "batch_num_images")

    def layout(self, height: int, width: int, count: int) -> ImageLayout:
        """A square and a new line where there are several."""
        return super().layout(height, width, count) if count == 1 else ImageLayout((self.tile_tokens + 1,))

    def _tiled(self, h: int, w: int) -> int:
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(h * w / (most * self.side**2))
        return super()._tiled(*((int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)))


class InternVL(VLMFamily):
    """InternVL3 (arXiv 2504.10479): tiles and a thumbnail, four patches of each joined into one token."""

    defaults = dict(InternVLProcessor.images_kwargs)

    @classmethod
    def rest(cls, model: Any) -> None:
        """As the base class, and what lies behind the features, the last norm too."""
        super().rest(model)
        if (layer := model.config.vision_feature_layer) != -1:
            rest_unused(model.model.vision_tower, [layer])
            model.model.vision_tower.layernorm.requires_grad_(False)

    @property
    def _tile(self) -> Grid:
        side = int(self.side * self.config.downsample_ratio)
        return Grid(side, side)

    def _tiles(self, height: int, width: int) -> int:
        return int(self.images.get_number_of_image_patches(height, width, self.settings))

    def layout(self, height: int, width: int, count: int) -> ImageLayout:
        """All tiles in one run."""
        opening, closing = (
            str(getattr(self.tokenizer, name, None) or default)
            for name, default in (("start_image_token", "<img>"), ("end_image_token", "</img>"))
        )
        text = f"{opening}{self.marker}{closing}"
        return ImageLayout((self._tiles(height, width) * self._tile.num_cells,), tuple(self.cut(text)))

    def grid(self, height: int, width: int, count: int = 1) -> Grid:
        """That of a single tile, else one row."""
        tiles = self._tiles(height, width)
        return self._tile if tiles == 1 else Grid(1, tiles * self._tile.num_cells)

    def forms_grid(self, height: int, width: int) -> bool:
        """Where there is one tile."""
        return self._tiles(height, width) == 1


class SmolVLM(VLMFamily):
    """SmolVLM (arXiv 2504.05299) and Idefics3: tiles, each named by its row and column, then the whole image."""

    tower, projector, decoder = "vision_model", "connector", "text_model"
    takes = ("pixel_values", "pixel_attention_mask")

    @property
    def _tile(self) -> Grid:
        side = self.side // self.config.scale_factor
        return Grid(side, side)

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles, as the image processor cuts them; 0 where it cuts none."""
        how = {name: self.settings.get(name, getattr(self.images, name)) for name in ("do_resize", "size", "max_image_size")}
        if not self.settings.get("do_image_splitting", self.images.do_image_splitting):
            return 0, 0
        if how["do_resize"]:
            blank, size = np.broadcast_to(np.zeros(1, np.uint8), (3, height, width)), how["size"]
            longest = size["longest_edge"]
            height, width = get_resize_output_image_size(blank, longest) if longest else (size["height"], size["width"])
        edge, wide = how["max_image_size"]["longest_edge"], width >= height
        long, ratio = max(height, width), width / height
        long = math.ceil(long / edge) * edge
        short = math.ceil((int(long / ratio) if wide else int(long * ratio)) / edge) * edge
        rows, columns = (short, long) if wide else (long, short)
        return (rows // edge, columns // edge) if long > edge else (0, 0)

    def layout(self, height: int, width: int, count: int) -> ImageLayout:
        """Tile after tile, and the whole image."""
        rows, columns = self._tiles(height, width)
        names = (("fake_image_token", "<fake_token_around_image>"), ("global_image_token", "<global-img>"))
        fake, whole = (str(getattr(self.tokenizer, name, None) or default) for name, default in names)
        text = get_image_prompt_string(rows, columns, 1, fake, self.marker, whole)
        return ImageLayout((self._tile.num_cells,) * (rows * columns + 1), tuple(self.cut(text)))

    def grid(self, height: int, width: int, count: int = 1) -> Grid:
        """That of the whole image where it is not cut, else one row."""
        rows, columns = self._tiles(height, width)
        return Grid(1, (rows * columns + 1) * self._tile.num_cells) if rows else self._tile

    def forms_grid(self, height: int, width: int) -> bool:
        """Where the image is not cut."""
        return self._tiles(height, width) == (0, 0)


class Gemma3(VLMFamily):
    """Gemma 3 (arXiv 2503.19786): a pooled square between texts, whose tokens attend to each other in both directions."""

    defaults = dict(Gemma3Processor.images_kwargs)

    @property
    def marker(self) -> str:
        """The token that opens an image."""
        return self.token(self.config.boi_token_id)

    @cached_property
    def side(self) -> int:
        """After pooling."""
        return int(self.config.mm_tokens_per_image**0.5)

    def _crops(self, height: int, width: int) -> int:
        """Crops beside the whole image, where panning and scanning is on."""
        if not self.settings["do_pan_and_scan"]:
            return 0
        own = {name: value for name, value in self.settings.items() if name.startswith("pan_and_scan")}
        return len(self.images.pan_and_scan(np.broadcast_to(np.zeros(1, np.uint8), (3, height, width)), **own))

    def layout(self, height: int, width: int, count: int) -> ImageLayout:
        """The tokens between line breaks; words around them where there are crops."""
        config, crops = self.config, self._crops(height, width)
        one = f"\n\n{self.marker}{self.token(config.image_token_id)}{self.token(config.eoi_token_id)}\n\n"
        if crops:
            more = " ".join([one] * crops)
            one = f"Here is the original image {one} and here are some crops to help you see better {more}"
        return ImageLayout((self.side**2,) * (crops + 1), tuple(self.cut(one)))

    def grid(self, height: int, width: int, count: int = 1) -> Grid:
        """Pooled, crops in one row."""
        crops = self._crops(height, width)
        return Grid(1, (crops + 1) * self.side**2) if crops else Grid(self.side, self.side)

    def forms_grid(self, height: int, width: int) -> bool:
        """Where there are no crops."""
        return not self._crops(height, width)

    def arguments(self, inputs: VLMInputs, cache: DynamicCache | None) -> dict[str, Any]:
        """Masks of both kinds of layers."""
        masks = create_masks_for_vision_model(
            config=self.model.model.language_model.config,
            inputs_embeds=inputs.embeddings,
            attention_mask=inputs.mask,
            past_key_values=cache,
            position_ids=inputs.position_ids,
            block_sequence_ids=get_block_sequence_ids_for_mask(inputs.image_mask.long()),
        )
        return {"mask": masks}


#: Families by the library's model type.
VLM_FAMILIES: dict[str, type[VLMFamily]] = {
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen2VL,
    "qwen3_vl": Qwen3VL,
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "internvl": InternVL,
    "smolvlm": SmolVLM,
    "gemma3": Gemma3,
}
