"""LoRA: zero at the start, the formula, peft's files, and a network that stays as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from umm_zoo.backbones.adapters import LoRA


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.inner = nn.ModuleDict({"to_q": nn.Linear(7, 6, bias=False), "norm": nn.LayerNorm(6)})
        self.lm_head = nn.Linear(6, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.inner["norm"](self.inner["to_q"](self.first(x).tanh())))


def attached(**arguments: object) -> tuple[Network, LoRA]:
    torch.manual_seed(0)
    network, adapter = Network(), LoRA(rank=3, alpha=6.0, **arguments)
    adapter.attach(network)
    return network, adapter


def shake(adapter: LoRA) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))


def test_nothing_changes_at_the_start_and_while_disabled():
    network, adapter = attached()
    x = torch.randn(4, 5)
    plain = copy.deepcopy(network)
    for module in plain.modules():
        module._forward_hooks.clear()
    assert torch.equal(network(x), plain(x))
    shake(adapter)
    assert not torch.allclose(network(x), plain(x))
    with adapter.disabled():
        assert torch.equal(network(x), plain(x))
    assert not torch.allclose(network(x), plain(x))


def test_formula():
    network, adapter = attached(targets=["to_q"])
    shake(adapter)
    x, layer, own = torch.randn(4, 7), network.inner["to_q"], adapter.layers["inner/to_q"]
    assert list(adapter.layers) == ["inner/to_q"]
    assert_close(layer(x), x @ (layer.weight + 2.0 * own.up @ own.down).T)


def test_names_of_the_network_stay_and_its_gradients_are_none():
    network, adapter = attached()
    assert set(network.state_dict()) == set(Network().state_dict())
    assert set(adapter.layers) == {"first", "inner/to_q"}
    shake(adapter)
    network(torch.randn(4, 5)).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_peft_reads_what_is_saved_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    network, adapter = attached()
    shake(adapter)
    adapter.save(tmp_path)
    x = torch.randn(4, 5)
    base = Network()
    base.load_state_dict(network.state_dict())
    assert_close(peft.PeftModel.from_pretrained(base, str(tmp_path))(x), network(x))
    other, twin = attached()
    other.load_state_dict(network.state_dict())
    twin.load(tmp_path)
    assert torch.equal(other(x), network(x))


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="targets: found \\['to_x'\\]"):
        attached(targets=["to_x"])
    network, adapter = attached()
    with pytest.raises(ValueError, match="already"):
        adapter.attach(network)
    adapter.save(tmp_path)
    twin = LoRA(rank=2)
    twin.attach(Network())
    with pytest.raises(ValueError, match="rank 3"):
        twin.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "found 'use_rslora: True', expected plain additions"),
        ({"use_dora": True}, "found 'use_dora: True'"),
        ({"alpha_pattern": {"q": 3}}, "found 'alpha_pattern: "),
        ({"lora_alpha": None}, "found rank 3 and alpha None"),
    ],
)
def test_an_adapter_that_is_added_otherwise_is_refused(changes, message, tmp_path):
    _, adapter = attached()
    adapter.save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        attached()[1].load(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter_that_are_none_are_one_line(name, tmp_path):
    _, adapter = attached()
    adapter.save(tmp_path)
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"{name}: found a Git-LFS pointer"):
        attached()[1].load(tmp_path)


class Casts(TorchDispatchMode):
    """Counts tensors that are widened."""

    def __init__(self):
        super().__init__()
        self.widened = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.dtype == torch.float32 and args[0].dtype == torch.bfloat16:
            self.widened += 1
        return made


def test_under_autocast_no_input_is_widened_to_be_narrowed_again():
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).bfloat16()
    adapter = LoRA(rank=2)
    adapter.attach(network)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 6).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        made = network(x)
    assert casts.widened == 0
    narrow, states = copy.deepcopy(adapter).bfloat16(), x
    for layer, key in zip(network, ("0", "1"), strict=True):
        up, down = narrow.layers[key].up, narrow.layers[key].down
        plain, low = F.linear(states, layer.weight, layer.bias), F.linear(states, down)
        states = (plain.float() + adapter.scale * low.float() @ up.float().T).bfloat16()  # the sum is rounded once
    assert torch.equal(made, states)
