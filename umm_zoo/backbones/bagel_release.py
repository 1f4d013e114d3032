"""Weights of Bagel's release: its vision tower, its mixture of experts, its way in and out for latents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from umm_zoo.backbones.llava_loading import Dtype
from umm_zoo.backbones.loading import on_meta_device, torch_dtype
from umm_zoo.backbones.mixture_vlm import EncodesImages, MixtureModel
from umm_zoo.backbones.precision import antialiased
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.batch import Grid, Images, map_by_size
from umm_zoo.blocks.latent_tokens import LatentTokens
from umm_zoo.blocks.mixture import MixtureStack
from umm_zoo.blocks.transformer import position_table
from umm_zoo.errors import Count, UserError

#: Where the tensors of the release stand in ``MixtureModel``.
_PLACES = {
    "language_model.model.embed_tokens.": "embed_tokens.",
    "language_model.model.": "stack.",
    "language_model.lm_head.": "lm_head.",
    "vit_model.": "vlm.vision_tower.",
    "connector.": "vlm.projector.",
}
#: Where they stand in ``LatentTokens``.
_LATENT_PLACES = {"vae2llm.": "latent_in.", "llm2vae.": "latent_out.", "time_embedder.mlp.": "time_in."}
#: Longest and shortest side of an image that the tower reads, and its most pixels (released ``ImageTransform(980, 224, 14)``).
_LONGEST, _SHORTEST, _MOST_PIXELS = 980, 224, 14 * 14 * 9 * 1024


class _Embeddings(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.patch: int = config.patch_size  # type: ignore[assignment]
        self.side = config.image_size // self.patch  # type: ignore[operator]
        self.patch_embedding = nn.Linear(3 * self.patch**2, config.hidden_size)
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(images, "M C (h p) (w q) -> M (h w) (p q C)", p=self.patch, q=self.patch)
        rows, columns = (torch.arange(side // self.patch, device=images.device) for side in images.shape[-2:])
        places = (rows[:, None] * self.side + columns).flatten()
        embedded: Tensor = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        return embedded + self.position_embedding(places)


class _VisionModel(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(config), SiglipEncoder(cast(Any, config))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class NavitTower(nn.Module):
    """SigLIP with a linear layer in the place of its convolution, and a place per row and column of up to so many patches a side.

    Shape:
        ``[M, 3, H, W]``, sides multiples of the patch -> ``[M, N, E]``

    Args:
        config: of the tower, as many layers as are run.
    """

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        config._attn_implementation = "sdpa"
        self.vision_model = _VisionModel(config)

    def forward(self, images: Tensor) -> Tensor:
        """The last states, after the final norm."""
        own = self.vision_model
        states: Tensor = own.post_layernorm(own.encoder(inputs_embeds=own.embeddings(images)).last_hidden_state)
        return states


class Connector(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_dim, out_dim), nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token alone."""
        projected: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return projected


class BagelImages(EncodesImages):
    """Images as Bagel's release reads them: any shape, sides of 224 to 980 px in multiples of the patch.

    The release resizes with PIL, in 8 bits; here it is torch's antialiased bicubic, of floats, which is off by a level or two where
    an image is resized at all.

    Args:
        config: of SigLIP as its ``vit_config.json`` says; the last layer is not run.
        width: of the language model.
        source: of the tokenizer.
    """

    def __init__(self, config: Mapping[str, Any], width: int, source: str) -> None:
        super().__init__()
        whole = SiglipVisionConfig(**{**config, "num_hidden_layers": config["num_hidden_layers"] - 1})
        sizes: Any = whole
        self.patch, self.side, self.source = sizes.patch_size, sizes.image_size // sizes.patch_size, source
        self.image_size = min(224, self.side * self.patch)
        self.vision_tower, self.projector = NavitTower(whole), Connector(sizes.hidden_size, width)
        table = position_table(self.side, width).float().view(self.side, self.side, width)
        self.register_buffer("table", table, persistent=False)

    table: Tensor

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The release's."""
        return load_tokenizer(self.source)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to (released ``MaxLongEdgeMinShortEdgeResize``)."""
        longest = min(_LONGEST, self.side * self.patch)

        def scaled(sides: tuple[int, int], scale: float) -> tuple[int, int]:
            made = (max(self.patch, round(round(side * scale) / self.patch) * self.patch) for side in sides)
            return cast(tuple[int, int], tuple(made))

        scale = max(min(longest / max(height, width), 1.0), min(_SHORTEST, longest) / min(height, width))
        sides = scaled((height, width), scale)
        if sides[0] * sides[1] > _MOST_PIXELS:
            sides = scaled(sides, _MOST_PIXELS / (sides[0] * sides[1]))
        return scaled(sides, longest / max(sides)) if max(sides) > longest else sides

    def image_grid(self, height: int, width: int) -> Grid:
        """As the base class."""
        height, width = self.size(height, width)
        return Grid(height // self.patch, width // self.patch)

    def encode_images(self, images: Images) -> list[Tensor]:
        """As the base class."""
        return map_by_size(self._encode, images)

    def _encode(self, stack: Tensor) -> Tensor:
        size = self.size(*stack.shape[-2:])
        if size != tuple(stack.shape[-2:]):
            stack = antialiased(stack, size, "bicubic").clamp(-1, 1)
        made: Tensor = self.projector(self.vision_tower(stack))
        places = self.table[: size[0] // self.patch, : size[1] // self.patch].flatten(0, 1)
        return made + places.to(made.dtype)


class BagelModel(MixtureModel):
    """Bagel's released model without its latents, such as ``BAGEL-7B-MoT``; build it with ``from_pretrained``."""

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        language_model: dict[str, Any] | None = None,
        vision_tower: dict[str, Any] | None = None,
        dtype: Dtype = "bfloat16",
        max_length: Count = 32768,
    ) -> BagelModel:
        """The model of a folder.

        Args:
            source: folder with ``ema.safetensors``, ``llm_config.json``, ``vit_config.json`` and the tokenizer.
            language_model, vision_tower: what the two configurations say; used in their place on the meta device.
            dtype: of the weights; ``auto`` is the file's bfloat16.
            max_length: longest row in tokens.

        Raises:
            UserError: a file is missing; tensors are missing, unexpected or of another shape.
        """
        text = _config(source, "llm_config.json", language_model)
        images = BagelImages(_config(source, "vit_config.json", vision_tower), text["hidden_size"], source)
        stack = MixtureStack(
            layers=text["num_hidden_layers"],
            width=text["hidden_size"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            hidden_dim=text["intermediate_size"],
            rope_theta=text.get("rope_theta", 1e4),
            eps=text["rms_norm_eps"],
        )
        words = nn.Embedding(text["vocab_size"], text["hidden_size"])
        head = nn.Linear(text["hidden_size"], text["vocab_size"], bias=False)
        model = cls(images, stack, words, head, max_length).to(torch_dtype("bfloat16" if dtype == "auto" else dtype))
        if not on_meta_device():
            _fill(model, source, _PLACES)
            _check_table(source, "vit_pos_embed.pos_embed", images.table, "vision_tower.image_size")
        return model


class BagelLatents(LatentTokens):
    """The released way in and out for latents, in float32; build it with ``from_pretrained``."""

    @classmethod
    def from_pretrained(
        cls, source: str, latent_channels: Count = 16, width: Count = 3584, patch: Count = 2, max_side: Count = 64
    ) -> BagelLatents:
        """Those of a folder with ``ema.safetensors``; the other arguments are those of ``LatentTokens``.

        Raises:
            UserError: a table of another size than ``max_side`` says, which the release's own code loads in silence; or tensors are
                missing, unexpected or of another shape.
        """
        latents = cls(latent_channels, width, patch, max_side)
        if not on_meta_device():
            _check_table(source, "latent_pos_embed.pos_embed", latents.table, "max_side")
            _fill(latents, source, _LATENT_PLACES)
        return latents


def _config(source: str, name: str, stated: Mapping[str, Any] | None) -> Mapping[str, Any]:
    file = Path(source) / name
    if file.is_file():
        found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for key, value in (stated or {}).items():
            if found.get(key, value) != value:
                raise UserError(str(file), f"{key} {found[key]}", f"{value}, as stated")
        return {**found, **(stated or {})}
    if on_meta_device() and stated is not None:
        return stated
    raise _missing(source, name)


def _missing(source: str, name: str) -> UserError:
    return UserError("source", f"'{source}', where there is no {name}", "a folder with the files of ByteDance-Seed/BAGEL-7B-MoT")


def _weights(source: str) -> Any:
    file = Path(source) / "ema.safetensors"
    if not file.is_file():
        raise _missing(source, file.name)
    return safe_open(file, framework="pt")


def _fill(module: nn.Module, source: str, places: Mapping[str, str]) -> None:
    """Copy tensors of the release to where they stand here."""
    own = dict(module.state_dict(keep_vars=True))
    left = set(own)
    with _weights(source) as weights, torch.no_grad():
        for key, name in _named(weights.keys(), places):
            if name not in own or tuple(own[name].shape) != tuple(weights.get_slice(key).get_shape()):
                found = f"'{key}' of shape {list(weights.get_slice(key).get_shape())}"
                raise UserError(source, found, f"{list(own[name].shape)}" if name in own else "no such tensor")
            own[name].copy_(weights.get_tensor(key))
            left.discard(name)
    if left:
        raise UserError(source, f"no tensor for '{min(left)}'", "all tensors of the release")


def _named(keys: Iterable[str], places: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for key in keys:
        begin = next((begin for begin in places if key.startswith(begin)), None)
        if begin is not None:
            yield key, places[begin] + key[len(begin) :]


def _check_table(source: str, key: str, own: Tensor, where: str) -> None:
    with _weights(source) as weights:
        table = weights.get_tensor(key).float()
    if table.shape != own.flatten(0, 1).shape or not torch.allclose(table, own.flatten(0, 1).float(), atol=1e-2):
        side = round(len(table) ** 0.5)
        raise UserError(where, f"a table of {len(own)} x {len(own)} places", f"{side} x {side}, as '{key}' of the weights has")
