"""Perceptual distances against the formula by hand, and against torchmetrics' copy of the LPIPS release."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_configs
import torch
import torchmetrics.functional.image.lpips as release
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.errors import UserError
from umm_zoo.objectives.perceptual import LPIPS, FeatureDistance, unit

#: Configuration D of VGG, as torchvision writes it; the last pooling is not looked behind.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16() -> nn.Sequential:
    torch.manual_seed(0)
    layers, width = list[nn.Module](), 3
    for step in VGG16:
        if step == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += [nn.Conv2d(width, int(step), 3, padding=1), nn.ReLU(inplace=True)]
            nn.init.kaiming_normal_(layers[-2].weight)
            width = int(step)
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    return vgg16()


@pytest.fixture(scope="module")
def weights(network: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as timm's, with a head that is not read."""
    file = tmp_path_factory.mktemp("vgg") / "model.safetensors"
    save_file({f"features.{name}": value for name, value in network.state_dict().items()} | {"head.fc.bias": torch.ones(2)}, file)
    return file


@pytest.fixture(scope="module")
def lpips(weights: Path) -> LPIPS:
    return LPIPS(weights)


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    wanted = torch.rand(2, 3, 24, 16, generator=generator) * 2 - 1
    return (wanted + 0.3 * torch.randn(wanted.shape, generator=generator)).clamp(-1, 1), wanted


def test_lpips_is_the_release_s(lpips: LPIPS, network: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "_get_tv_model_features", lambda *_: network)
    theirs = release._LPIPS(net="vgg")  # its own weights of channels
    found, wanted = pair()
    expected = theirs(found, wanted).flatten()
    assert_close(lpips(found, wanted), expected, rtol=1e-5, atol=1e-6)
    assert (expected > 0.02).all() and lpips(wanted, wanted).abs().max() == 0


def test_lpips_has_a_gradient_where_features_are_all_zero(lpips: LPIPS) -> None:
    found, wanted = (image.requires_grad_() for image in pair())
    lpips(found, wanted).sum().backward()
    assert found.grad.any() and found.grad.isfinite().all() and wanted.grad is None
    assert isinstance(lpips, FrozenBackbone) and not any(parameter.requires_grad for parameter in lpips.parameters())
    dead = torch.zeros(1, 3, 2, 2, requires_grad=True)
    unit(dead).square().sum().backward()
    assert dead.grad.isfinite().all()


def test_lpips_reads_the_files_that_are_named(network: nn.Sequential, weights: Path, tmp_path: Path) -> None:
    torch.save({f"features.{name}": value for name, value in network.state_dict().items()}, tmp_path / "vgg.pth")
    linear = {f"lin{number}.model.1.weight": torch.full((1, width, 1, 1), 2.0) for number, width in enumerate(LPIPS.widths)}
    save_file(linear, tmp_path / "lin.safetensors")
    own = LPIPS(tmp_path / "vgg.pth", tmp_path / "lin.safetensors")
    found, wanted = pair()
    expected = torch.zeros(2)
    for one, other in zip(own.outputs(found), own.outputs(wanted), strict=True):
        cosines = nn.functional.cosine_similarity(one, other, dim=1)  # |a - b|^2 = 2 - 2 cos
        expected += 2.0 * (2 - 2 * cosines).mean(dim=(1, 2))
    assert_close(own(found, wanted), expected, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        assert LPIPS("nowhere.pth").features[0].weight.is_meta
    with pytest.raises(UserError, match=r"lin\.safetensors: found nothing for 'features\.0\.weight', expected \[64, 3, 3, 3\]"):
        LPIPS(tmp_path / "lin.safetensors")
    with pytest.raises(FileNotFoundError, match=r"found 'nowhere\.pth'"):
        LPIPS("nowhere.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match="a web page"):
        LPIPS(weights, tmp_path / "page.pth")


def test_lpips_refuses_images_that_are_pooled_away(lpips: LPIPS) -> None:
    with pytest.raises(UserError, match="found images of 24 x 15 px for LPIPS, expected 16 px or more"):
        lpips(*(image[..., :15] for image in pair()))


def test_a_feature_distance_is_that_of_normalised_tokens() -> None:
    torch.manual_seed(0)
    distance = FeatureDistance(CLIPVisionFeatures.from_config(tiny_configs.clip()))
    found, wanted = (image.requires_grad_() for image in pair())
    tokens = [distance.encoder.tokens(image) for image in (found, wanted)]
    one, other = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for x in tokens)
    assert_close(distance(found, wanted), (one - other).square().mean(dim=(1, 2)))
    distance(found, wanted).sum().backward()
    assert found.grad.any() and wanted.grad is None and isinstance(distance.encoder, FrozenBackbone)
