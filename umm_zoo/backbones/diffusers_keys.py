"""Keys of the networks of diffusers: since when they are there, and which change nothing."""

from __future__ import annotations

#: Releases of diffusers in which a key came to a network that had been there before; what an older file leaves out it cannot mean
#: otherwise than by the library's default, which is what the network did until then.
SINCE: dict[str, dict[str, str]] = {
    "AutoencoderKL": {
        "scaling_factor": "0.14",
        "force_upcast": "0.19",
        "latents_mean": "0.27",
        "latents_std": "0.27",
        "shift_factor": "0.29",
        "use_quant_conv": "0.29",
        "use_post_quant_conv": "0.29",
        "mid_block_add_attention": "0.30",
    },
    "AutoencoderDC": {"encoder_out_shortcut": "0.35", "decoder_in_shortcut": "0.35", "decoder_conv_act_fn": "0.35"},
    "SanaTransformer2DModel": {
        "guidance_embeds": "0.33",
        "guidance_embeds_scale": "0.33",
        "qk_norm": "0.33",
        "timestep_scale": "0.33",
    },
    "SD3Transformer2DModel": {"dual_attention_layers": "0.31", "qk_norm": "0.31"},
    "FluxTransformer2DModel": {"out_channels": "0.32"},
    "Flux2Transformer2DModel": {"guidance_embeds": "0.37"},
    "ZImageTransformer2DModel": {"siglip_feat_dim": "0.37"},
    "QwenImageTransformer2DModel": {"zero_cond_t": "0.37", "use_additional_t_cond": "0.37", "use_layer3d_rope": "0.37"},
    "AutoencoderKLFlux2": {"decoder_block_out_channels": "0.38"},
    "AutoencoderKLQwenImage": {"input_channels": "0.37"},
    "AutoencoderTiny": {"upsample_fn": "0.28", "shift_factor": "0.30"},
    "PixArtTransformer2DModel": {"interpolation_scale": "0.27", "use_additional_conditions": "0.28"},
    "UNet2DConditionModel": {
        "dual_cross_attention": "0.8",
        "only_cross_attention": "0.9",
        "use_linear_projection": "0.9",
        "num_class_embeds": "0.9",
        "upcast_attention": "0.10",
        "mid_block_type": "0.11",
        "class_embed_type": "0.11",
        "resnet_time_scale_shift": "0.11",
        "time_embedding_type": "0.13",
        "timestep_post_act": "0.13",
        "time_cond_proj_dim": "0.13",
        "conv_in_kernel": "0.13",
        "conv_out_kernel": "0.13",
        "projection_class_embeddings_input_dim": "0.13",
        "encoder_hid_dim": "0.15",
        "resnet_skip_time_act": "0.15",
        "resnet_out_scale_factor": "0.15",
        "time_embedding_act_fn": "0.15",
        "class_embeddings_concat": "0.15",
        "mid_block_only_cross_attention": "0.15",
        "cross_attention_norm": "0.15",
        "addition_embed_type": "0.16",
        "time_embedding_dim": "0.16",
        "addition_embed_type_num_heads": "0.16",
        "encoder_hid_dim_type": "0.17",
        "transformer_layers_per_block": "0.18",
        "num_attention_heads": "0.18",
        "addition_time_embed_dim": "0.18",
        "attention_type": "0.20",
        "reverse_transformer_layers_per_block": "0.22",
    },
}
#: Keys of diffusers that no output depends on.
HARMLESS = {
    "sample_size": ("AutoencoderKL", "UNet2DConditionModel", "AutoencoderKLFlux2"),
    "force_upcast": ("AutoencoderKL",),
    "dropout": ("SanaTransformer2DModel", "UNet2DConditionModel", "PixArtTransformer2DModel"),
}
