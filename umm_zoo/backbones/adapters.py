"""Low-rank additions to the linear layers of a frozen network, as a part of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
_OTHERWISE |= {"fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None}


class LowRank(nn.Module):
    """``B(A(x))`` beside one linear layer; zero at the start, since B is.

    Shape:
        ``[..., in_dim]`` -> ``[..., out_dim]``
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_dim))
        self.up = nn.Parameter(torch.zeros(out_dim, rank))
        nn.init.normal_(self.down, std=1 / rank)

    def forward(self, x: Tensor) -> Tensor:
        """Down, then up."""
        return F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)


def assert_no_adapter(network: nn.Module, what: str) -> None:
    """Refuse to write the weights of a network that computes with an adapter's additions: they would not be in the file.

    Raises:
        ValueError: an adapter is attached.
    """
    adapted = [name for name, module in network.named_modules() if getattr(module, "has_adapter", False)]
    if adapted:
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
        self.enabled = True
        self._beside: dict[str, nn.Linear] = {}  # the network's own layers, by the keys of ``layers``; registered nowhere

    def attach(self, network: nn.Module) -> None:
        """Stand beside the linear layers of ``network`` from now on, and freeze it.

        Raises:
            ValueError: it is attached already, or no layer has such a name.
        """
        if len(self.layers):
            raise ValueError("LoRA.attach: found an adapter that is attached already, expected a new one")
        found = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
        for name, layer in found.items():
            if self._takes(name):
                addition = LowRank(layer.in_features, layer.out_features, self.rank).to(layer.weight.device)
                self.layers[name.replace(".", "/")] = addition
                layer.register_forward_hook(self._hook(addition))
                layer.has_adapter = True  # type: ignore[assignment]
                self._beside[name.replace(".", "/")] = layer
        if not len(self.layers):
            some = sorted({name.rpartition(".")[2] for name in found})
            raise ValueError(f"LoRA.targets: found {list(self.targets or ())}, expected ends of layer names such as {some}")
        network.requires_grad_(False)

    def _takes(self, name: str) -> bool:
        def ends(ending: str) -> bool:
            return name == ending or name.endswith(f".{ending}")

        return not ends("lm_head") and (self.targets is None or any(map(ends, self.targets)))

    def _hook(self, addition: LowRank) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output + (self.alpha / self.rank * addition(inputs[0])).to(output.dtype) if self.enabled else None

        return add

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The network as it was, for the length of a block: the reference policy."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @torch.no_grad()
    def merge(self) -> None:
        """Add it to the network's own weights, which then say the same without it; it is not used again."""
        for key, layer in self._beside.items():
            addition = cast(LowRank, self.layers[key])
            added = self.alpha / self.rank * addition.up.float() @ addition.down.float()
            layer.weight.copy_((layer.weight.float() + added).to(layer.weight.dtype))
            layer.has_adapter = False  # type: ignore[assignment]
        self.enabled = False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let the network be written without it, for the length of a block, by someone who writes both."""
        for layer in self._beside.values():
            layer.has_adapter = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for layer in self._beside.values():
                layer.has_adapter = True  # type: ignore[assignment]

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
