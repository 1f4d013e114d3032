import pytest
import tiny_configs
import torch
from learning import losses_of
from tiny_configs import SANA, T5

from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.text_encoder import TextEncoder, until_end
from umm_zoo.batch import Batch, stacked
from umm_zoo.errors import UserError
from umm_zoo.methods.requests import request_batch
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import guide
from umm_zoo.outputs import Draws, Sampling, Wanted
from umm_zoo.pretraining.text_to_image import TextToImage
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

CODEC = tiny_configs.codec(5, (4, 8), use_quant_conv=False, use_post_quant_conv=False)


def text_to_image(drop_text: float = 0.1, width: int = 16, channels: int = 5, lr: float = 3e-3) -> TextToImage:
    torch.manual_seed(0)
    made = TextToImage(
        TextEncoder.from_config({**T5, "d_model": width}),
        Sana.from_config(SANA),
        KLCodec.from_config({**CODEC, "latent_channels": channels}),
        FlowMatching(num_steps=4),
        drop_text=drop_text,
    )
    TrainingSetup(["text_encoder", "decoder"], AdamW(lr)).prepare(made)
    return made


def batch(texts: list[str], latents: torch.Tensor | None = None) -> Batch:
    conversations = [[{"role": "user", "text": text}] for text in texts]
    targets = torch.rand(len(texts), 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    extras = {} if latents is None else {"latents": latents}
    return Batch([f"row{i}" for i in range(len(texts))], conversations, targets=targets, extras=extras)


def test_every_trained_parameter_gets_a_gradient_and_the_codec_none() -> None:
    method = text_to_image()
    method.training_losses(batch(["a red circle", "two blue squares"]))["loss"].backward()
    for name, parameter in method.named_parameters():
        if name.startswith("codec"):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_the_condition_has_the_root_mean_square_of_the_decoder() -> None:
    method = text_to_image()
    condition = method.condition(["a red circle", "top left: a small blue square"])
    rms = condition.values.square().mean(dim=-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, method.decoder.condition_rms), atol=1e-3, rtol=0)
    assert condition.mask is not None and condition.mask.sum(dim=1)[0] < condition.mask.sum(dim=1)[1]


@torch.no_grad()
def test_padding_does_not_change_a_prompt() -> None:
    method = text_to_image().eval()
    alone = method.condition(["a red circle"])
    beside = method.condition(["a red circle", "top left: a small blue square; background: grey"])
    length = alone.values.shape[1]
    torch.testing.assert_close(beside.values[:1, :length], alone.values, atol=1e-5, rtol=1e-5)


def test_the_mask_ends_with_the_first_end_token() -> None:
    ids = torch.tensor([[5, 6, 3, 3], [5, 3, 0, 0], [5, 6, 7, 8]])
    assert until_end(ids, 3).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_prompts_are_dropped_at_the_stated_rate() -> None:
    seen: list[str] = []
    method = text_to_image(drop_text=0.25)
    method.text_encoder.register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    with torch.no_grad():
        for _ in range(10):
            method.training_losses(batch(["a red circle"] * 60, torch.zeros(60, 5, 1, 1)))
    assert 0.17 < sum(text == "" for text in seen) / len(seen) < 0.33


def test_stored_latents_stand_for_the_images() -> None:
    method, data = text_to_image().eval(), batch(["a red circle", "a blue square"])
    with torch.no_grad():
        stored = batch(["a red circle", "a blue square"], method.codec.encode(stacked(data.requested)))
        stored.targets = [None, None]
        first, second = (method.validation_step(rows, 3).scalars["loss"] for rows in (stored, data))
        torch.testing.assert_close(first, second)


@torch.no_grad()
def test_validation_generates_images_and_is_repeatable() -> None:
    method, data = text_to_image().eval(), batch(["a red circle", "a blue square", "three squares"])
    first, second = (method.validation_step(data, 2) for _ in range(2))
    made, again = stacked(first.generated), stacked(second.generated)
    assert made.shape == (3, 3, 8, 8) and made.abs().max() <= 1 and torch.equal(made, again)
    assert torch.equal(first.scalars["loss"], second.scalars["loss"])
    assert set(method.makes) == {*first.scalars, "generated"}
    method.wanted = Wanted(num_generated_batches=2)
    less = method.validation_step(data, 2)
    assert less.generated is None and torch.equal(less.scalars["loss"], first.scalars["loss"])


def test_validation_starts_from_the_noise_that_follows_the_loss() -> None:
    method, data = text_to_image().eval(), batch(["a red circle", "a blue square"])
    outputs = method.validation_step(data, 2)
    generator = torch.Generator().manual_seed(2)
    method.objective.draw(torch.zeros(2, 5, 4, 4), generator)
    branches = guide(method.condition(["", ""]), method.condition(["a red circle", "a blue square"]), method.guidance)
    expected = method.objective.sample(method.decoder, (2, 5, 4, 4), branches, generator)
    torch.testing.assert_close(stacked(outputs.generated), method.codec.decode(expected).clamp(-1, 1))


def test_an_image_depends_on_its_prompt_and_seed_alone() -> None:
    method = text_to_image().eval()
    assert isinstance(method, Draws)
    together = stacked(method.generate(request_batch(["a red circle", "two squares", "two squares"]), [4, 4, 5]))
    alone = stacked(method.generate(request_batch(["two squares"]), [4]))
    assert together.shape == (3, 3, 8, 8)  # four cells of the decoder, two pixels of the codec each
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[1], together[2]) and not torch.allclose(together[0], together[1])


def test_size_steps_and_guidance_may_be_said() -> None:
    method, rows, seeds = text_to_image().eval(), request_batch(["a circle", "a square"]), [1, 2]
    blind = method.generate(rows, seeds, Sampling(guidance=0.0, size=(4, 12)))
    other = method.generate(request_batch(["three", "four"]), seeds, Sampling(guidance=0.0, size=(4, 12)))
    assert [image.shape for image in blind] == [(3, 4, 12)] * 2
    torch.testing.assert_close(blind, other, atol=1e-4, rtol=1e-4)  # without guidance by the prompt it does not matter
    one, four = (stacked(method.generate(rows, seeds, Sampling(num_steps=steps))) for steps in (1, 4))
    assert not torch.allclose(one, four) and torch.equal(four, stacked(method.generate(rows, seeds)))


def test_requests_that_it_cannot_fulfil_are_named() -> None:
    method = text_to_image().eval()
    with pytest.raises(UserError, match="found 1 input images, expected none"):
        method.generate(request_batch(["make it red"], [[torch.zeros(3, 8, 8)]]), [0])
    with pytest.raises(UserError, match="found 4 x 7 px, expected multiples of 2"):
        method.generate(request_batch(["a circle"]), [0], Sampling(size=(4, 7)))


def test_it_learns_which_latent_a_prompt_asks_for() -> None:
    method = text_to_image(drop_text=0.0, lr=1e-2)
    latents = torch.tensor([1.0, -1.0])[:, None, None, None].expand(2, 5, 4, 4)
    data = batch(["a red circle", "a blue square"] * 8, latents.repeat(8, 1, 1, 1))
    losses = losses_of(method, data, 120)
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    made = method.eval().objective.sample(method.decoder, (2, 5, 4, 4), method.condition(["a red circle", "a blue square"]))
    assert made[0].mean() > 0.5 and made[1].mean() < -0.5


def test_a_later_stage_does_not_take_the_text_encoder() -> None:
    method = text_to_image()
    left = method.part_keys(method.stage_only)
    assert left and all(key.startswith("text_encoder.") for key in left)


@pytest.mark.parametrize(("arguments", "words"), [({"width": 24}, "text_encoder.width is 24"), ({"channels": 4}, "codec has 4")])
def test_parts_that_do_not_fit_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text_to_image(**arguments)


def test_rows_without_prompt_or_image_are_named() -> None:
    with pytest.raises(ValueError, match="found no prompt"):
        text_to_image().training_losses(batch(["a circle", ""]))
    nothing = batch(["a circle"])
    nothing.targets = [None]
    with pytest.raises(ValueError, match="no image to generate"):
        text_to_image().training_losses(nothing)


def test_a_text_encoder_is_read_back(tmp_path) -> None:
    encoder = text_to_image().text_encoder
    encoder.model.save_pretrained(tmp_path)
    encoder.text.tokenizer.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(["a red circle"]).values, encoder.eval()(["a red circle"]).values)
