"""Flex attention under the masks of pathways and padded rows: its plain form on the CPU, where torch refuses it gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as library
from torch.testing import assert_close
from transformers import Gemma2Config

from tests.backbones.vlm_parts import qwen
from umm_zoo.backbones import flexible
from umm_zoo.backbones.decoder_attention import SDPA, SDPA_OR_FLEX, attend, make_blocked_mask, said
from umm_zoo.backbones.flexible import BlockedMask, blocked
from umm_zoo.backbones.language_models import attention_of
from umm_zoo.backbones.prefix import Prefix
from umm_zoo.batch import Grid
from umm_zoo.blocks.details import Details
from umm_zoo.blocks.pathways import ExpertPathway, FrozenPathway
from umm_zoo.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """A kernel everywhere, and gradients on the CPU, which torch's own check refuses though its plain form has them."""
    seen, real = [], flexible.flex_attention
    monkeypatch.setattr(flexible, "runs_on", lambda device: True)
    monkeypatch.setattr(library, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flexible, "flex_attention", lambda *own, **settings: seen.append(own[0].shape) or real(*own, **settings))
    return seen


def masks():
    """``[2, 1, 150, 201]``: blocks with nothing, with something and full; every row sees itself."""
    whole = torch.rand(2, 1, 150, 201, generator=torch.Generator().manual_seed(0)) > 0.4
    whole[0, 0, :128, :128], whole[1, 0, 128:, :128] = True, False
    return whole


def test_blocks_are_those_of_the_mask(on_the_cpu):
    whole = masks()
    made = blocked(whole).blocks
    assert made.shape == (2, 1, 150, 201)
    assert made.to_dense()[:, 0].tolist() == [[[1, 1], [1, 1]], [[1, 1], [0, 1]]]
    assert made.full_kv_num_blocks[:, 0].tolist() == [[1, 0], [0, 0]] and made.full_kv_indices[0, 0, 0, 0] == 0
    assert made.kv_indices[1, 0, 1, 0] == 1  # the first of those that hold something


def heads(count, length):
    return torch.randn(2, count, length, 16, generator=torch.Generator().manual_seed(count * length), requires_grad=True)


def test_outputs_and_gradients_are_those_of_sdpa(on_the_cpu):
    whole, given = masks(), (heads(6, 150), heads(2, 201), heads(2, 201))
    weights = torch.randn(2, 150, 6, 16)
    made, expected = (attend(None, *given, mask, scaling=0.3)[0] for mask in (blocked(whole), whole))
    assert len(on_the_cpu) == 1
    assert_close(made, expected)
    assert_close(torch.autograd.grad(made, given, weights), torch.autograd.grad(expected, given, weights))


@pytest.mark.parametrize("refused", ["dropout", "float64", "narrow"])
def test_what_a_kernel_does_not_take_is_left_to_sdpa(on_the_cpu, refused):
    given = [part.double() if refused == "float64" else part for part in (heads(2, 150), heads(2, 201), heads(2, 201))]
    given = [part[..., :8] for part in given] if refused == "narrow" else given
    extra = {"dropout": 1e-9} if refused == "dropout" else {}
    module = type("Module", (), {"num_key_value_groups": 1, "is_causal": True})()
    attend(module, *given, blocked(masks()), **extra)
    assert not on_the_cpu


def prompt(vlm, length):
    """A prompt whose first row is padded on the left."""
    prefix = vlm.language_stack(copied=False).example_prefix(2, length)
    prefix.attention_mask[0, : length // 3] = False
    return prefix


@pytest.fixture(scope="module")
def vlms():
    return [qwen(attention=attention).eval() for attention in ("sdpa", "flex_attention")]


@pytest.mark.parametrize("kind", [ExpertPathway, FrozenPathway])
def test_a_pathways_states_and_gradients_are_those_of_sdpa(on_the_cpu, vlms, kind):
    states, gradients, prefix = [], [], prompt(vlms[0], 90)
    width, generator = vlms[0].width, torch.Generator().manual_seed(1)
    tokens, queries = (torch.randn(2, count, width, generator=generator, requires_grad=True) for count in (50, 132))
    images = torch.tensor([[0] * 20 + [1] * 30, [0] * 17 + [-1] * 33])  # the second row has one image, and padding
    for vlm in vlms:
        pathway = kind()
        pathway.attach(vlm)
        details = Details(tokens, torch.arange(50).expand(3, 2, 50), images)
        states.append(pathway(prefix, details, queries, Grid(11, 12)))
        gradients.append(torch.autograd.grad(states[-1].square().sum(), (tokens, queries)))
    assert len(on_the_cpu) == len(vlms[0].text_model.layers) and isinstance(prefix, Prefix)
    assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_padded_rows_are_those_of_sdpa(on_the_cpu, vlms):
    rows = [[{"role": "user", "text": "Hi"}], [{"role": "user", "text": "<image> What colour is the circle?"}]]
    inputs = vlms[0].embed(rows, torch.rand(1, 3, 32, 32), [0, 1])
    expected, made = (vlm(inputs).hidden[inputs.attention_mask] for vlm in vlms)
    assert on_the_cpu
    assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_without_a_kernel_it_is_sdpa(vlms):
    assert [vlm.text_model.config._attn_implementation for vlm in vlms] == [SDPA, SDPA_OR_FLEX]
    assert vlms[1].model.model.visual.config._attn_implementation == vlms[0].model.model.visual.config._attn_implementation
    with said(True):
        made = make_blocked_mask(2, 4, 4, attention_mask=torch.ones(2, 4, dtype=torch.bool))
    assert isinstance(made, torch.Tensor) and not isinstance(made, BlockedMask)
    assert F.pad(made, (0, 0)).shape == (2, 1, 4, 4)


def test_a_decoder_without_it_is_refused():
    with pytest.raises(UserError, match="'flex_attention' for a gemma2"):
        attention_of("flex_attention", Gemma2Config())
