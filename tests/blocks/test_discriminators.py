"""Discriminators: their contract, what each sees, and the sums of the releases."""

from __future__ import annotations

import pytest
import tiny_configs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.blocks.discriminators import FeatureDiscriminator, PatchDiscriminator, TimeDiscriminator
from umm_zoo.blocks.stylegan_discriminator import StyleGANDiscriminator
from umm_zoo.errors import UserError
from umm_zoo.objectives.adversarial import AdversarialLoss, frozen_call
from umm_zoo.testing.contract import check_block


def images(count: int = 3, height: int = 24, width: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_patches_are_judged(norm) -> None:
    torch.manual_seed(0)
    check_block(PatchDiscriminator(8, 2, norm), (images(),), (3, 1, 4, 2))
    check_block(PatchDiscriminator(8, 2, norm, context_dim=2), (images(), images(channels=2)), (3, 1, 4, 2))


def test_time_and_a_noisy_image_are_judged_with_it() -> None:
    torch.manual_seed(0)
    judge, times = TimeDiscriminator(8, 2), torch.tensor([0.1, 0.5, 0.9])
    torch.nn.init.normal_(judge.modulation.weight, std=0.3)
    check_block(judge, (images(), images(seed=1), times), (3, 1, 4, 2))
    one = judge(images(), images(seed=1), times)
    for other in (judge(images(), images(seed=2), times), judge(images(), images(seed=1), times + 0.05)):
        assert ((one - other).abs().amax(dim=(1, 2, 3)) > 1e-4).all()
    with pytest.raises(UserError, match="found a TimeDiscriminator without a noisy image or its time"):
        judge(images())
    with pytest.raises(UserError, match="found a context of 0 channels for a discriminator, expected 2 channels"):
        PatchDiscriminator(4, 2, context_dim=2)(images())


def test_tokens_of_a_frozen_encoder_are_judged() -> None:
    torch.manual_seed(0)
    encoder = CLIPVisionFeatures.from_config(tiny_configs.clip(image_size=12))
    judge = FeatureDiscriminator(encoder, layers=[-1, -2], width=8)
    check_block(judge, (images(2, 12, 12),), (2, 2, 3, 3))
    shown = images(2, 12, 12).requires_grad_()
    judge.train()(shown).square().mean().backward()
    assert shown.grad.any() and all(parameter.grad is None for parameter in encoder.parameters())
    assert not encoder.training and all(parameter.grad.any() for parameter in judge.heads.parameters())
    assert_close(encoder.tokens_of(shown, (-2, -1))[0], encoder.tokens(shown, -2))


def test_a_patch_discriminator_is_the_release_s_sum_under_its_names() -> None:
    """Convolutions of 4 x 4, strides 2, 2, 1, 1, leaky by 0.2, batch norms in between without a bias beside them."""
    torch.manual_seed(0)
    judge, x = PatchDiscriminator(4, 2), images(2)
    state = judge.state_dict()
    shapes = {name: list(value.shape) for name, value in state.items() if name.endswith("weight")}
    assert shapes == {
        "main.0.weight": [4, 3, 4, 4],
        "main.2.weight": [8, 4, 4, 4],
        "main.3.weight": [8],
        "main.5.weight": [16, 8, 4, 4],
        "main.6.weight": [16],
        "main.8.weight": [1, 16, 4, 4],
    }
    assert {name for name in state if name.endswith("bias")} == {f"main.{place}.bias" for place in (0, 3, 6, 8)}
    found = judge(x)
    x = F.conv2d(F.pad(x, (1, 1, 1, 1)), state["main.0.weight"], state["main.0.bias"], stride=2)
    for place, stride in ((2, 2), (5, 1)):
        x = torch.where(x > 0, x, 0.2 * x)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), state[f"main.{place}.weight"], stride=stride)
        mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, correction=0)
        scale, shift = (state[f"main.{place + 1}.{name}"][:, None, None] for name in ("weight", "bias"))
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
    x = torch.where(x > 0, x, 0.2 * x)
    assert_close(found, F.conv2d(F.pad(x, (1, 1, 1, 1)), state["main.8.weight"], state["main.8.bias"]), rtol=1e-4, atol=1e-5)


def test_a_patch_has_70_pixels_at_three_layers() -> None:
    judge = PatchDiscriminator(4, norm="group").double().eval()
    for layer in judge.main:
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x  # type: ignore[method-assign]
    x = torch.zeros(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    judge(x + 0.1)[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum(dim=(0, 1))
    assert [int((seen.sum(dim=side) > 0).sum()) for side in (0, 1)] == [70, 70]


def test_an_image_without_a_whole_patch_is_refused() -> None:
    assert PatchDiscriminator(4, 2)(images(2, 12, 12)).shape[-2:] == (1, 1)
    small = images(2, 24, 11)
    for judge in (PatchDiscriminator(4, 2, context_dim=3), TimeDiscriminator(4, 2)):
        with pytest.raises(UserError, match="found images of 24 x 11 px for a discriminator of 2 layers, expected 12 px or more"):
            judge(small, small, torch.rand(2))


def test_under_group_norm_each_image_is_judged_alone() -> None:
    judge = PatchDiscriminator(8, 2, "group")
    assert_close(judge(images())[1:2], judge(images()[1:2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["batch", "features"])
def test_a_frozen_copy_says_what_the_discriminator_will_say(kind: str) -> None:
    torch.manual_seed(0)
    encoder = CLIPVisionFeatures.from_config(tiny_configs.clip())
    judge = (PatchDiscriminator(8, 2) if kind == "batch" else FeatureDiscriminator(encoder, width=8)).train()
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    copied = frozen_call(judge, images().requires_grad_())
    assert copied.requires_grad and all(torch.equal(value, before[name]) for name, value in judge.state_dict().items())
    assert torch.equal(copied, judge(images()))
    terms = AdversarialLoss(r1=1.0, r1_every=1).terms(judge, images(), images(seed=1).requires_grad_(), 0)
    torch.stack([*terms.values()]).sum().backward()
    assert terms["r1"] > 0 and all(parameter.grad is not None for parameter in judge.parameters() if parameter.requires_grad)


def test_a_stylegan_discriminator_is_the_release_s_under_its_names() -> None:
    """Numbers of BSQ-ViT's module with these weights; two images have a deviation of their own."""
    judge = StyleGANDiscriminator(16, base=96, most=10)
    with torch.no_grad():
        for place, (_, parameter) in enumerate(sorted(judge.named_parameters())):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64) * (0.7 + 0.1 * place) + place
            parameter.copy_(numbers.sin().view_as(parameter) * 1.4)
    blocks = {f"b16.{name}" for name in ("fromrgb.weight", "fromrgb.bias")} | {"b4.conv.weight", "b4.fc.weight", "b4.out.weight"}
    blocks |= {f"b{size}.{name}.weight" for size in (16, 8) for name in ("conv0", "conv1", "skip")}
    assert blocks < set(judge.state_dict()) and judge.b16.conv1.weight.shape == (10, 6, 3, 3)
    x = (torch.arange(4 * 3 * 16 * 16, dtype=torch.float64) * 0.37).sin().view(4, 3, 16, 16).float()
    assert_close(judge(x), torch.tensor([[-2.1051154], [-2.0392442], [-1.9939411], [-2.0859587]]), rtol=1e-5, atol=1e-5)
    assert_close(judge(x[:2]), torch.tensor([[-2.1027861], [-2.0375826]]), rtol=1e-5, atol=1e-5)


def test_a_whole_image_of_one_size_is_judged() -> None:
    torch.manual_seed(0)
    judge = StyleGANDiscriminator(8, base=64, most=8)
    check_block(judge, (images(3, 8, 8),), (3, 1))
    with pytest.raises(UserError, match="found images of 8 x 16 px, expected 8 x 8 px"):
        judge(images(3, 8, 16))
    with pytest.raises(ValueError, match="found 24, expected a power of 2"):
        StyleGANDiscriminator(24)
    penalty = AdversarialLoss(r1=1.0, r1_every=1).terms(judge, images(2, 8, 8), images(2, 8, 8, seed=1), 0)["r1"]
    penalty.backward()
    assert judge.b8.conv0.weight.grad.any()
