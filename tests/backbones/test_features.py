import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip import SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from umm_zoo.backbones.feature_encoder import LibraryEncoder
from umm_zoo.backbones.features import (
    CLIPFeatures,
    CLIPVisionFeatures,
    DINOv2Features,
    DINOv3Features,
    SigLIPFeatures,
    SigLIPVisionFeatures,
)
from umm_zoo.backbones.precision import resize_to

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
}
SIGLIP_TEXT = {**TEXT, "projection_size": 16}
DINO2 = {"hidden_size": 16, "mlp_ratio": 2, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}
TINY = [
    (CLIPFeatures, {"vision_config": VISION, "text_config": TEXT, "projection_dim": 6}, 6),
    (SigLIPFeatures, {"vision_config": VISION, "text_config": SIGLIP_TEXT}, 16),
    (CLIPVisionFeatures, VISION, 16),
    (DINOv2Features, DINO2, 16),
    (DINOv3Features, {**VISION, "num_register_tokens": 2}, 16),
    (SigLIPVisionFeatures, VISION, 16),
]


def random_images(*size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("kind", "config", "width"), TINY)
def test_shapes(kind: type[LibraryEncoder], config: dict, width: int) -> None:
    encoder = kind.from_config(config).eval()
    images = random_images(2, 3, 12, 12)
    assert encoder(images).shape == (2, encoder.width) == (2, width)
    assert encoder.tokens(images).shape == encoder.tokens(images, layer=-2).shape == (2, 9, 16)
    assert encoder(random_images(2, 3, 20, 31)).shape == (2, width)


@pytest.mark.parametrize(("kind", "config", "width"), TINY)
def test_round_trip_through_the_library_s_format(kind: type, config: dict, width: int, tmp_path) -> None:
    encoder = kind.from_config(config).eval()
    encoder.save(tmp_path)
    again = kind.from_pretrained(tmp_path, config=config).eval()
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    images = random_images(4, 3, 12, 12)
    torch.testing.assert_close(encoder(images), again(images))


def test_clip_is_the_library_s_forward(tmp_path) -> None:
    encoder = CLIPFeatures.from_config(TINY[0][1]).eval()
    encoder.save(tmp_path)
    library, images = CLIPModel.from_pretrained(tmp_path).eval(), random_images(3, 3, 12, 12)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    end, pad = 3, 0
    ids = encoder.text.tokenizer("a red circle")["input_ids"]
    ids = torch.tensor([[*ids, end] + [pad] * (9 - len(ids))])
    output = library(input_ids=ids, pixel_values=((images + 1) / 2 - mean) / std)
    cosine = torch.nn.functional.cosine_similarity(encoder(images), encoder.encode_text(["a red circle"]))
    torch.testing.assert_close(cosine * library.logit_scale.exp(), output.logits_per_image[:, 0])


def test_siglip_is_the_library_s_forward(tmp_path) -> None:
    encoder = SigLIPFeatures.from_config(TINY[1][1]).eval()
    encoder.save(tmp_path)
    library, images = SiglipModel.from_pretrained(tmp_path).eval(), random_images(3, 3, 12, 12)
    ids = encoder.text.tokenizer("blue")["input_ids"]
    ids = torch.tensor([[*ids, 3] + [0] * (9 - len(ids))])
    output = library(input_ids=ids, pixel_values=images)
    cosine = torch.nn.functional.cosine_similarity(encoder(images), encoder.encode_text(["blue"]))
    torch.testing.assert_close(cosine * 10 - 10, output.logits_per_image[:, 0])


def test_the_penultimate_layer_is_what_enters_the_last_block() -> None:
    encoder = CLIPVisionFeatures.from_config(VISION).eval()
    seen = []
    encoder.model.encoder.layers[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = random_images(2, 3, 12, 12)
    tokens = encoder.tokens(images, layer=-2)
    torch.testing.assert_close(tokens, seen[0][:, 1:])  # without the class token


@pytest.mark.parametrize("kind_config", [TINY[3], TINY[4]])
def test_dino_pools_the_class_token_after_the_norm(kind_config: tuple) -> None:
    kind, config, _ = kind_config
    encoder = kind.from_config(config).eval()
    images = random_images(2, 3, 12, 12)
    output = encoder.model(encoder.pixels(images)).last_hidden_state
    torch.testing.assert_close(encoder(images), output[:, 0])
    torch.testing.assert_close(encoder.tokens(images), output[:, -9:])


@pytest.mark.parametrize(
    ("kind", "part", "config"), [(CLIPFeatures, CLIPVisionFeatures, 0), (SigLIPFeatures, SigLIPVisionFeatures, 1)]
)
def test_the_image_tower_of_a_whole_model(kind: type[LibraryEncoder], part: type[LibraryEncoder], config: int, tmp_path) -> None:
    whole = kind.from_config(TINY[config][1]).eval()
    whole.save(tmp_path)
    tower, images = part.from_pretrained(tmp_path).eval(), random_images(2, 3, 12, 12)
    torch.testing.assert_close(tower.tokens(images), whole.tokens(images))


def test_misspelt_keys_are_refused_at_both_levels() -> None:
    with pytest.raises(ValueError, match="did you mean 'patch_size'"):
        CLIPVisionFeatures.from_config({**VISION, "patchsize": 4})
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        CLIPFeatures.from_config({"vision_config": {"hiden_size": 4}})


def test_a_foreign_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer: found ids up to 1023, expected fewer than .* 100"):
        CLIPFeatures.from_config({"vision_config": VISION, "text_config": {**TEXT, "vocab_size": 100}})


def test_long_texts_keep_their_end_token() -> None:
    encoder = CLIPFeatures.from_config(TINY[0][1])
    ids = encoder.text(["red " * 30, ""], 10)
    assert ids.shape == (2, 10) and ids[0, -1] == 3 and ids[1, 0] == 3


def test_resizing_crops_the_centre_or_squeezes() -> None:
    wide = torch.cat([-torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)], dim=3)  # [1, 3, 8, 24]
    torch.testing.assert_close(resize_to(wide, 8, crop_from=8), torch.zeros(1, 3, 8, 8), atol=1e-5, rtol=0)
    squeezed = resize_to(wide, 6, crop_from=None, mode="bilinear")
    assert squeezed[..., 0].mean() < -0.8 and squeezed[..., -1].mean() > 0.8
    assert resize_to(wide[..., :8], 8, crop_from=9) is not None


SIZES = [(224, 224), (256, 256), (224, 300), (301, 224), (97, 131), (225, 337), (640, 481)]


def library_pixels(kind: type, photo: np.ndarray) -> torch.Tensor:
    """The library's processor with the settings of the public checkpoint; its DINOv3 needs torchvision, so Pillow stands in."""
    if kind is DINOv3Features:
        squeezed = torch.from_numpy(np.array(Image.fromarray(photo).resize((224, 224), Image.Resampling.BILINEAR))).permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return (squeezed / 255 - mean) / std
    processor: Any = {
        CLIPFeatures: lambda: CLIPImageProcessorPil(),
        SigLIPFeatures: lambda: SiglipImageProcessorPil(resample=3),
        DINOv2Features: lambda: BitImageProcessorPil(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
    }[kind]()
    return processor(photo, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "config"), [(kind, config) for kind, config, _ in TINY if kind not in (CLIPVisionFeatures, SigLIPVisionFeatures)]
)
def test_pixels_are_the_stock_processors(kind: type[LibraryEncoder], config: dict, size: tuple[int, int]) -> None:
    """To the 8 bits that its two passes round to; the deviation divided by is .22 at least."""
    side = {"image_size": 518 if kind is DINOv2Features else 224}
    with torch.device("meta"):
        encoder = kind.from_config({**config, **({"vision_config": {**VISION, **side}} if "vision_config" in config else side)})
    coarse = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(sum(size)))
    photo = (torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0] * 255).byte()
    found = encoder.pixels(photo[None].float() / 127.5 - 1)[0]
    assert (found - library_pixels(kind, photo.permute(1, 2, 0).numpy())).abs().max() < 2.5 / 255 / 0.22


OWN = [
    (SigLIPFeatures, SiglipImageProcessorPil(size={"height": 12, "width": 12}, resample=2)),  # SigLIP 2 is bilinear
    (CLIPFeatures, CLIPImageProcessorPil(size={"shortest_edge": 15}, crop_size=12, image_mean=[0.1, 0.2, 0.3], resample=2)),
    (CLIPFeatures, CLIPImageProcessorPil(size={"height": 12, "width": 12}, do_center_crop=False, image_std=[0.5, 0.4, 0.3])),
    (CLIPVisionFeatures, CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})),
    (DINOv2Features, BitImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 8, "width": 8})),
    (DINOv2Features, BitImageProcessorPil(size={"height": 12, "width": 12}, do_center_crop=False, resample=2)),
]


@pytest.mark.parametrize("size", [(12, 12), (15, 15), (20, 31), (41, 17), (8, 8)])
@pytest.mark.parametrize(("kind", "processor"), OWN)
def test_a_checkpoint_brings_its_own_processor(kind: type[LibraryEncoder], processor: Any, size: tuple[int, int], tmp_path) -> None:
    config = next(config for other, config, _ in TINY if other is kind)
    kind.from_config(config).save(tmp_path)
    processor.save_pretrained(tmp_path)
    kind.from_pretrained(tmp_path).save(tmp_path / "again")
    encoder = kind.from_pretrained(tmp_path / "again")
    coarse = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(sum(size)))
    photo = (torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0] * 255).byte()
    expected = processor(photo.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    assert (encoder.pixels(photo[None].float() / 127.5 - 1) - expected).abs().max() < 2.5 / 255 / 0.22


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resample": 0}, "resample: found 0, expected None or 2 or 3"),
        ({"do_normalize": False}, "do_normalize: found False"),
        ({"rescale_factor": 1.0}, "rescale_factor: found 1.0"),
        ({"do_center_crop": False}, "size {'shortest_edge': 12}, crop_size None, expected a square"),
        ({"crop_size": {"height": 12, "width": 8}}, "expected a square, or one cut out"),
    ],
)
def test_a_processor_that_makes_images_in_another_way_is_refused(change: dict, words: str, tmp_path) -> None:
    CLIPVisionFeatures.from_config(VISION).save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 12}, "crop_size": 12, **change}))
    with pytest.raises(ValueError, match=words):
        CLIPVisionFeatures.from_pretrained(tmp_path)


def test_tokens_of_images_of_the_networks_size_see_all_of_them() -> None:
    """Targets and probes read cells in place; at a size that no stock processor makes, images are taken as they are by either."""
    stock = DINOv2Features.from_config({**DINO2, "image_size": 224})
    images = random_images(1, 3, 224, 224)
    cut = (images * 0.5 + 0.5 - torch.tensor(stock.mean)[:, None, None]) / torch.tensor(stock.std)[:, None, None]
    torch.testing.assert_close(stock.pixels(images, whole=True), cut)
    small = DINOv2Features.from_config(DINO2)
    torch.testing.assert_close(small.pixels(images[..., :12, :12]), cut[..., :12, :12])


def test_layers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="expected -4 to -1"):
        CLIPVisionFeatures.from_config(VISION).tokens(random_images(1, 3, 12, 12), layer=-5)


L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
REAL = [
    # https://huggingface.co/openai/clip-vit-large-patch14-336, "0.4B params"
    (
        CLIPFeatures,
        {
            "vision_config": {**L14, "image_size": 336},
            "text_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "vocab_size": 49408, "eos_token_id": 2,
            },
            "projection_dim": 768,
        },
        427_944_193,
        576,
    ),
    (CLIPVisionFeatures, {**L14, "image_size": 336}, 303_507_456, 576),
    # https://huggingface.co/google/siglip-so400m-patch14-384, 878M
    (
        SigLIPFeatures,
        {
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "image_size": 384, "patch_size": 14,
            },
            "text_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "vocab_size": 32000,
            },
        },
        877_960_498,
        729,
    ),
    # https://huggingface.co/facebook/dinov2-large, 304M
    (
        DINOv2Features,
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518, "patch_size": 14},
        304_368_640,
        256,
    ),
    # https://huggingface.co/facebook/dinov3-vitl16-pretrain-lvd1689m, 303M
    (DINOv3Features, {**L14, "patch_size": 16, "image_size": 224, "num_register_tokens": 4}, 303_129_600, 196),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "count", "tokens"), REAL)
def test_real_sizes_are_built_without_memory_or_files(kind: type, config: dict, count: int, tokens: int) -> None:
    with torch.device("meta"):
        encoder = kind.from_pretrained("nowhere/nothing", config=config)
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert encoder.grid.num_cells == tokens


def test_clip_l_parameters_by_hand() -> None:
    """Per block: four D x D projections with bias, an MLP of 4D, two norms."""
    D, N = 1024, 24 * 24
    block = 4 * (D * D + D) + (D * 4 * D + 4 * D) + (4 * D * D + D) + 2 * 2 * D
    assert 3 * 14 * 14 * D + D + (N + 1) * D + 24 * block + 2 * 2 * D == 303_507_456
