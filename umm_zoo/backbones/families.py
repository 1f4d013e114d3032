"""Families of checkpoints that this package reads: how they call themselves in ``config.json``, and which class reads them.

The one list behind the hints of wrong folders, the tests of every cell and the tables of the room's README.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind.

    Args:
        name: as people call them.
        stored: what ``config.json`` says, ``model_type`` of transformers or ``_class_name`` of diffusers.
        reader: dotted path of the class that reads them.
        example: a public name of one.
        note: what is particular, for the table.
    """

    name: str
    stored: str
    reader: str
    example: str
    note: str = ""


_HERE = "umm_zoo.backbones."
_ANY_VLM = f"{_HERE}pretrained_vlm.PretrainedVLM"

#: Networks that denoise latents. The note: what they take beside latent, time and tokens; the codec.
DECODERS = (
    Family(
        "Sana", "SanaTransformer2DModel", f"{_HERE}sana.Sana", "Efficient-Large-Model/Sana_1600M_512px_diffusers", "flow; `DCCodec`"
    ),
    Family(
        "Stable Diffusion 3",
        "SD3Transformer2DModel",
        f"{_HERE}sd3.StableDiffusion3",
        "stabilityai/stable-diffusion-3.5-large",
        "flow; pooled vector; `KLCodec`",
    ),
    Family(
        "FLUX.1",
        "FluxTransformer2DModel",
        f"{_HERE}flux.Flux",
        "black-forest-labs/FLUX.1-dev",
        "flow; pooled vector, guidance (dev); `KLCodec`",
    ),
    Family(
        "FLUX.2",
        "Flux2Transformer2DModel",
        f"{_HERE}flux.Flux2",
        "black-forest-labs/FLUX.2-dev",
        "flow; guidance (dev); `Flux2Codec`",
    ),
    Family(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        f"{_HERE}flow_decoders.Lumina2",
        "Alpha-VLLM/Lumina-Image-2.0",
        "flow; at most 299 tokens; `KLCodec`",
    ),
    Family("Z-Image", "ZImageTransformer2DModel", f"{_HERE}flow_decoders.ZImage", "Tongyi-MAI/Z-Image-Turbo", "flow; `KLCodec`"),
    Family(
        "Qwen-Image", "QwenImageTransformer2DModel", f"{_HERE}flow_decoders.QwenImage", "Qwen/Qwen-Image", "flow; `QwenImageCodec`"
    ),
    Family(
        "Stable Diffusion 1, 2",
        "UNet2DConditionModel",
        f"{_HERE}discrete_decoders.StableDiffusion",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "noise or v; `KLCodec`",
    ),
    Family(
        "SDXL",
        "UNet2DConditionModel",
        f"{_HERE}discrete_decoders.StableDiffusionXL",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "noise or v; pooled vector, size and cut; `KLCodec`",
    ),
    Family(
        "PixArt",
        "PixArtTransformer2DModel",
        f"{_HERE}discrete_decoders.PixArt",
        "PixArt-alpha/PixArt-XL-2-1024-MS",
        "noise; size (alpha, 1024 px); `KLCodec`",
    ),
)

#: Images to latents and back.
CODECS = (
    Family("KL", "AutoencoderKL", f"{_HERE}codecs.KLCodec", "black-forest-labs/FLUX.1-dev", "a draw of its posterior"),
    Family("DC", "AutoencoderDC", f"{_HERE}codecs.DCCodec", "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"),
    Family("Tiny", "AutoencoderTiny", f"{_HERE}codecs.TinyCodec", "madebyollin/taef1"),
    Family(
        "RAE",
        "AutoencoderRAE",
        f"{_HERE}normed_codecs.RAECodec",
        "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
        "squares of one size",
    ),
    Family(
        "FLUX.2",
        "AutoencoderKLFlux2",
        f"{_HERE}normed_codecs.Flux2Codec",
        "black-forest-labs/FLUX.2-dev",
        "a draw of its posterior",
    ),
    Family(
        "Qwen-Image", "AutoencoderKLQwenImage", f"{_HERE}normed_codecs.QwenImageCodec", "Qwen/Qwen-Image", "a draw of its posterior"
    ),
)

#: Uses that are proven for every family of a list, by the function of a test that runs once per family.
DECODER_USES = {
    "samples as its pipeline": "test_decoder_pipelines.py::test_latents_are_the_pipelines",
    "trains and generates in a bridge": "test_decoders.py::test_it_is_a_bridges_decoder",
    "masks padding": "test_decoders.py::test_padding_is_not_seen",
    "saved and loaded": "test_decoders.py::test_saved_and_loaded_it_is_the_same_with_its_scheduler",
}
CODEC_USES = {
    "latents and images of the library": "test_library_codecs.py::test_latents_and_images_are_those_of_the_librarys_pipelines",
    "saved and loaded": "test_library_codecs.py::test_saved_and_loaded_it_is_the_same",
}

#: Vision-language models, encoders and text encoders, of transformers.
MODELS = (
    Family("Janus", "janus", f"{_HERE}janus.Janus", "deepseek-community/Janus-Pro-1B"),
    Family("LLaVA-1.5", "llava", f"{_HERE}llava.LlavaBackbone", "llava-hf/llava-1.5-7b-hf"),
    Family("Qwen2.5-VL", "qwen2_5_vl", f"{_HERE}qwen2_5_vl.Qwen25VL", "Qwen/Qwen2.5-VL-3B-Instruct"),
    Family("Qwen2-VL", "qwen2_vl", _ANY_VLM, "Qwen/Qwen2-VL-2B-Instruct"),
    Family("Qwen3-VL", "qwen3_vl", _ANY_VLM, "Qwen/Qwen3-VL-2B-Instruct"),
    Family("LLaVA-1.6", "llava_next", _ANY_VLM, "llava-hf/llava-v1.6-mistral-7b-hf"),
    Family("LLaVA-OneVision", "llava_onevision", _ANY_VLM, "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
    Family("InternVL3", "internvl", _ANY_VLM, "OpenGVLab/InternVL3-1B-hf"),
    Family("SmolVLM", "smolvlm", _ANY_VLM, "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"),
    Family("Gemma 3", "gemma3", _ANY_VLM, "google/gemma-3-4b-it"),
    Family("CLIP", "clip", f"{_HERE}features.CLIPFeatures", "openai/clip-vit-large-patch14-336"),
    Family("CLIP's tower", "clip_vision_model", f"{_HERE}features.CLIPVisionFeatures", "openai/clip-vit-large-patch14-336"),
    Family("SigLIP", "siglip", f"{_HERE}features.SigLIPFeatures", "google/siglip-so400m-patch14-384"),
    Family("DINOv2", "dinov2", f"{_HERE}features.DINOv2Features", "facebook/dinov2-base"),
    Family("DINOv3", "dinov3_vit", f"{_HERE}features.DINOv3Features", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    Family("T5", "t5", f"{_HERE}text_encoder.TextEncoder", "google/t5-v1_1-xxl"),
)


def use(stored: str | None) -> str:
    """The end of an error over weights of another kind than asked for: ``; use …``, or nothing where no class reads them."""
    readers = [family.reader for family in (*DECODERS, *CODECS, *MODELS) if family.stored == stored]
    return f"; use {' or '.join(readers)}" if readers else ""


def table(title: str, families: Sequence[Family], uses: Mapping[str, str]) -> str:
    """Rows of families with a mark under every use, whose tests stand below."""
    heads = [title, "checkpoint, such as", "class", "", *uses]
    rows = [
        [family.name, f"`{family.example}`", f"`{family.reader.removeprefix(_HERE)}`", family.note, *("yes" for _ in uses)]
        for family in families
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    proofs = ", ".join(f"{use} (`{test}`)" for use, test in uses.items())
    return "\n".join(lines) + f"\n\nTests in `tests/backbones`, once per row: {proofs}.\n"


def markdown() -> str:
    """The tables of the room's README."""
    return "\n".join([table("decoder", DECODERS, DECODER_USES), table("codec", CODECS, CODEC_USES)])
