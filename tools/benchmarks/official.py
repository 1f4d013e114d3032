"""Official code of ROSS and MetaQuery, from clones that the user has, on models of random weights at the sizes of ours.

Nothing of it is copied: its classes are imported and put together with small parts in place of the downloads that their
constructors make. Written for ROSS at commit 20ffc6b and MetaQuery at 206f6de, and for the versions in tools/constraints.txt.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from tools.benchmarks.base import Options


def missing(folder: str, modules: tuple[str, ...] = ()) -> str:
    """Why official code cannot run, or nothing."""
    if not folder or not Path(folder).is_dir():
        return "no clone of the official code was given"
    return next((f"{name} is not installed" for name in modules if find_spec(name) is None), "")


class _Empty(Loader):
    """Finder of a torchvision without contents: both codes import it at their top, neither needs it for a training step."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module: Any = MagicMock(spec=None)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def use(folder: str) -> None:
    """Make the code of a clone importable."""
    import transformers.models.auto  # noqa: F401  the libraries look for the real torchvision before there is an empty one

    if find_spec("torchvision") is None:
        sys.meta_path.append(_Empty())
    sys.path.insert(0, str(Path(folder).resolve()))


def ross_head(options: Options, width: int, channels: int, head_width: int) -> Any:
    """ROSS's denoiser over its diffusion: ``(states [B, D, h, w], targets [B, C, h, w]) -> losses``."""
    use(options.ross)
    from ross.model.multimodal_denoiser.denoiser_dit import RossDenoiser

    return RossDenoiser(channels, width, head_width, depth=3, n_patches=options.grid**2)


def ross_loss(options: Options, vlm: Any, codec: Any, head: Any, batch: Any) -> tuple[list[Any], Callable[[], Any]]:
    """Trained parameters and the loss of a step of ROSS's model, with the weights of a ``LlavaBackbone``, on its batch."""
    import torch

    use(options.ross)
    from ross.constants import IMAGE_TOKEN_INDEX
    from ross.model.language_model.ross_llama import RossConfig, RossLlamaForCausalLM
    from transformers import CLIPVisionModel

    config = RossConfig(**{**vlm.config.text_config.to_dict(), "model_type": "ross_llama"})
    config.pretraining_tp = 1
    config._attn_implementation = "sdpa"
    model, tower = RossLlamaForCausalLM(config), CLIPVisionModel(vlm.config.vision_config).eval()

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tower

        def forward(self, images: Any, return_cls_token: bool) -> Any:
            with torch.no_grad():
                return self.model(images, output_hidden_states=True).hidden_states[-2][:, 1:]

    class Decoder(torch.nn.Module):
        scaling_factor, shift_factor = 1.0, 0.0

        def encode(self, images: Any) -> Any:
            return codec.model.encode(images)

    inner = model.model
    inner.vision_tower, inner.pixel_decoder = Tower(), Decoder()
    layers = (torch.nn.Linear(tower.config.hidden_size, vlm.width), torch.nn.GELU(), torch.nn.Linear(vlm.width, vlm.width))
    inner.mm_projector, inner.mm_inv_projector = torch.nn.Sequential(*layers), head
    inner.image_embed_len, config.ross_enable = options.grid**2, True
    config.decode_image_size = 2 * options.grid * codec.downsampling
    config.image_mean, config.image_std = [0.5] * 3, [0.5] * 3
    model.to(options.device).train()

    inputs = vlm.inputs_of(batch)
    image, first = inputs.image_mask, inputs.image_mask.int().argmax(1)
    place = torch.arange(image.shape[1], device=image.device)
    kept = ~image | (place == first[:, None])  # one word stands for all tokens of the image
    ids = inputs.token_ids.masked_fill(image, IMAGE_TOKEN_INDEX)[kept].view(len(image), -1)
    labels = inputs.labels[kept].view(len(image), -1)
    images = torch.stack(list(batch.images))

    def loss() -> Any:
        return model(input_ids=ids, labels=labels, images=images, return_dict=True, output_attentions=False).loss

    trained = [
        p
        for part in (inner.layers, inner.norm, inner.embed_tokens, model.lm_head, inner.mm_projector, head)
        for p in part.parameters()
    ]
    return trained, loss


def metaquery_loss(options: Options, ours: Any, batch: Any, recompute: bool) -> tuple[list[Any], Callable[[], Any]]:
    """Trained parameters and the loss of a step of MetaQuery's model, of the weights of our method, on its batch.

    Args:
        options: of the benchmark.
        ours: method whose language model, decoder and codec it uses.
        batch: rows of text with targets.
        recompute: gradient checkpointing as its configurations ask for it.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

    use(options.metaquery)
    from diffusers.models.normalization import RMSNorm
    from models.metaquery import MetaQuery
    from models.model import MLLMInContext
    from models.transformer_encoder import Qwen2Encoder
    from transformers import Qwen2Config

    inner, outer = (torch.nn.Module.__new__(kind) for kind in (MLLMInContext, MetaQuery))
    for module in (inner, outer):
        torch.nn.Module.__init__(module)
    inputs = ours.vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True)
    # new ones, for ours are frozen by their type: they stay in evaluation, where the library recomputes nothing
    config = copy.deepcopy(ours.vlm.model.config)
    config._attn_implementation = "sdpa"
    vlm, transformer = type(ours.vlm.model)(config), SanaTransformer2DModel(**ours.decoder.model.config)
    width, queries = ours.vlm.width, options.queries
    words = vlm.get_input_embeddings().num_embeddings
    vlm.resize_token_embeddings(words + queries + 2, mean_resizing=False)
    vlm.lm_head = torch.nn.Identity()
    old = torch.arange(words, device=options.device)
    embeddings = vlm.get_input_embeddings().weight
    vlm.requires_grad_(False)
    embeddings.requires_grad_(True).register_hook(lambda gradient: gradient.index_fill_(0, old, 0))
    inner.mllm_type, inner.mllm_backbone, inner.transformer = "qwenvl", vlm, transformer
    inner.boi_token_id, inner.eoi_token_id = words, words + queries + 1
    inner.tokenizer = SimpleNamespace(num_metaqueries=queries)
    heads = {"num_attention_heads": options.heads, "num_key_value_heads": options.heads}
    sizes: dict[str, Any] = {
        "rope": True,
        "qk_norm": True,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": options.depth,
        **heads,
    }
    encoder = Qwen2Encoder(Qwen2Config(**sizes, initializer_range=0.014, use_cache=False))
    encoder.gradient_checkpointing = recompute
    if recompute:
        vlm.gradient_checkpointing_enable({"use_reentrant": False})
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
        inner.transformer.enable_gradient_checkpointing()
    out = ours.decoder.condition_dim
    rest = (torch.nn.Linear(width, out), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(out, out), RMSNorm(out, eps=1e-5))
    inner.connector = torch.nn.Sequential(encoder, *rest)
    outer.model, outer.vae, outer.loss_type = inner, ours.codec.model, "flow"
    outer.noise_scheduler = FlowMatchEulerDiscreteScheduler()
    outer.to(options.device).train()
    outer.vae.requires_grad_(False)

    new = torch.arange(words, words + queries + 2, device=inputs.token_ids.device).expand(len(inputs.token_ids), -1)
    ids = torch.cat([inputs.token_ids, new], 1)
    mask = torch.cat([inputs.attention_mask.long(), torch.ones_like(new)], 1)
    target = torch.stack(list(batch.requested))
    trained = [embeddings, *inner.connector.parameters(), *inner.transformer.parameters()]
    return trained, lambda: outer(target=target, input_ids=ids, attention_mask=mask)["loss"]
