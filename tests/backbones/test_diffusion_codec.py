"""A codec whose decoder draws: its times, its scales, and what an exact network would draw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.backbones.diffusion_codec import ConvEncoder, DiffusionCodec, UNetPixelDenoiser, cells_of
from umm_zoo.backbones.patch_codec import PatchEncoder, PatchPixelDenoiser
from umm_zoo.batch import Tokens
from umm_zoo.errors import UserError
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.schedules import ReversedLog
from umm_zoo.objectives.solvers import Euler
from umm_zoo.objectives.times import LogitNormalTimes
from umm_zoo.pretraining.epsilon_vae import EpsilonVAE
from umm_zoo.testing import check_block


def codec(gamma: float = 0.6, deviation: float = 0.5, steps: int = 3) -> DiffusionCodec:
    torch.manual_seed(0)
    objective = FlowMatching(LogitNormalTimes(), num_steps=steps, schedule=ReversedLog(), solver=Euler())
    encoder, denoiser = ConvEncoder(3, [8, 8], 1, groups=4), UNetPixelDenoiser(3, [8, 8], 1, groups=4)
    return DiffusionCodec(encoder, denoiser, objective, gamma, deviation).eval()


@pytest.mark.parametrize(
    ("steps", "times"),
    [(3, [1, 0.913037401, 0.765739459, 0]), (2, [1, 0.851645689, 0]), (1, [1, 0])],
)
def test_steps_grow_towards_the_data(steps: int, times: list[float]) -> None:
    assert ReversedLog()(steps, 8, 8).times == pytest.approx(times, abs=1e-9)


def test_a_flow_between_noise_and_a_weakened_image() -> None:
    made = codec(gamma=0.6)
    images, noise, time = (
        torch.tensor([1.0, -0.5]).view(1, 2, 1, 1),
        torch.tensor([0.2, 0.4]).view(1, 2, 1, 1),
        torch.tensor([0.25]),
    )
    point = made.objective.interpolate(made.gamma * images, time, noise)
    assert_close(point.noisy.flatten(), torch.tensor([0.75 * 0.6 + 0.05, -0.75 * 0.3 + 0.1]))
    assert_close(point.velocity.flatten(), torch.tensor([0.2 - 0.6, 0.4 + 0.3]))
    assert_close(made.clean(point.noisy, time, point.velocity), images)
    assert_close(made.clean(point.noisy, time, point.velocity + 0.1), images - 0.25 * 0.1 / 0.6)


def test_the_network_gets_points_at_unit_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = codec(gamma=0.6, deviation=1.0), list[Tensor]()
    monkeypatch.setattr(made.denoiser, "forward", lambda noisy, time, condition: seen.append(noisy) or noisy)
    made.velocity(torch.ones(1, 3, 4, 4), torch.tensor([0.5]), cells_of(torch.zeros(1, 3, 2, 2)))
    assert_close(seen[0], torch.full((1, 3, 4, 4), 1 / 0.5830951895))


@pytest.mark.parametrize("steps", [1, 3])
def test_an_exact_network_draws_the_image(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, image = codec(), torch.rand(2, 3, 6, 8) * 2 - 1

    def exact(noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        return (noisy - made.gamma * image) / time[:, None, None, None]  # noise - data, where noisy = (1 - t) data + t noise

    monkeypatch.setattr(made, "velocity", exact)
    assert_close(made.expand(torch.zeros(2, 3, 3, 4), num_steps=steps), image)


def test_an_image_is_drawn_alike_whatever_its_neighbours() -> None:
    made, images = codec(), torch.rand(3, 3, 6, 8) * 2 - 1
    latents = made.encode(images)
    assert latents.shape == (3, 3, 3, 4)
    assert_close(made.decode(latents)[1:2], made.decode(latents[1:2]), atol=1e-5, rtol=1e-5)
    assert torch.equal(made.decode(latents), made.decode(latents))


def test_the_latent_lies_under_its_pixels() -> None:
    denoiser, seen = UNetPixelDenoiser(1, [4], 1, groups=2), list[Tensor]()
    denoiser.unet.forward = lambda sample, time: seen.append(sample) or type("Out", (), {"sample": sample[:, :3]})  # type: ignore[method-assign]
    latents = torch.arange(6.0).view(1, 1, 2, 3)
    denoiser(torch.zeros(1, 3, 4, 6), torch.zeros(1), cells_of(latents))
    assert_close(seen[0][0, 3], latents[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_signal_falls_by_the_same_factor_at_every_time() -> None:
    made, t = codec(), torch.tensor([0.1, 0.5, 0.9])
    ratio = [((1 - t) * gamma / t).log() for gamma in (1.0, made.gamma)]
    assert_close(2 * (ratio[0] - ratio[1]), torch.full((3,), -2 * math.log(0.6)))


def test_contract_of_blocks() -> None:
    check_block(ConvEncoder(3, [8, 8], 1, groups=4), (torch.randn(2, 3, 4, 6),), (2, 3, 2, 3))
    inputs = (torch.randn(2, 3, 4, 8), torch.rand(2), Tokens(torch.randn(2, 8, 3)))
    check_block(UNetPixelDenoiser(3, [8, 8], 1, groups=4), inputs, (2, 3, 4, 8))


def test_latents_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="found 2 channels, and 3 of the encoder"):
        DiffusionCodec(ConvEncoder(3, [8], 1, groups=4), UNetPixelDenoiser(2, [8], 1, groups=4), FlowMatching())


def patches() -> tuple[PatchEncoder, PatchPixelDenoiser]:
    torch.manual_seed(0)
    return PatchEncoder(3, patch=4, width=8, depth=1, heads=2), PatchPixelDenoiser(3, patch=2, width=8, depth=1, heads=2)


def test_transformers_encode_and_denoise_images_that_are_not_square() -> None:
    encoder, denoiser = patches()
    latents = encoder(torch.rand(2, 3, 8, 12))
    assert latents.shape == (2, 3, 2, 3) and encoder.downsampling == 4
    noisy, time, moved = torch.randn(2, 3, 8, 12), torch.tensor([0.2, 0.9]), latents.clone()
    assert denoiser(noisy, time, cells_of(latents)).shape == noisy.shape
    assert_close(denoiser(noisy, time, cells_of(latents))[1:], denoiser(noisy[1:], time[1:], cells_of(latents[1:])))
    denoiser.blocks = torch.nn.Sequential()  # without attention a cell of the latent reaches its own pixels alone
    moved[:, :, 1, 2] += 1
    changed = (denoiser(noisy, time, cells_of(moved)) != denoiser(noisy, time, cells_of(latents))).any(dim=1)[0]
    assert changed[4:, 8:].all() and not changed[:4].any() and not changed[:, :8].any()


def test_a_plain_decoder_is_the_same_network_shown_zeros() -> None:
    objective = FlowMatching(LogitNormalTimes(), num_steps=3, schedule=ReversedLog(), solver=Euler())
    made = DiffusionCodec(*patches(), objective, gamma=1.0, seed=5, drawn=False).eval()
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    noisy, time, velocity = made.draw(images)
    assert noisy.abs().max() == 0 and time.tolist() == [1, 1] and torch.equal(velocity, -images)
    latents = made.encode(images)
    said = -made.denoiser(torch.zeros_like(images), torch.ones(2), cells_of(latents))
    assert_close(made.decode(latents), said)
    assert_close(made.clean(noisy, time, -said), said)
    made.seed = 6
    assert_close(made.decode(latents), said)  # nothing is drawn


def test_sides_that_encoder_or_network_cannot_halve_are_refused_in_one_line() -> None:
    deep = DiffusionCodec(ConvEncoder(2, [8, 8], 1, 4), UNetPixelDenoiser(2, [8, 8, 8], 1, 4), FlowMatching())
    assert tuple(deep.latent_grid(8, 12)) == (4, 6)
    method = EpsilonVAE(deep)
    blank = torch.zeros(1, 3, 8, 12)
    method.try_images(blank, blank)
    with pytest.raises(UserError, match="found 8 x 10 px, expected multiples of 4 px") as refused:
        method.try_images(blank, torch.zeros(1, 3, 8, 10))
    assert len(str(refused.value).splitlines()) == 1
