from typing import Any

import pytest
import tiny_configs
import torch
from learning import losses_of
from tiny_configs import DC

from umm_zoo.backbones.codecs import DCCodec, KLCodec
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.batch import Batch, stacked
from umm_zoo.blocks.discriminators import PatchDiscriminator
from umm_zoo.blocks.stylegan_discriminator import StyleGANDiscriminator
from umm_zoo.errors import UserError
from umm_zoo.objectives.adversarial import AdversarialLoss
from umm_zoo.objectives.perceptual import FeatureDistance
from umm_zoo.outputs import Reconstructs
from umm_zoo.pretraining.autoencoder import Autoencoder, DecoderTuning, kl_to_standard_normal
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

KL = tiny_configs.codec(4, (8, 16), norm_num_groups=4, scaling_factor=1.0)


def batch(rows: int = 3, targets: bool = False) -> Batch:
    images = torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = {"targets": images} if targets else {"images": images, "image_counts": [1] * rows}
    return Batch([f"row{i}" for i in range(rows)], [[] for _ in range(rows)], **given)


def against_a_discriminator(**adversarial: Any) -> DecoderTuning:
    loss = AdversarialLoss("non_saturating", weight=0.5, r1=0.1, r1_every=1, **adversarial)
    judge = PatchDiscriminator(8, 1, "group")
    torch.nn.init.normal_(judge.main[-1].weight, std=0.2)
    return DecoderTuning(KLCodec.from_config(KL), discriminator=judge, adversarial=loss)


def test_kl_against_torch() -> None:
    mean, log_variance = torch.randn(5, 2), torch.randn(5, 2)
    own = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)


@pytest.mark.parametrize("codec", [lambda: KLCodec.from_config(KL), lambda: DCCodec.from_config(DC)])
def test_every_parameter_learns_and_the_judge_is_frozen(codec) -> None:
    judge = CLIPVisionFeatures.from_config(tiny_configs.clip())
    method = Autoencoder(codec(), perceptual=judge)
    method.train_only(["codec"])
    losses = method.training_losses(batch())
    losses["loss"].backward()
    assert {"l1", "mse", "perceptual"} <= set(losses)
    assert isinstance(method.judges.perceptual, FeatureDistance) and isinstance(judge, FrozenBackbone)
    for name, parameter in method.codec.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_the_loss_is_the_weighted_sum() -> None:
    method = Autoencoder(KLCodec.from_config(KL), l1_weight=2.0, mse_weight=3.0, kl_weight=0.5)
    losses = method.training_losses(batch())
    torch.testing.assert_close(losses["loss"], 2 * losses["l1"] + 3 * losses["mse"] + 0.5 * losses["kl"])


def test_targets_are_reconstructed_too() -> None:
    method = Autoencoder(KLCodec.from_config(KL)).eval()
    outputs = method.validation_step(batch(targets=True), 0)
    assert torch.equal(stacked(outputs.references), stacked(batch(targets=True).requested))
    assert stacked(outputs.generated).shape == (3, 3, 8, 8)


@pytest.mark.parametrize("codec", [lambda: KLCodec.from_config(KL), lambda: DCCodec.from_config(DC)])
def test_validation_makes_what_it_says_and_what_a_reconstruction_is(codec) -> None:
    method, data = Autoencoder(codec()).eval(), batch()
    outputs = method.validation_step(data, 0)
    assert set(method.makes) == {*outputs.scalars, "generated", "references"}
    assert isinstance(method, Reconstructs)
    torch.testing.assert_close(method.reconstruct(data.images, seed=3), outputs.generated)


def test_it_learns_one_batch_and_normalises_its_latents() -> None:
    torch.manual_seed(0)
    method = Autoencoder(KLCodec.from_config(KL), kl_weight=1e-6, statistics_momentum=0.8)
    TrainingSetup(["codec"], AdamW(5e-3)).prepare(method)
    losses = losses_of(method, batch(), 61)
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        latents = method.codec.eval().encode(stacked(batch().images))
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.15


def test_a_row_without_a_image_is_named() -> None:
    method = Autoencoder(KLCodec.from_config(KL))
    with pytest.raises(ValueError, match="row0: found no image"):
        method.validation_step(Batch(["row0"], [[]]), 0)


@pytest.mark.parametrize("codec", [lambda: KLCodec.from_config(KL), lambda: DCCodec.from_config(DC)])
def test_tuning_the_decoder_leaves_every_latent_as_it_is(codec) -> None:
    method = DecoderTuning(codec())
    TrainingSetup(["decoder"], AdamW(1e-3)).prepare(method)
    images = stacked(batch().images)
    latents, decoded = method.codec.encode(images), method.codec.decode(method.codec.encode(images))
    losses = losses_of(method, batch(), 20)
    assert torch.equal(method.codec.encode(images), latents)
    assert not torch.equal(method.codec.decode(latents), decoded)
    assert losses[-1] < losses[0]


def test_the_encoder_cannot_be_tuned() -> None:
    with pytest.raises(ValueError, match=r"training\.trained: found \['encoder', 'decoder'\], expected \['decoder'\]"):
        DecoderTuning(KLCodec.from_config(KL)).train_only(["encoder", "decoder"])


def test_both_sides_of_a_competition_learn_and_the_codec_alone_goes_on() -> None:
    torch.manual_seed(0)
    method = Autoencoder(KLCodec.from_config(KL), discriminator=PatchDiscriminator(8, 1), adversarial=AdversarialLoss(start=1))
    method.train_only(["codec", "discriminator"])
    assert set(method.part_keys(method.stage_only)) == {
        f"judges.discriminator.{name}" for name in method.judges.discriminator.state_dict()
    }
    for number in range(2):
        method.step.number = number
        losses = method.training_losses(batch())
        method.zero_grad()
        losses["loss"].backward()
        gradients = [parameter.grad for parameter in method.judges.discriminator.parameters()]
        assert all(gradient is not None and gradient.any() == bool(number) for gradient in gradients[:3])
    rest = losses["l1"] + 1e-4 * losses["kl"] + losses["discriminator"]
    torch.testing.assert_close(losses["loss"], rest + 0.1 * losses["generator"])
    assert losses["generator"] != 0 and losses["adversarial_weight"] == pytest.approx(0.1)
    outputs = method.eval().validation_step(batch(), 0)
    assert set(method.makes) == {*outputs.scalars, "generated", "references"}


def test_the_weight_of_a_competition_is_that_of_the_decoder_s_last_layer() -> None:
    torch.manual_seed(0)
    method = against_a_discriminator(adaptive=(0.0, 1e4))
    method.train_only(["decoder", "discriminator"])
    torch.manual_seed(1)
    losses, layer = method.training_losses(batch()), method.codec.model.decoder.conv_out.weight
    parts = (losses["l1"] + 4 * losses["mse"], losses["generator"])
    norms = [torch.autograd.grad(part, layer, retain_graph=True)[0].norm() for part in parts]
    torch.testing.assert_close(losses["adversarial_weight"], 0.5 * norms[0] / (norms[1] + 1e-4))


def test_a_batch_without_images_asks_the_discriminator_all_the_same() -> None:
    method = Autoencoder(KLCodec.from_config(KL), discriminator=StyleGANDiscriminator(8, 64, 8))
    method.train_only(["codec", "discriminator"])
    losses = method.training_losses(Batch(["row0"], [[]]))
    losses["loss"].backward()
    gradients = [parameter.grad for part in method.parts().values() for parameter in part.parameters()]
    assert losses["loss"] == 0 and all(gradient is not None and not gradient.any() for gradient in gradients)


def test_judges_that_cannot_judge_are_refused() -> None:
    codec = KLCodec.from_config(KL)
    with pytest.raises(UserError, match=r"method\.discriminator: found none beside method\.adversarial"):
        Autoencoder(codec, adversarial=AdversarialLoss())
    with pytest.raises(UserError, match=r"found \['codec'\], expected 'discriminator' too"):
        Autoencoder(codec, discriminator=PatchDiscriminator(8, 1)).train_only(["codec"])
    with pytest.raises(UserError, match=r"training\.trained: found 'perceptual', a fixed measure"):
        Autoencoder(codec, CLIPVisionFeatures.from_config(tiny_configs.clip())).train_only(["codec", "perceptual"])
    with pytest.raises(UserError, match=r"found \['decoder'\], expected 'discriminator' too"):
        against_a_discriminator().train_only(["decoder"])
