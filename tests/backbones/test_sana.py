import pytest
import torch

from umm_zoo.backbones.sana import Sana
from umm_zoo.batch import Tokens
from umm_zoo.testing import check_block

TINY = {
    "in_channels": 5,
    "out_channels": 5,
    "sample_size": 6,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 14,
    "num_layers": 2,
    "mlp_ratio": 2.0,
}


def sana(**changes) -> Sana:
    torch.manual_seed(0)
    return Sana.from_config({**TINY, **changes}).eval()


def inputs(batch: int = 2, length: int = 7, masked: bool = False) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(length)[None] < torch.tensor([[length], [3]]) if masked else None
    condition = Tokens(torch.randn(batch, length, 14, generator=g) * 2, mask)
    return torch.randn(batch, 5, 6, 4, generator=g), torch.rand(batch, generator=g), condition


@pytest.mark.parametrize("masked", [False, True])
def test_it_keeps_the_contract(masked: bool) -> None:
    check_block(sana(), inputs(masked=masked), (2, 5, 6, 4))


def test_it_states_what_a_bridge_must_know() -> None:
    decoder = sana()
    assert (decoder.condition_dim, decoder.latent_channels, decoder.patch) == (14, 5, 1)
    assert decoder.condition_rms == pytest.approx(2.3452, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_time_comes_as_the_librarys_pipeline_gives_it(scale: float) -> None:
    decoder, (noisy, _, condition) = sana(timestep_scale=scale), inputs(masked=True)
    found = decoder(noisy, torch.tensor([0.25, 0.999]), condition)
    expected = decoder.model(
        noisy,
        encoder_hidden_states=condition.values,
        timestep=torch.tensor([250.0, 999.0]) * scale,
        encoder_attention_mask=condition.mask.long(),  # as tokenizers give it
    ).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masked_tokens_and_tokens_left_out_are_the_same() -> None:
    decoder, (noisy, time, condition) = sana(), inputs(masked=True)
    short = Tokens(condition.values[1:, :3])
    torch.testing.assert_close(decoder(noisy, time, condition)[1:], decoder(noisy[1:], time[1:], short), atol=1e-5, rtol=1e-5)


def test_the_sprint_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance_embeds"):
        sana(guidance_embeds=True)


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        decoder = Sana.from_config(TINY, gradient_checkpointing=checkpointed)
        assert decoder.model.gradient_checkpointing is checkpointed
        decoder.train()(*inputs()).square().sum().backward()
        grads.append(decoder.model.proj_out.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, t, c: (x[:, :4], t, c), r"Sana.noisy: found .* expected \[B, 5, h, w\]"),
        (lambda x, t, c: (x, t[:1], c), r"Sana.time: found \[1\], expected \[2\]"),
        (lambda x, t, c: (x, t, Tokens(c.values[..., :13])), r"condition: found \[2, 7, 13\], expected \[2, N, 14\]"),
    ],
)
def test_wrong_shapes_are_named(change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sana()(*change(*inputs()))
