"""Mixture of transformers: the language model that it begins as, and one pass against cached ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from umm_zoo.backbones import flexible
from umm_zoo.backbones.flexible import attend
from umm_zoo.blocks.mixture import MixtureStack
from umm_zoo.blocks.packed_masks import PackedMask, Split
from umm_zoo.blocks.sequence_plan import Item, Marks, SequencePlan
from umm_zoo.errors import UserError

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = [
    Qwen2Config(**SIZES, num_key_value_heads=2, rope_theta=500.0),
    Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    LlamaConfig(**SIZES, num_key_value_heads=4),
]


def decoder(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms too
    return model


def random_stack(experts: int = 2) -> MixtureStack:
    torch.manual_seed(1)
    stack = MixtureStack(layers=2, width=32, heads=4, kv_heads=2, hidden_dim=48, experts=experts).double()
    for parameter in stack.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return stack


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("experts", [1, 2])
def test_fresh_copies_say_what_the_language_model_says(config: PreTrainedConfig, experts: int) -> None:
    model = decoder(config)
    stack = MixtureStack.from_language_model(model.model, experts)
    ids, real = torch.randint(40, (2, 7)), torch.ones(2, 7).bool()
    real[1, 5:] = False
    route = torch.randint(2, (2, 7)).masked_fill(~real, -1)  # by whatever expert
    mask = PackedMask([[Split("causal", 7)], [Split("causal", 5)]])()
    states = stack(model.model.embed_tokens(ids), route, torch.arange(7).expand(2, 7), mask)
    torch.testing.assert_close(model.lm_head(states)[real], model(ids).logits[real], atol=1e-10, rtol=0)


#: Words, an image to generate that is read later as latent and by the tower, words; and another row, shorter.
ROWS = [
    [
        Item("text", [5, 6]),
        Item("noise", num_tokens=3),
        Item("clean", num_tokens=3),
        Item("seen", num_tokens=2),
        Item("text", [7, 8, 9]),
    ],
    [Item("text", [5]), Item("noise", num_tokens=2)],
]


def packed(stack: MixtureStack, tokens: Tensor, plan: SequencePlan) -> Tensor:
    return stack(tokens, plan.route, plan.positions, plan.mask())


def test_one_pass_gives_the_states_of_cached_ones() -> None:
    stack, plan = random_stack(), SequencePlan.of(ROWS[:1], Marks(1, 2, 3, 4))
    tokens = torch.randn(*plan.route.shape, 32, dtype=torch.float64)
    whole, cache, begin = packed(stack, tokens, plan), DynamicCache(), 0
    for item in ROWS[0]:
        end = begin + len(item.ids) + item.num_tokens + 2
        length, held = end - begin, cache.get_seq_length()
        mask = torch.ones(1, length, held + length).bool()
        if item.kind == "text":
            mask = mask.tril(held)
        own = tokens[:, begin:end], plan.route[:, begin:end], plan.positions[:, begin:end]
        states = stack.read(*own, mask, cache, keep=item.kind != "noise")
        torch.testing.assert_close(states, whole[:, begin:end], atol=1e-10, rtol=0)
        begin = end
    assert cache.get_seq_length() == plan.route.shape[1] - 5  # all but the noise and its marks


def test_other_noise_changes_no_state_behind_it() -> None:
    stack, plan = random_stack(), SequencePlan.of(ROWS[:1], Marks(1, 2, 3, 4))
    tokens = torch.randn(*plan.route.shape, 32, dtype=torch.float64)
    other = tokens.clone()
    other[:, plan.places["noise"]] += 1
    before, after = packed(stack, tokens, plan), packed(stack, other, plan)
    assert torch.equal(before[:, :4], after[:, :4]) and torch.equal(before[:, 9:], after[:, 9:])
    assert not torch.equal(before[:, 4:9], after[:, 4:9])


def test_a_row_depends_on_no_other() -> None:
    stack, both = random_stack(), SequencePlan.of(ROWS, Marks(1, 2, 3, 4))
    tokens = torch.randn(*both.route.shape, 32, dtype=torch.float64)
    alone = SequencePlan.of(ROWS[1:], Marks(1, 2, 3, 4))
    length = alone.route.shape[1]
    torch.testing.assert_close(
        packed(stack, tokens, both)[1:, :length], packed(stack, tokens[1:, :length], alone), atol=1e-12, rtol=0
    )


def test_each_token_passes_its_own_expert_alone() -> None:
    stack, plan = random_stack(), SequencePlan.of(ROWS, Marks(1, 2, 3, 4))
    understanding, generation = stack.experts_parts()
    numbers = [{id(p) for p in part.parameters()} for part in (understanding, generation)]
    assert not numbers[0] & numbers[1] and numbers[0] | numbers[1] == {id(p) for p in stack.parameters()}
    tokens = torch.randn(*plan.route.shape, 32, dtype=torch.float64)
    before = packed(stack, tokens, plan)
    for parameter in generation.parameters():
        parameter.data += 1
    changed = (packed(stack, tokens, plan) != before).any(-1)
    assert changed[0, 4:].all() and not changed[0, :4].any() and not changed[1, :3].any()  # words before any latent stay


def test_an_expert_without_tokens_has_gradients_of_zero() -> None:
    stack, plan = random_stack(), SequencePlan.of([[Item("text", [5, 6])]], Marks(1, 2, 3, 4))
    packed(stack, torch.randn(*plan.route.shape, 32, dtype=torch.float64), plan).sum().backward()
    understanding, generation = stack.experts_parts()
    assert all(p.grad is not None and not p.grad.any() for p in generation.parameters())
    assert all(p.grad.any() for name, p in understanding.named_parameters() if "bias" not in name)


def test_names_of_weights_are_those_of_the_release() -> None:
    names = {name.removeprefix("layers.0.") for name in random_stack().state_dict() if not name.startswith("layers.1")}
    projections = [f"self_attn.{which}_proj.{what}" for which in "qkv" for what in ("weight", "bias")]
    layer = [
        *projections,
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "input_layernorm.weight",
    ]
    layer += ["post_attention_layernorm.weight", *(f"mlp.{which}_proj.weight" for which in ("gate", "up", "down"))]
    copies = [name.replace(".weight", "_moe_gen.weight").replace(".bias", "_moe_gen.bias") for name in layer if "mlp" not in name]
    copies += [name.replace("mlp", "mlp_moe_gen") for name in layer if "mlp" in name]
    assert names == {*layer, *copies, "norm.weight", "norm_moe_gen.weight"}


def test_a_decoder_with_windows_is_refused() -> None:
    config = Qwen2Config(**SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(UserError, match="sliding windows"):
        MixtureStack.from_language_model(AutoModelForCausalLM.from_config(config).model)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_masks_in_blocks_give_the_states_of_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    stack = MixtureStack(layers=1, width=32, heads=2, kv_heads=1, hidden_dim=48)  # heads of 16, the narrowest that a kernel takes
    plan = SequencePlan.of(ROWS, Marks(1, 2, 3, 4))
    tokens = torch.randn(*plan.route.shape, 32)
    stack.requires_grad_(False)  # a CPU has no backward pass of it
    dense = packed(stack, tokens, plan)
    monkeypatch.setattr(flexible, "runs_on", lambda device: True)
    seen: list[object] = []
    monkeypatch.setattr(flexible, "attend", lambda *given: seen.append(given) or attend(*given))  # type: ignore[func-returns-value]
    torch.testing.assert_close(packed(stack, tokens, plan)[plan.real], dense[plan.real], atol=1e-5, rtol=0)
    assert len(seen) == 1
