"""Weights of 8 or 4 bits: frozen parts in a quarter of the memory or less, by the libraries' own quantisation configurations."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from umm_zoo.backbones.adapters import assert_no_adapter
from umm_zoo.backbones.devices import own_device
from umm_zoo.backbones.quantized import find_quantized
from umm_zoo.errors import UserError, did_you_mean

#: What is tested here, by the library's ``quant_method``: the class of its configuration, in transformers and in diffusers alike.
METHODS = {"bitsandbytes": "BitsAndBytesConfig", "torchao": "TorchAoConfig"}
#: Arguments of a configuration that name the layers to be left as they are.
_SKIPPED = {"bitsandbytes": "llm_int8_skip_modules", "torchao": "modules_to_not_convert"}
_INSTALL = "pip install 'umm_zoo[quantization]'"
WHERE = "quantization"
NOTHING = "linear layers, not all of them skipped; bitsandbytes takes GPT-2's too"


@dataclass(frozen=True)
class Quantization:
    """A configuration of a library, by what an experiment or a ``config.json`` says.

    Args:
        config: the library's.
        method: ``bitsandbytes`` or ``torchao``.
        bits: of a weight.
        group: weights that share a scale; None is a row.
    """

    config: Any
    method: str
    bits: int
    group: int | None = None

    @classmethod
    def read(cls, stated: Mapping[str, Any], library: str, where: str = WHERE) -> Quantization:
        """A configuration from plain values.

        Args:
            stated: as the library writes it into ``config.json``: ``quant_method``, and the arguments of the library's class. Of
                torchao ``quant_type`` is the name of one of its configurations, or a map ``{_type: NAME, _data: {…}}``.
            library: ``transformers`` or ``diffusers``.
            where: for messages.

        Raises:
            UserError: another method, a missing library, an unknown argument, or one that would not be right here.
        """
        if not isinstance(stated, Mapping) or stated.get("quant_method") not in METHODS:
            said = stated.get("quant_method") if isinstance(stated, Mapping) else stated
            hint = f"such as {{quant_method: bitsandbytes, load_in_8bit: true}}; {_INSTALL}"
            raise UserError(f"{where}.quant_method", f"'{said}'", f"one of {', '.join(METHODS)}", hint)
        method = str(stated["quant_method"])
        assert_installed(method, where)
        kind = getattr(import_module(library), METHODS[method])
        known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "kwargs")]
        given = {key: value for key, value in stated.items() if key != "quant_method" and not key.startswith("_")}
        for key in given:
            if key not in known:
                raise UserError(f"{where}.{key}", "an unknown argument", f"one of {', '.join(known)}", did_you_mean(key, known))
        try:
            if method == "torchao":
                given["quant_type"] = _torchao(given.get("quant_type"), where)
            config: Any = kind(**given)
        except UserError:
            raise
        except (ValueError, TypeError, ImportError, AttributeError, AssertionError) as error:
            raise UserError(where, f"arguments that {kind.__name__} refuses ({error})", "those of the library") from error
        if method == "torchao":
            name = type(config.quant_type).__name__
            bits = re.search(r"(?:Int|Float)(\d)", name)
            return cls(config, method, int(bits[1]) if bits else 8, getattr(config.quant_type, "group_size", None))
        if config.load_in_8bit == config.load_in_4bit:
            raise UserError(where, "neither load_in_8bit nor load_in_4bit", "one of them to be true")
        return cls(config, method, 8) if config.load_in_8bit else cls(config, method, 4, 64)

    def stored_bytes(self, weight: Tensor) -> int:
        """Bytes of a weight matrix once it is quantised: its numbers, and a scale of 32 bit for each group of them.

        The scales of ``bnb_4bit_use_double_quant`` have 8 bit, and a scale of their own for each 256.
        """
        count = weight.numel()
        groups = -(-count // self.group) if self.group else weight.shape[0]
        scales = 4 * groups
        if getattr(self.config, "bnb_4bit_use_double_quant", False) and self.bits == 4:
            scales = groups + 4 * -(-groups // 256)
        return -(-count * self.bits // 8) + scales

    def converts(self, model: Any) -> Iterator[nn.Module]:
        """The layers of a network that its library would quantise."""
        stated: Any = getattr(self.config, _SKIPPED[self.method], None)
        exact: list[str] = list(getattr(model, "_keep_in_fp32_modules", None) or ())
        if isinstance(model, transformers.PreTrainedModel):
            skipped = HfQuantizer.get_modules_to_not_convert(model, stated, exact)
            end = ".weight" if self.method == "torchao" else ""  # it looks at the names of weights, and so passes over endings

            def takes(name: str) -> bool:
                return bool(should_convert_module(f"{name}{end}", skipped))

            kinds: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D) if self.method == "bitsandbytes" else (nn.Linear,)
        else:
            skipped, kinds = [*(stated or ()), *exact], (nn.Linear,)

            def takes(name: str) -> bool:
                return not any(f"{key}." in f"{name}." or key == name for key in skipped)

        for name, layer in model.named_modules():
            if isinstance(layer, kinds) and takes(name):
                yield layer

    def mark(self, model: Any) -> None:
        """Say of the weights of a network on the meta device what they will take; they are frozen, as loaded ones are.

        Raises:
            UserError: there are none.
        """
        label = f"{self.method} {self.bits} bit"
        layers = list(self.converts(model))
        if not layers:
            raise UserError(WHERE, f"no layer of a {type(model).__name__} that {self.method} quantises", NOTHING)
        for layer in layers:
            weight: Any = layer.weight
            weight.quantized_as = (label, self.stored_bytes(weight))
            weight.requires_grad_(False)


def _torchao(stated: Any, where: str) -> Any:
    """A configuration of torchao by its name, alone or with its fields."""
    if isinstance(stated, Mapping) and set(stated) == {"default"}:
        stated = stated["default"]
    node = {"_type": stated, "_data": {}} if isinstance(stated, str) else stated
    if not isinstance(node, Mapping) or not isinstance(node.get("_type"), str):
        expected = "the name of a configuration such as Int8WeightOnlyConfig, or {_type: NAME, _data: {group_size: 32}}"
        raise UserError(f"{where}.quant_type", f"'{stated}'", expected)
    if "Dynamic" in node["_type"] or "Static" in node["_type"]:  # no gradient passes the rounding: it would be wrong in silence
        hint = "gradients that pass the layer would be wrong"
        raise UserError(f"{where}.quant_type", f"'{node['_type']}', which rounds activations", "one of weights alone", hint)
    core: Any = import_module("torchao.core.config")
    name, found = str(node["_type"]), None
    for module in core.ALLOWED_AO_MODULES:
        with suppress(ImportError):
            found = found or getattr(import_module(module), name, None)
    version = {} if "_version" in node or found is None else {"_version": getattr(found, "version", 1)}
    config = core.config_from_dict({**version, "_data": {}, **node})
    if not isinstance(config, core.AOBaseConfig):
        raise UserError(f"{where}.quant_type", f"'{name}'", "a configuration such as Int8WeightOnlyConfig")
    return config


def assert_installed(method: str, where: str = WHERE) -> None:
    """Refuse a method whose library is not there.

    Raises:
        UserError: names what to install.
    """
    for package in (method, "accelerate"):
        try:
            missing = find_spec(package) is None
        except ValueError:  # a module that has no specification
            missing = False
        if missing:
            raise UserError(where, f"no package {package} for {method}", "it to be installed", _INSTALL)


def quantization_of(
    source: str, stored: Mapping[str, Any] | None, stated: Mapping[str, Any] | None, library: str
) -> Quantization | None:
    """How the weights of a checkpoint are quantised when they are loaded: as the experiment states it, or as they are stored.

    Raises:
        ValueError: both say something; or see ``Quantization.read``. Whoever knows the part's place in an experiment adds it.
    """
    kept: Any = (stored or {}).get("quantization_config")
    if kept and stated is not None:
        found = f"an argument beside weights of {source} that are quantised already ({kept.get('quant_method')})"
        raise ValueError(f"{WHERE}: found {found}, expected none, or weights that are not")
    try:
        if kept:
            return Quantization.read(kept, library, f"{source}: config.json: quantization_config")
        return None if stated is None else Quantization.read(stated, library)
    except UserError as error:
        raise ValueError(str(error)) from error


def loading(chosen: Quantization | None, stated: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise; weights stored so need none but a device."""
    if chosen is None:
        return {}
    given = {} if stated is None else {"quantization_config": chosen.config}
    if torch.cuda.is_available() and chosen.method == "bitsandbytes":  # it quantises there, each process on its own
        given["device_map"] = {"": own_device()}
    return given


def settle(model: nn.Module) -> None:
    """Refuse a network without a quantised layer, and give loaded layers of bitsandbytes what they need here.

    A layer of 4 bits on a CPU with AVX512-BF16 would turn its weights into a form without gradient as soon as it is called without
    one, and a layer of 8 bits would log a line at each call.

    Raises:
        UserError: no layer was quantised.
    """
    if find_quantized(model) is None:
        raise UserError(WHERE, f"no layer of a {type(model).__name__} that the library quantises", NOTHING)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def assert_writable(network: Any, what: str) -> None:
    """Refuse to write a network whose file would not hold what it computes with: an adapter, or weights that its library keeps in
    a quantised form and does not know of.

    Raises:
        ValueError: says which.
    """
    assert_no_adapter(network, what)
    if (found := find_quantized(network)) is not None and getattr(network, "hf_quantizer", None) is None:
        expected = "weights that are not, or an adapter beside them alone (LoRA.save)"
        raise ValueError(f"{what}: found quantised weights, such as '{found}', in a model put together here, expected {expected}")
