import json

import pytest
import torch

from umm_zoo.backbones.codecs import DCCodec, KLCodec
from umm_zoo.backbones.latent_codec import LatentCodec, draw
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError

KL = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 5,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
DC = {
    "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 8, 16],
    "decoder_block_out_channels": [8, 8, 16],
    "encoder_layers_per_block": [1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [5]],
    "decoder_qkv_multiscales": [[], [], [5]],
    "attention_head_dim": 8,
    "latent_channels": 4,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


def random_images(*size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("kind", "config", "factor"), [(KLCodec, KL, 2), (DCCodec, DC, 4)])
def test_shapes(kind: type[LatentCodec], config: dict, factor: int) -> None:
    codec = kind.from_config(config)
    latents = codec.encode(random_images(3, 3, 8, 12))
    assert codec.downsampling == factor
    assert latents.shape == (3, codec.latent_channels, 8 // factor, 12 // factor)
    assert codec.decode(latents).shape == (3, 3, 8, 12)


def test_kl_scaling_and_shift_stand_in_the_right_order() -> None:
    codec, images = KLCodec.from_config(KL), random_images(2, 3, 8, 8)
    raw = codec.model.encode(images).latent_dist.mean
    torch.testing.assert_close(codec.encode(images), (raw - 0.1159) * 0.3611)
    torch.testing.assert_close(codec.decode(codec.encode(images)), codec.model.decode(raw).sample, atol=1e-5, rtol=1e-4)


def test_dc_only_scales() -> None:
    codec, images = DCCodec.from_config(DC), random_images(2, 3, 8, 8)
    raw = codec.model.encode(images).latent
    torch.testing.assert_close(codec.encode(images, sample=True), raw * 0.41407)
    torch.testing.assert_close(codec.decode(raw * 0.41407), codec.model.decode(raw).sample, atol=1e-5, rtol=1e-4)


def test_a_sample_is_the_library_s_own_draw() -> None:
    codec, images = KLCodec.from_config(KL), random_images(2, 3, 8, 8)
    found = codec.encode(images, sample=True, generator=torch.Generator().manual_seed(4))
    raw = codec.model.encode(images).latent_dist.sample(generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, (raw - 0.1159) * 0.3611)


def test_draw_has_the_stated_mean_and_deviation() -> None:
    mean, log_variance = torch.full((20_000,), 3.0), torch.full((20_000,), 2 * torch.tensor(0.5).log().item())
    sample = draw(mean, log_variance, torch.Generator().manual_seed(0))
    assert abs(sample.mean() - 3.0) < 0.02 and abs(sample.std() - 0.5) < 0.01


def test_statistics_of_a_trained_codec_are_saved(tmp_path) -> None:
    codec = KLCodec.from_config(KL)
    latents = 2.0 + 4.0 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        codec.track_moments(codec.moments(latents), momentum=0.8)
    torch.testing.assert_close(codec.scaling, torch.tensor(0.25), atol=1e-3, rtol=0)
    torch.testing.assert_close(codec.shift, torch.tensor(2.0), atol=2e-2, rtol=0)
    codec.save(tmp_path)
    assert torch.equal(KLCodec.from_pretrained(tmp_path).scaling, codec.scaling)


def test_dc_statistics_are_the_inverse_root_mean_square() -> None:
    codec = DCCodec.from_config(DC)
    for _ in range(80):
        codec.track_moments(codec.moments(torch.tensor([3.0, -4.0])), momentum=0.8)
    torch.testing.assert_close(codec.scaling, torch.tensor(12.5).rsqrt())
    assert codec.shift == 0


def test_other_sizes_than_multiples_of_the_factor_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.image_size: found images of \[7, 8\] pixels, expected multiples of 2"):
        KLCodec.from_config(KL).encode(random_images(1, 3, 7, 8))


def test_per_channel_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="latents_mean"):
        KLCodec.from_config({**KL, "latents_mean": [0.0] * 5})


def test_half_precision_keeps_the_images_dtype(tmp_path) -> None:
    KLCodec.from_config(KL).save(tmp_path)
    codec = KLCodec.from_pretrained(tmp_path, dtype="bfloat16")
    assert codec.model.dtype == torch.bfloat16
    assert codec.encode(random_images(1, 3, 8, 8)).dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["scaling_factor"] == 0.3611


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 4, 16)])
def test_stored_latents_of_another_codec_are_refused(shape: tuple[int, ...]) -> None:
    codec = KLCodec.from_config({**KL, "latent_channels": 4})
    rows = Batch(["a", "b"], [[], []], targets=list(random_images(2, 3, 8, 8)), extras={"latents": torch.zeros(shape)})
    with pytest.raises(UserError, match=r"extras.latents: found .* expected \[4, h, w\]"):
        codec.target_latents(rows)
