"""Low-rank additions to the linear layers of a frozen network, as a part of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from umm_zoo.backbones.quantized import is_quantized
from umm_zoo.backbones.recomputing import switched
from umm_zoo.backbones.weight_files import assert_readable
from umm_zoo.errors import Count, Positive

#: Keys of additions in a state dict.
ADDITION = re.compile(r"(?:^|\.)layers\.[^.]+\.(?:down|up)$")
#: Files of peft.
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: What to do with a model that has an adapter.
KEEP = "the file would hold the weights without it; use the run folder or its checkpoint, and LoRA.save for the adapter alone"
#: Settings of peft under which the same tensors are added in another way, and their plain values.
_OTHERWISE: dict[str, Any] = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
_OTHERWISE |= {"lora_bias": False, "modules_to_save": None}


class LowRank(nn.Module):
    """``B(A(x))`` times a scale, added to what one linear layer makes of x; zero at the start, since B is.

    Shape:
        ``[..., in_dim]`` and ``[..., out_dim]`` -> ``[..., out_dim]``
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_dim))
        self.up = nn.Parameter(torch.zeros(out_dim, rank))
        nn.init.normal_(self.down, std=1 / rank)

    def forward(self, x: Tensor, output: Tensor, scale: float) -> Tensor:
        """Down, then up and added in one product; autocast narrows both, and to widen the input would be two casts for nothing."""
        device = x.device.type  # `meta`, on which files are checked, has no autocast to ask
        x = x if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) else x.to(self.down.dtype)
        low = F.linear(x, self.down)
        if output.ndim > 1 and output.dtype == low.dtype:
            return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.up.t(), alpha=scale).view(output.shape)
        return output + (scale * F.linear(low, self.up)).to(output.dtype)


class _Beside:
    """Forward hook of a layer that an addition stands beside; an object, so that a copy of a whole method has one of its own."""

    def __init__(self, adapter: LoRA, addition: LowRank) -> None:
        self.adapter, self.addition = adapter, addition

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        adapter = self.adapter
        adapter.was_run = True
        return cast(Tensor, self.addition(inputs[0], output, adapter.scale)) if adapter.enabled else None


def beside(network: nn.Module) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """Every layer of a network that an adapter stands beside: its name, itself, and the addition."""
    for name, layer in network.named_modules():
        for hook in layer._forward_hooks.values():
            if isinstance(hook, _Beside):
                yield name, layer, hook.addition


def learns(network: nn.Module) -> bool:
    """Whether a gradient must pass a network: it is trained itself, or additions beside its layers are."""
    additions = (parameter for _, _, addition in beside(network) for parameter in addition.parameters())
    return any(parameter.requires_grad for some in (network.parameters(), additions) for parameter in some)


def hosts_of(parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """The part that each adapter among some parts stands in, by their names."""
    owners = {id(own): name for name, part in parts.items() if isinstance(part, LoRA) for own in part.layers.values()}
    return {owners[id(own)]: name for name, part in parts.items() for _, _, own in beside(part) if id(own) in owners}


def assert_no_adapter(network: nn.Module, what: str) -> None:
    """Refuse to write the weights of a network that computes with an adapter's additions: they would not be in the file.

    Raises:
        ValueError: an adapter is attached.
    """
    hooks = [(name, hook) for name, layer in network.named_modules() for hook in layer._forward_hooks.values()]
    if adapted := [name for name, hook in hooks if isinstance(hook, _Beside) and not hook.adapter.is_apart]:
        found = f"an adapter beside {len(adapted)} layers, such as '{adapted[0]}'"
        raise ValueError(f"{what}: found {found}, expected a network without one; {KEEP}")


def adapters_of(module: nn.Module) -> dict[str, dict[str, float]]:
    """Rank and alpha of every adapter in a module, by its name: what its weights mean depends on both."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, LoRA)}
    return {name: {"rank": part.rank, "alpha": float(part.alpha)} for name, part in found.items()}


class LoRA(nn.Module):
    """``W x + alpha / rank B A x`` for the linear layers of a network that stays as it is (Hu et al., 2021, arXiv 2106.09685).

    The additions live here and not among the network's own tensors, so that an adapter is a part like any other: it is trained by
    name, a checkpoint holds it and not the network, a later stage may add one to weights that an earlier stage has trained, and
    without it the network is bit for bit what it was. ``save`` and ``load`` use peft's format, so that an adapter goes from here to
    ``peft.PeftModel`` and back. A method attaches it.

    Defaults are those of UAE's language model and of Flow-GRPO: rank 32, alpha 64, Gaussian start (deviation 1 / rank).

    Args:
        rank: of every addition.
        alpha: its weight is alpha / rank.
        targets: ends of the names of the layers (``to_q``, ``attn.to_out.0``); None is every linear layer. The output layer of a
            language model is left out in either case, as peft does.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(self, rank: Count = 32, alpha: Positive = 64.0, targets: Sequence[str] | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA.rank: found {rank}, expected 1 or more")
        self.rank, self.alpha = rank, alpha
        self.targets = None if targets is None else tuple(targets)
        self.layers = nn.ModuleDict()
        self.enabled, self.is_apart, self.was_run = True, False, False
        self._beside: dict[str, nn.Module] = {}  # the network's own layers, by the keys of ``layers``; registered nowhere

    @property
    def scale(self) -> float:
        """Weight of the additions."""
        return self.alpha / self.rank

    def attach(self, network: nn.Module) -> None:
        """Stand beside the linear layers of ``network`` from now on, and freeze it.

        Layers that the network itself leaves without gradient, such as those behind the last one of a vision tower that is looked
        at, get no addition.

        Raises:
            ValueError: it is attached already, another one stands there, or no layer has such a name.
        """
        if len(self.layers):
            raise ValueError("LoRA.attach: found an adapter that is attached already, expected a new one")
        if other := next(beside(network), None):
            raise ValueError(f"LoRA.attach: found another adapter beside '{other[0]}', expected one adapter in a part")
        sizes = {name: size for name, layer in network.named_modules() if (size := _size(layer)) is not None}
        if not sizes:
            raise ValueError(f"LoRA.attach: found a {type(network).__name__} without linear layers, expected one that has some")
        resting = {name for name in sizes if _rests(network.get_submodule(name))}
        for name in [name for name in sizes if name not in resting] or sizes:
            if self._takes(name):
                layer = network.get_submodule(name)
                device = next((tensor.device for some in (layer.parameters(), layer.buffers()) for tensor in some), None)
                made = LowRank(*sizes[name], self.rank)  # on the meta device, beside weights that were read for their sizes
                addition = made.to_empty(device=device) if device and made.down.is_meta else made.to(device)
                self.layers[name.replace(".", "/")] = addition
                layer.register_forward_hook(_Beside(self, addition))
                self._beside[name.replace(".", "/")] = layer
        if not len(self.layers):
            some = sorted({name.rpartition(".")[2] for name in sizes})
            raise ValueError(f"LoRA.targets: found {list(self.targets or ())}, expected ends of layer names such as {some}")
        network.requires_grad_(False)

    def _takes(self, name: str) -> bool:
        def ends(ending: str) -> bool:
            return name == ending or name.endswith(f".{ending}")

        return not ends("lm_head") and (self.targets is None or any(map(ends, self.targets)))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The network as it was, for the length of a block: the reference policy."""
        with switched(self, "enabled", False):
            yield

    @torch.no_grad()
    def merge(self) -> None:
        """Add it to the network's own weights, which then say the same without it; it stands there no more.

        Sums are formed in float32 and rounded once to the dtype of the weights.

        Raises:
            ValueError: weights that are quantised.
        """
        for key, layer in self._beside.items():
            if is_quantized(weight := getattr(layer, "weight", None)):
                found = f"'{key.replace('/', '.')}', whose weights are a {type(weight).__name__}"
                raise ValueError(f"LoRA.merge: found {found}, expected weights that are not quantised; {KEEP}")
        for key, layer in self._beside.items():
            addition, weight = cast(LowRank, self.layers[key]), cast(Tensor, layer.weight)
            added = self.scale * (addition.up.float() @ addition.down.float()).to(weight.device)
            weight.copy_(weight.float() + (added if isinstance(layer, nn.Linear) else added.T))
            for number, hook in list(layer._forward_hooks.items()):
                if isinstance(hook, _Beside) and hook.addition is addition:
                    del layer._forward_hooks[number]
        self._beside.clear()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let the network be written without it, for the length of a block, by someone who writes both."""
        self.is_apart = True
        try:
            yield
        finally:
            self.is_apart = False

    def is_in(self, network: nn.Module) -> bool:
        """Whether it stands beside layers of a network."""
        inside = {id(module) for module in network.modules()}
        return any(id(layer) in inside for layer in self._beside.values())

    # -- peft's files --------------------------------------------------------------------------------------------------------

    def _names(self, whole: nn.Module | None) -> dict[str, str]:
        """Names of the layers, by the keys of ``layers``: in the attached network, or in a larger one around it."""
        inside = {} if whole is None else {id(module): name for name, module in whole.named_modules()}
        return {key: inside.get(id(self._beside.get(key)), key.replace("/", ".")) for key in self.layers}

    def _tensors(self, whole: nn.Module | None = None) -> dict[str, Tensor]:
        """The parameters by the names that peft gives them."""
        named: dict[str, Tensor] = {}
        for key, own in self._names(whole).items():
            name, addition = f"base_model.model.{own}", cast(LowRank, self.layers[key])
            named |= {f"{name}.lora_A.weight": addition.down, f"{name}.lora_B.weight": addition.up}
        return named

    def save(self, folder: str | Path, whole: nn.Module | None = None, base: str | None = None) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json`` in peft's format.

        Args:
            folder: made if need be.
            whole: the model that it is to be loaded beside; None is the attached network.
            base: name or folder of that model, for the configuration.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in self._tensors(whole).items()}, folder / WEIGHTS)
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self._names(whole).values()),
            "base_model_name_or_path": base,
            "init_lora_weights": "gaussian",
            "bias": "none",
            "lora_dropout": 0.0,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def load(self, folder: str | Path, whole: nn.Module | None = None) -> None:
        """Take over the weights of an adapter that peft or ``save`` has written for the same layers, of ``whole`` where it says so.

        Raises:
            ValueError: its layers, its rank or its alpha are others, or it is added in another way.
        """
        folder, own = Path(folder), self._tensors(whole)
        for name in (CONFIG, WEIGHTS):
            assert_readable(folder / name)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if (config.get("r"), config.get("lora_alpha")) != (self.rank, self.alpha):
            found = f"rank {config.get('r')} and alpha {config.get('lora_alpha')}"
            raise ValueError(f"{folder}: found {found}, expected {self.rank} and {self.alpha}")
        if other := [key for key, plain in _OTHERWISE.items() if config.get(key, plain) not in (plain, None)]:
            raise ValueError(f"{folder}: found '{other[0]}: {config[other[0]]}', expected plain additions of weight alpha / rank")
        tensors = load_file(folder / WEIGHTS)
        if different := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(f"{folder}: found {different[0]} missing or without a place, expected the layers of this adapter")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _size(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, quantised ones and those of GPT-2 included; None of any other module."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):  # inside torch's attention, which reads its weights and never calls it
        return None
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    found = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return cast(tuple[int, int], found) if all(isinstance(number, int) for number in found) else None


def _rests(layer: nn.Module) -> bool:
    """Whether no loss reaches a layer, or none of its weights has a gradient though they could have one."""
    if getattr(layer, "rests", False):
        return True
    weights = list(layer.parameters(recurse=False))
    return bool(weights) and all(not is_quantized(weight) and not weight.requires_grad for weight in weights)
