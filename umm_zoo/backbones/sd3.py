"""Stable Diffusion 3 and 3.5 through diffusers: image and text tokens in one attention, over 16-channel latents."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models import SD3Transformer2DModel
from torch import Tensor

from umm_zoo.backbones.pooled import PooledDecoder
from umm_zoo.batch import Grid


class MaskedJointAttention:
    """The library's joint attention with a mask over the text tokens, which its own leaves out.

    Without a mask it is the library's, bit for bit. UAE's release pads the two branches of guidance to one length and lets the
    decoder see the padding; here a caption gives the same image whatever else is in the batch.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args: attention_mask: ``[B, 1, 1, h*w + N]`` bool. The second attention of SD3.5-medium sees the image alone."""
        size, count = hidden_states.shape[:2]

        def split(x: Tensor, norm: Any) -> Tensor:  # [B, N, D] -> [B, heads, N, D / heads]
            x = x.view(size, x.shape[1], attn.heads, -1).transpose(1, 2)
            return x if norm is None else norm(x)

        query = split(attn.to_q(hidden_states), attn.norm_q)
        key = split(attn.to_k(hidden_states), attn.norm_k)
        value = split(attn.to_v(hidden_states), None)
        if encoder_hidden_states is not None:
            query = torch.cat([query, split(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=2)
            key = torch.cat([key, split(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=2)
            value = torch.cat([value, split(attn.add_v_proj(encoder_hidden_states), None)], dim=2)
        else:
            attention_mask = None
        mixed = F.scaled_dot_product_attention(query, key, value, attention_mask)
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)  # [B, h*w + N, D]
        image = attn.to_out[1](attn.to_out[0](mixed[:, :count]))
        if encoder_hidden_states is None:
            return image
        text = mixed[:, count:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


class StableDiffusion3(PooledDecoder):
    """SD3's multimodal diffusion transformer (Esser et al., 2024, arXiv 2403.03206): UAE's decoder, in its 3.5-large size.

    Text tokens of width 4096 pass every block beside those of the image; their positions are their order only. The network also
    takes one vector of the whole text (``PooledDecoder``): UAE's release gives it that of the empty string, under two CLIPs.

    SD3.5-large: 38 blocks of width 2432, 8.06 billion parameters, latents of 16 channels in patches of 2 x 2
    (``stabilityai/stable-diffusion-3.5-large``, subfolder ``transformer``; the codec is ``KLCodec`` with scaling 1.5305 and shift
    0.0609, subfolder ``vae``).

    Args:
        model: the library's network.
        pooled: ``[pooled_projection_dim]``, the constant; None is zeros.
    """

    kind = SD3Transformer2DModel
    condition_rms = 1.0  #: our choice: no published number is known, and UAE's connector ends without a norm
    release_scheduler: ClassVar[dict[str, Any]] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    pooled_parts = (("", True), ("_2", True))

    def __init__(self, model: SD3Transformer2DModel, pooled: Tensor | None = None) -> None:
        config: Any = model.config
        self.assert_fit(config)
        super().__init__(config.pooled_projection_dim, pooled)
        processor: Any = MaskedJointAttention()  # the library's hints list its own classes only
        model.set_attn_processor(processor)
        self.model = model
        self.condition_dim, self.latent_channels, self.patch = config.joint_attention_dim, config.in_channels, config.patch_size

    def takes(self, grid: Grid) -> bool:
        """See ``ImageDecoder``; the table of positions has an edge."""
        return super().takes(grid) and max(grid) <= self.model.config.pos_embed_max_size * self.patch

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward, with the time as its own pipeline gives it (0 to 1000)."""
        joint = None
        if mask is not None:
            cells = noisy.shape[-2] * noisy.shape[-1] // self.patch**2
            joint = {"attention_mask": F.pad(mask, (cells, 0), value=True)[:, None, None]}  # [B, 1, 1, h*w + N]
        predicted: Tensor = self.model(
            hidden_states=noisy,
            encoder_hidden_states=values,
            pooled_projections=self.pooled_for(noisy),
            timestep=time * self.num_train_times,
            joint_attention_kwargs=joint,
            return_dict=False,
        )[0]
        return predicted
