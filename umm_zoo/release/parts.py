"""Parts of a method that a library's folder holds: where they stand, how they are written, and what loads them again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umm_zoo.backbones.loading import torch_dtype
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.errors import UserError
from umm_zoo.experiment.shipped import PREFIX
from umm_zoo.experiment.types import TARGET, is_node

#: Parts by which a run that only trains one is known, in the order in which they are looked for.
PARTS = ("encoder", "tower", "decoder", "codec", "vlm")
#: Arguments of ``from_pretrained`` that its folder answers.
_IN_FOLDER = ("source", "config", "tokenizer", "subfolder", "variant", "gradient_checkpointing", "quantization")


@dataclass
class LibraryPart:
    """A part with a folder of its own.

    Args:
        path: where its node stands below the method's.
        folder: name of its folder.
        module: what is written.
        node: its node, as the run says it.
    """

    path: tuple[str, ...]
    folder: str
    module: Any
    node: Mapping[str, Any]

    @property
    def source(self) -> str | None:
        """What it was loaded from before it was trained, if anything."""
        found = self.node.get("source")
        return str(found) if found is not None else None

    @property
    def network(self) -> Any:
        """The library's own network inside."""
        whole = getattr(self.module, "_whole", None)
        return whole[0] if whole else self.module.model

    def load_node(self, source: str) -> dict[str, Any]:
        """Lines of an experiment file that load it again as it was: what the run said and its files do not."""
        kind = type(self.module)
        known = set(inspect.signature(kind.from_pretrained).parameters) - {*_IN_FOLDER}
        kept = {name: self.node[name] for name in self.node if name in known}
        if isinstance(template := kept.get("template"), Mapping) and "source" in template:
            kept["template"] = {**template, "source": source}  # it is written beside the weights
        return {TARGET: f"{kind.__module__}.{kind.__qualname__}.from_pretrained", "source": source, **kept}


def library_parts(node: Mapping[str, Any], method: nn.Module) -> list[LibraryPart]:
    """The parts of a built method that can be written as a library's folder, whose names are all different."""
    found = list(_walk(node, method, ()))
    names = [path[-1] for path, _, _ in found]
    return [LibraryPart(p, p[-1] if names.count(p[-1]) == 1 else "_".join(p), module, own) for p, module, own in found]


def _walk(node: Mapping[str, Any], module: nn.Module, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    for name, own in node.items():
        part = getattr(module, name, None)
        if not is_node(own) or not isinstance(part, nn.Module):
            continue
        if hasattr(part, "save") and hasattr(type(part), "from_pretrained"):
            yield (*path, name), part, own
        else:
            yield from _walk(own, part, (*path, name))


def whole_tree(node: Mapping[str, Any], adapters: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The node of a method and its adapters, without any node that loads another run: that run's own stand in its place.

    Adapters of a method inside are named by its place: ``renderer.bridge.decoder``.
    """
    found: dict[str, Any] = {}
    beside = dict(adapters or {})
    for name, value in node.items():
        own: Mapping[str, Any] | None = None
        if _is_run(value):
            inside = load_checkpoint(value["source"], mapped=True)["experiment"]
            value, own = _loaded(value, inside["method"]), inside.get("adapters")
        if isinstance(value, Mapping):
            found[name], below = whole_tree(value, own)
            beside |= {f"{name}.{part}": adapter for part, adapter in below.items()}
        else:
            found[name] = copy.deepcopy(value)
    return found, beside


def is_of_run(node: Any, path: Sequence[str]) -> bool:
    """Whether what stands below a method's node came with the weights of another run."""
    places = accumulate(path, lambda above, name: above.get(name, {}), initial=node)
    return any(map(_is_run, places))


def _is_run(node: Any) -> bool:
    return is_node(node) and str(node[TARGET]).endswith((".load", ".load_codec")) and "source" in node


def _loaded(node: Mapping[str, Any], method: Mapping[str, Any]) -> Mapping[str, Any]:
    """The node of what a node loads of a run: its method, or the codec in it."""
    if str(node[TARGET]).endswith(".load"):
        return method
    return next((method[name] for name in ("tokenizer", "codec") if is_node(method.get(name))), method)


def assert_whole(node: Any, parts: Sequence[LibraryPart], path: tuple[str, ...] = ()) -> None:
    """Refuse the node of a method that still needs weights from elsewhere than its parts' folders.

    Raises:
        UserError: names it.
    """
    if path in {part.path for part in parts}:
        return
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, Mapping):
        return
    if str(node.get(TARGET, "")).rpartition(".")[2] in ("from_pretrained", "from_parts", "load", "load_codec"):
        said = node.get("source", node.get("vision_tower"))
        found = f"weights of '{said}' in a place that cannot be exported"
        raise UserError(".".join(("method", *path)), found, "parts with a folder of their own")
    for name, value in node.items():
        assert_whole(value, parts, (*path, str(name)))


def rest_of(method: nn.Module, parts: Sequence[LibraryPart]) -> dict[str, Tensor]:
    """Every tensor of a method that stands in none of the parts."""
    inside = {id(tensor) for part in parts for tensor in part.module.state_dict(keep_vars=True).values()}
    own = {".".join((*part.path, key)) for part in parts for key in part.module.state_dict()}  # quantised: the library's
    return {key: value for key, value in method.state_dict(keep_vars=True).items() if id(value) not in inside and key not in own}


def is_hub_name(source: str) -> bool:
    """Whether a source is a name that others can load too, and neither a folder of this machine nor what ships."""
    return not source.startswith(PREFIX) and not Path(source).exists()


def find_part(method: Any, source: str | Path, names: Sequence[str] = PARTS) -> tuple[str, Any]:
    """The part of a run that others use, and its name.

    Raises:
        UserError: it has none of these names.
    """
    for name in names:
        if isinstance(part := getattr(method, name, None), nn.Module):
            return name, part
    raise UserError(source, f"a {type(method).__name__} with the parts {sorted(method.parts())}", f"one of {', '.join(names)}")


def cast(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Tensors on their own memory, floats in another dtype where one is said."""
    kind = None if dtype is None else torch_dtype(dtype)
    moved = {key: value.detach().to(kind if kind and value.is_floating_point() else value.dtype) for key, value in tensors.items()}
    return {key: value.cpu().clone().contiguous() for key, value in moved.items()}


def shrink(folder: Path, dtype: str | None) -> None:
    """Store the floating weights of a folder in another dtype; its config keeps saying what the network computes in."""
    for path in folder.glob("*.safetensors") if dtype else ():
        save_file(cast(load_file(path), dtype), path, metadata={"format": "pt"})


def assert_same(found: nn.Module, written: nn.Module, dtype: str | None, where: str) -> None:
    """Refuse what was read back if it is not what was to be written.

    Raises:
        UserError: a tensor differs.
    """
    own = found.state_dict()
    for key, value in written.state_dict().items():
        kept = (
            value.cpu(),
            cast({key: value}, dtype)[key],
        )  # as it was, where a config holds it (a codec's scaling), or as it is stored
        if key not in own or not any(own[key].equal(other.to(own[key].dtype)) for other in kept):
            hint = "parts of several dtypes can be stored in one alone: --dtype float32"
            raise UserError(where, f"'{key}' that is not read back as it was written", "the same weights", hint)
