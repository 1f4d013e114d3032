"""DEiT-III, a supervised vision transformer, through the library's plain ViT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.vit import ViTConfig, ViTModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from umm_zoo.backbones.feature_encoder import LibraryEncoder
from umm_zoo.backbones.loading import assert_complete, on_meta_device, one_line
from umm_zoo.backbones.weight_files import assert_readable


class HeadlessViT(ViTModel):
    """The library's ViT without its pooler, which no encoder here uses and few files hold."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


class DeiT3Features(LibraryEncoder):
    """DEiT-III (Touvron et al., 2022, arXiv 2204.07118): one of the supervised teachers ROSS regresses.

    The library has no class for it: it differs from a plain ViT by a learned scale on every residual branch and by positions that
    the class token does not take. Both can be folded into a ViT's own weights without changing the function, see ``from_release``.
    ``forward`` gives the class token after the final norm.
    """

    kind, config_kind = HeadlessViT, ViTConfig
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    optional = ("classifier.", "pooler.")

    @classmethod
    def from_release(cls, file: str | Path, config: dict[str, Any] | None = None) -> Self:
        """The authors' ``.pth`` or timm's ``.safetensors``, all sizes read from the shapes (heads are 64 wide in every size).

        Args:
            file: the weights.
            config: the library's keys; on the meta device it is used in place of the file and nothing is read.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: a tensor is unknown or missing.
        """
        if config is not None and on_meta_device():
            return cls.from_config(config)
        if not Path(file).is_file():
            raise FileNotFoundError(f"found '{file}', expected a file of weights")
        assert_readable(file)
        with one_line(file, "a file of weights"):
            stored: Any = load_file(file) if str(file).endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
        state = {name: tensor for name, tensor in stored.get("model", stored).items() if not name.startswith("head.")}
        found, folded = fold_release(state)
        model = HeadlessViT(ViTConfig(**found))
        missing, unknown = model.load_state_dict(folded, strict=False)
        assert_complete(file, {"missing_keys": missing, "unexpected_keys": unknown})
        return cls(model)

    def pooled(self, output: Any) -> Tensor:
        """The class token; there is no pooler."""
        first: Tensor = output.last_hidden_state[:, 0]
        return first


#: Released name -> the library's, where a tensor is copied as it is.
_COPIED = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
}


def fold_release(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a plain ViT that computes what DEiT-III's weights do.

    The scale of a branch multiplies the rows of the branch's last layer. The position of the class token becomes zero.
    """
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    positions = state["pos_embed"]  # [1, N, width], without the class token
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    config = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
        "image_size": patch * round(positions.shape[1] ** 0.5),
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    folded = {"embeddings.position_embeddings": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}
    for name, tensor in state.items():
        place, layer = "", name
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            place, layer = f"layers.{match[1]}.", match[2]
        stem, _, kind = layer.rpartition(".")
        if layer == "pos_embed" or re.fullmatch(r"gamma_[12]|ls[12]\.gamma", layer):
            continue
        if stem == "attn.qkv":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                folded[f"{place}attention.{part}_proj.{kind}"] = rows.clone()
        elif stem in ("attn.proj", "mlp.fc2"):
            number, own = (1, "attention.o_proj") if stem == "attn.proj" else (2, "mlp.fc2")
            block = name.removesuffix(layer)
            scale = state.get(f"{block}gamma_{number}", state.get(f"{block}ls{number}.gamma"))
            scaled = tensor if scale is None else tensor * scale.reshape(-1, *[1] * (tensor.ndim - 1))
            folded[f"{place}{own}.{kind}"] = scaled
        elif layer in _COPIED:
            folded[place + _COPIED[layer]] = tensor
        else:
            folded[f"{place}{_COPIED.get(stem, stem)}.{kind}"] = tensor
    return config, folded
