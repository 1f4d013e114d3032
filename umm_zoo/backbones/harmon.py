"""A causal language model whose images are read, and instructed to become others, through a masked autoencoder's encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase

from umm_zoo.backbones.adapters import learns
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.decoder_attention import read_no_masks
from umm_zoo.backbones.encoded_rows import ImageLayout, LayoutRule
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.generation import last_position
from umm_zoo.backbones.language_models import assert_decoder, attention_of, grow_vocabulary
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.llava_loading import Dtype, load_decoder, part_config, read_part
from umm_zoo.backbones.loading import find_source, on_meta_device, torch_dtype
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.backbones.recomputing import CHECKPOINTING
from umm_zoo.backbones.square_vlm import LanguageModel
from umm_zoo.backbones.templates import ChatML, ChatTemplate
from umm_zoo.backbones.tokenizer import assert_vocabulary, image_token, is_here, load_tokenizer
from umm_zoo.batch import Grid, Images, Tokens, map_by_size
from umm_zoo.blocks.masked_autoencoder import Encoded, MaskedEncoder, parts_of_mar
from umm_zoo.blocks.transformer import as_tokens
from umm_zoo.errors import Count, Share, UserError


@dataclass
class EncodedPrompts:
    """Prompts behind which tokens of images come again and again: their keys and values, encoded once.

    Args:
        cache: of the language model.
        inputs: the prompts, left-padded.
        states: ``[R, L, D]`` behind the language model.
    """

    cache: DynamicCache
    inputs: VLMInputs
    states: Tensor


class HarmonBackbone(LibraryVLM):
    """Language model and the encoder of a masked autoencoder, which serves reading and generating alike.

    Harmon's (Wu et al., arXiv 2503.21979). To read, the encoder sees a whole image; what it gives, through an MLP, stands in the
    place of the image, the buffers behind the tokens. To generate, it sees the tokens that are known; behind the prompt they pass
    the language model, and a second MLP adds its states to the encoder's. The language model is causal over them in raster order.
    Images may have any size that the codec takes.

    Args:
        language_model: name or folder, also of a LLaVA, whose own it then is; or a configuration with ``model_type`` for random
            weights.
        encoder: of tokens of the codec's channels.
        codec: frozen; makes tokens of images, one per cell.
        text_gradient: factor on the gradient that a language loss sends into the encoder's tokens: .1 in the release.
        config: what a named language model is expected to be; enough for ``--check`` without reading it.
        tokenizer: name or folder; None is the language model's own, the shipped one for random weights.
        template: None is ``ChatML()``.
        max_length: longest row in tokens; longer ones are cut on the right, never through an image.
        dtype: of the language model; ``auto`` is its own.
        gradient_checkpointing: recompute the layers of the language model in the backward pass instead of storing them.

    Raises:
        UserError: encoder and codec do not fit each other.
    """

    image_size = None

    def __init__(
        self,
        language_model: str | dict[str, Any],
        encoder: MaskedEncoder,
        codec: LatentCodec,
        text_gradient: Share = 0.1,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: Count = 2048,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if encoder.channels != codec.latent_channels:
            raise UserError("encoder.channels", f"{encoder.channels}", f"{codec.latent_channels}, the codec's")
        named = language_model if isinstance(language_model, str) else None
        self._tokenizer_source = tokenizer or named
        decoder, head = _decoder(language_model, config, self._tokenizer_source is None, dtype)
        self.template, self.max_length, self.text_gradient = template or ChatML(), max_length, text_gradient
        self.image_token_id = decoder.config.vocab_size
        if is_here(self._tokenizer_source) or not on_meta_device():
            self.image_token_id = image_token(self.tokenizer)
        grow_vocabulary(decoder, head, self.image_token_id + 1)
        if is_here(self._tokenizer_source) or not on_meta_device():
            assert_vocabulary(self.tokenizer, len(decoder.get_input_embeddings().weight))
        read_no_masks(decoder)
        if gradient_checkpointing:
            # the library has renamed it, and warns of the old name
            enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
            enable(CHECKPOINTING)
        self.language_model, self.width = LanguageModel(decoder, head), int(decoder.config.hidden_size)
        self.encoder, self.codec = encoder, freeze(codec)
        self.mlp_in, self.mlp_out = (_mlp(encoder.width, self.width, self.width), _mlp(self.width, self.width, encoder.width))

    # -- structure -----------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer (``--check``, on the meta device, reads none that is not on this machine)."""
        return load_tokenizer(self._tokenizer_source)

    @property
    def text_model(self) -> Any:
        """The library's decoder."""
        return self.language_model.model

    @property
    def lm_head(self) -> nn.Module:
        """The output layer."""
        return self.language_model.lm_head

    def parts(self) -> dict[str, nn.Module]:
        """``encoder``, ``mlp_in``, ``mlp_out``, ``language_model`` (embeddings to ``lm_head``), ``codec``."""
        return {name: getattr(self, name) for name in ("encoder", "mlp_in", "mlp_out", "language_model", "codec")}

    @property
    def _learns_to_see(self) -> bool:
        return any(learns(self.parts()[name]) for name in ("encoder", "mlp_in"))

    # -- reading -------------------------------------------------------------------------------------------------------------

    def image_grid(self, height: int, width: int) -> Grid:
        """One row: the cells, then the buffers."""
        return Grid(1, self.codec.latent_grid(height, width).num_cells + self.encoder.num_buffers)

    def forms_grid(self, height: int, width: int) -> bool:
        """Buffers are no cells."""
        return False

    @property
    def layout_rule(self) -> LayoutRule:
        """As the base class."""
        return _CellsAndBuffers(self.codec.downsampling, self.encoder.num_buffers)

    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The running index."""
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)

    def encode_images(self, images: Images) -> list[Tensor]:
        """As the base class; nothing is hidden, and little of a language loss's gradient comes back."""
        return map_by_size(self._read, images)

    def _read(self, images: Tensor) -> Tensor:
        tokens, grid = self.image_tokens(images)
        encoded = self.encoder(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool), grid)
        made = behind(self.mlp_in(encoded.values), encoded.num_buffers)
        return cast(Tensor, _ScaledGradient.apply(made, self.text_gradient))

    @torch.no_grad()
    def image_tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        """The codec's latents of images of one size as tokens ``[M, N, C]``, and their grid."""
        latents = self.codec.encode(images)
        return as_tokens(latents), Grid(*latents.shape[-2:])

    # -- generating ----------------------------------------------------------------------------------------------------------

    def prompts(self, texts: Sequence[str]) -> VLMInputs:
        """Texts that ask for an image, left-padded, up to where it begins."""
        return self.embed([[{"role": "user", "text": text}] for text in texts], None, [0] * len(texts), for_generation=True)

    def encode_prompts(self, inputs: VLMInputs, rows: Tensor) -> EncodedPrompts:
        """Keys, values and states of prompts, each encoded once for all of its ``rows`` ``[R]``; evaluation mode, no gradient."""
        with torch.no_grad(), evaluation_mode(self):
            cache = DynamicCache()
            states = self.run_whole(inputs, cache)[rows]
            cache.batch_select_indices(rows)
        names = ("token_ids", "embeddings", "attention_mask", "position_ids", "labels", "image_mask")
        own = {name: getattr(inputs, name)[rows] for name in names}
        return EncodedPrompts(cache, replace(inputs, **own, image_places=None, label_places=None), states)

    def instruct(self, encoded: Encoded, prompts: VLMInputs | EncodedPrompts) -> tuple[Encoded, Tokens]:
        """The encoder's tokens with the language model's states behind the prompts added, and the states of the prompts."""
        known = prompts if isinstance(prompts, EncodedPrompts) else None
        inputs = prompts.inputs if isinstance(prompts, EncodedPrompts) else prompts
        kept, length = encoded.num_buffers, inputs.token_ids.shape[1]
        tokens = behind(self.mlp_in(encoded.values), kept).to(inputs.embeddings.dtype)
        counted = behind(encoded.counted, kept)
        places = last_position(inputs.position_ids)[:, None] + counted.long().cumsum(1)
        mask: Tensor | None = torch.cat([inputs.attention_mask, counted], 1)
        if known is None:
            mask = mask if inputs.padded or encoded.mask is not None else None
            hidden = self.run(torch.cat([inputs.embeddings, tokens], 1), mask, torch.cat([inputs.position_ids, places], 1))
            states, hidden = hidden[:, :length], hidden[:, length:]
        else:
            states = known.states
            hidden = self.run(tokens, mask, places, _copied(known.cache))
        added = self.mlp_out(in_front(hidden, kept)).to(encoded.values.dtype)
        return replace(encoded, values=encoded.values + added), Tokens(states, inputs.mask)


class _CellsAndBuffers:
    """Layout of an image as its cells and the buffers, without the model."""

    def __init__(self, downsampling: int, num_buffers: int) -> None:
        self.downsampling, self.num_buffers = downsampling, num_buffers

    def __call__(self, height: int, width: int, count: int) -> ImageLayout:
        """Of one image."""
        return ImageLayout(((height // self.downsampling) * (width // self.downsampling) + self.num_buffers,))


class _ScaledGradient(torch.autograd.Function):
    """The same values, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.factor, None


#: Where the tensors of Harmon's release stand, but for those of ``mar.``.
_PLACES = {"llm.": "language_model", "proj_in.": "mlp_in", "proj_out.": "mlp_out"}


def parts_of_harmon(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of Harmon's release, by the part of the method that takes them, see ``parts_of_mar``; its codec's are left out.

    Raises:
        UserError: these are no tensors of Harmon.
    """
    own: dict[str, dict[str, Tensor]] = {part: {} for part in _PLACES.values()}
    mar: dict[str, Tensor] = {}
    for name, value in state.items():
        begin = next((begin for begin in ("mar.", "vae.", *_PLACES) if name.startswith(begin)), None)
        if begin is None:
            raise UserError("state", f"tensor '{name}'", "those of Harmon's release")
        if begin != "vae.":
            (mar if begin == "mar." else own[_PLACES[begin]])[name.removeprefix(begin)] = value
    return {**parts_of_mar(mar), **own}


def behind(values: Tensor, kept: int) -> Tensor:
    """``[B, S + V, ...]`` with the first S (``kept``) behind the others."""
    return torch.cat([values[:, kept:], values[:, :kept]], dim=1)


def in_front(values: Tensor, kept: int) -> Tensor:
    """Undoes ``behind``."""
    count = values.shape[1] - kept
    return torch.cat([values[:, count:], values[:, :count]], dim=1)


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, out_dim))


def _decoder(source: str | dict[str, Any], stated: dict[str, Any] | None, shipped: bool, dtype: Dtype) -> tuple[Any, Any]:
    """Decoder and output layer, of a named model or of random weights."""
    if isinstance(source, str) and not on_meta_device():
        found, head, _ = load_decoder(find_source(source, AutoModelForCausalLM), dtype, "sdpa", stated)
        return found, head
    fields = stated if isinstance(source, str) else source
    config = read_part(cast(str, source), "text_config") if fields is None else part_config("language_model", fields, shipped)
    assert_decoder("language_model", config)
    precision = torch_dtype("float32" if dtype == "auto" else dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=precision, attn_implementation=attention_of("sdpa", config))
    return model.base_model, model.get_output_embeddings()


def _copied(cache: DynamicCache) -> DynamicCache:
    """One that can be appended to without the other growing."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own
