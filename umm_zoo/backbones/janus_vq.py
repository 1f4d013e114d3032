"""Janus's image tokens: a vector-quantised autoencoder with a normalised codebook, through transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusVQVAE, JanusVQVAEConfig

from umm_zoo.backbones.by_shape import numbers
from umm_zoo.backbones.loading import (
    assert_known,
    assert_stated,
    checked_config,
    find_source,
    load_checkpoint,
    on_meta_device,
    torch_dtype,
)
from umm_zoo.backbones.token_codec import TokenCodec
from umm_zoo.batch import Grid

#: Groups of the library's normalisation layers, which every number of channels must be a multiple of.
_GROUPS = 32


@dataclass
class Reconstruction:
    """What a vector-quantised autoencoder is trained with.

    Shape:
        - images: ``[M, 3, H, W]``, not clamped; their gradient passes the codes straight through to the encoder.
        - codebook: ``[]``, mean squared distance of the chosen codes from the latents; its gradient moves the codes.
        - commitment: ``[]``, the same number; its gradient moves the encoder.
    """

    images: Tensor
    codebook: Tensor
    commitment: Tensor

    def regularisation(self, commitment: float = 0.25) -> Tensor:
        """Codebook and commitment terms with the release's weights, 1 and .25 (``vq_model.py``)."""
        return self.codebook + commitment * self.commitment


class JanusVQ(TokenCodec):
    """The tokenizer of LlamaGen and Janus (Sun et al., arXiv 2406.06525, section 3.1), ``JanusVQVAE``: one code per cell.

    Codes are looked up between unit vectors, as in the release; the library's own ``encode`` forgets to normalise. It stays in
    evaluation mode.

    Args:
        model: the library's network.
    """

    def __init__(self, model: JanusVQVAE) -> None:
        super().__init__()
        config: Any = model.config
        self.model: Any = model.eval()
        self.num_codes, self.downsampling = config.num_embeddings, vq_downsampling(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: str = "float32") -> JanusVQ:
        """Random weights of any size; nothing is read from disk.

        Args:
            config: fields of the library's ``JanusVQVAEConfig``.
            dtype: of the weights.

        Raises:
            ValueError: an unknown field, or numbers of channels that the library's layers refuse.
        """
        return cls(JanusVQVAE._from_config(vq_config(config), dtype=torch_dtype(dtype)))

    @classmethod
    def from_pretrained(cls, source: str, config: Mapping[str, Any] | None = None, dtype: str = "auto") -> JanusVQ:
        """Weights of a VQ alone, or those inside a whole Janus, in the library's format.

        Args:
            source: name or folder.
            config: what the checkpoint is expected to be; on the meta device it is used in its place and nothing is read.
            dtype: ``auto`` is the checkpoint's own.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; the configuration is not the one stated.
        """
        source = find_source(source, JanusVQVAE)
        if on_meta_device():
            found: Any = vq_config(config) if config is not None else checked_config(JanusVQVAE, source)
            found = found or JanusVQVAEConfig.from_pretrained(source)
            return cls(JanusVQVAE._from_config(found, dtype=torch_dtype("float32" if dtype == "auto" else dtype)))
        inside = {r"^model\.vqmodel\.": ""}
        model = load_checkpoint(JanusVQVAE, source, dtype, ("model.", "lm_head."), config, key_mapping=inside)
        assert_stated(source, config, model.config)
        return cls(model)

    def save(self, folder: str) -> None:
        """Write the weights in the library's format, for ``from_pretrained`` here or there."""
        self.model.save_pretrained(folder)

    def train(self, mode: bool = True) -> JanusVQ:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)

    @property
    def codebook(self) -> Tensor:
        """The codes as unit vectors, ``[K, E]``."""
        book = self.model.quantize.embedding  # called, not read: it may be one that waits on the CPU until it is
        return F.normalize(book(numbers(book.weight.device, book.num_embeddings)), dim=-1)

    def latents(self, images: Tensor) -> Tensor:
        """Unit vectors of the cells, ``[M, E, h, w]``, before they are rounded to codes."""
        self.token_grid(*images.shape[-2:])
        return F.normalize(self.model.quant_conv(self.model.encoder(images.to(self.model.dtype))), dim=1)

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """As the base class, D = 1."""
        return self._nearest(self.latents(images)).flatten(1)[..., None]

    @torch.no_grad()
    def images(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """As the base class; what the network exceeds [-1, 1] by is cut off, as in the release."""
        h, w = self.grid_of(codes, grid)
        latents = self.codebook[codes[..., 0]].unflatten(1, (h, w)).permute(0, 3, 1, 2)  # [M, E, h, w]
        return self._decode(latents).clamp(-1, 1)

    def reconstruct(self, images: Tensor) -> Reconstruction:
        """Images through the codes, differentiable. The library's ``forward`` decodes from the codes' numbers: no gradient."""
        latents = self.latents(images)  # [M, E, h, w]
        chosen = self.codebook[self._nearest(latents)].permute(0, 3, 1, 2)
        codebook, commitment = F.mse_loss(chosen, latents.detach()), F.mse_loss(latents, chosen.detach())
        return Reconstruction(self._decode(latents + (chosen - latents).detach()), codebook, commitment)

    @torch.no_grad()
    def _nearest(self, latents: Tensor) -> Tensor:
        """Numbers of the nearest codes, ``[M, h, w]``; an image at a time, for K similarities per cell are many."""
        codebook = self.codebook.float().T  # [E, K]
        return torch.stack([(image.permute(1, 2, 0).float() @ codebook).argmax(-1) for image in latents])

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decoder(self.model.post_quant_conv(latents))


def vq_downsampling(config: JanusVQVAEConfig) -> int:
    """Pixels per cell along one side: every level but the last halves the sides."""
    return int(2 ** (len(config.channel_multiplier) - 1))


def vq_config(fields: Mapping[str, Any], where: str = "config") -> JanusVQVAEConfig:
    """The library's configuration from plain fields.

    Raises:
        ValueError: an unknown field, or numbers of channels that the library's layers refuse.
    """
    assert_known(where, fields, JanusVQVAEConfig().to_dict())
    config = JanusVQVAEConfig(**{key: value for key, value in fields.items() if key != "model_type"})
    for multiplier in config.channel_multiplier:
        if (channels := config.base_channels * multiplier) % _GROUPS:
            expected = f"multiples of {_GROUPS}, the groups of its normalisation"
            raise ValueError(f"{where}: found base_channels * channel_multiplier = {channels}, expected {expected}")
    return config
