"""Weights of ROSS's release under the names of this package, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from umm_zoo.blocks.denoisers import DenoiserHead

State = dict[str, Tensor]
HEADS = 16  # hard-wired in the release, at every width

# released name -> ours, weight and bias alike; {} is the number of a block
LAYERS = {
    "x_embedder.proj": "latent_in",
    "t_embedder.mlp.0": "time_in.0",
    "t_embedder.mlp.2": "time_in.2",
    "z_embedder.1": "condition_in",
    "blocks.{}.attn.qkv": "blocks.{}.attention.qkv",
    "blocks.{}.attn.proj": "blocks.{}.attention.out",
    "blocks.{}.mlp.fc1": "blocks.{}.feed_forward.wide",
    "blocks.{}.mlp.fc2": "blocks.{}.feed_forward.out",
    "blocks.{}.adaLN_modulation.1": "blocks.{}.modulation",
    "final_layer.adaLN_modulation.1": "final_modulation",
    "final_layer.linear": "out",
}
PROJECTOR = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias", "2.weight": "linear_2.weight", "2.bias": "linear_2.bias"}
LANGUAGE = ("embed_tokens.", "layers.", "norm.")
#: Prefix of a released name, behind ``model.`` -> part.
PARTS = {
    "mm_inv_projector.": "head",
    "mm_projector.": "projector",
    "vision_tower.vision_tower.": "tower",
    "pixel_decoder.pixel_decoder.": "codec",
}


@dataclass
class Release:
    """A released checkpoint, sorted into parts; every name below is free of the part's prefix.

    Attributes:
        head: the denoiser under its released names (after ``net.``), empty where the files hold none.
        projector: ``0.weight`` … ``2.bias``, empty where the files hold none.
        language: the language model under its Hugging Face names.
        tower, codec: frozen parts that some checkpoints repeat.
    """

    head: State = field(default_factory=dict)
    projector: State = field(default_factory=dict)
    language: State = field(default_factory=dict)
    tower: State = field(default_factory=dict)
    codec: State = field(default_factory=dict)


def sort_parts(state: Mapping[str, Tensor]) -> Release:
    """Sort the tensors of a checkpoint into its parts by the release's prefixes.

    Raises:
        ValueError: names that belong to no part or are missing from projector or language model, all of them listed; or the other
            denoiser of the release's repository.
    """
    release, unknown = Release(), []
    for name, tensor in state.items():
        bare = name.removeprefix("model.")
        prefix = next((prefix for prefix in PARTS if bare.startswith(prefix)), "")
        if prefix:
            getattr(release, PARTS[prefix])[bare.removeprefix(prefix)] = tensor
        elif bare.startswith(LANGUAGE) or name == "lm_head.weight":
            release.language[name if name == "lm_head.weight" else f"model.{bare}"] = tensor
        else:
            unknown.append(name)
    foreign = [name for name in release.head if not name.startswith("net.")]
    if other := [name for name in foreign if name in ("pos_embed", "ln_pre.weight", "ln_pre.bias")]:
        raise ValueError(
            f"mm_inv_projector.{other[0]}: this is the release's other denoiser (conditions added to the tokens, no modulation), "
            "which none of its recipes builds; expected the modulated one, whose names start with mm_inv_projector.net."
        )
    _refuse("names that no part of the release has", unknown + [f"mm_inv_projector.{name}" for name in foreign])
    release.head = {name.removeprefix("net."): tensor for name, tensor in release.head.items()}
    if release.projector:
        _compare("mm_projector: ", release.projector, PROJECTOR)
    if release.language:
        _compare("language model: ", release.language, language_names(release.language))
    return release


def language_names(found: Iterable[str]) -> set[str]:
    """Tensors that a language model like this must have: every layer what any has, embeddings, the final norm.

    The output layer may be the embedding matrix, so ``lm_head.weight`` may be absent.
    """
    names = set(found)
    inside = [name.removeprefix("model.layers.").split(".", 1) for name in names if name.startswith("model.layers.")]
    depth = 1 + max((int(number) for number, _ in inside), default=-1)
    every = {f"model.layers.{i}.{rest}" for i in range(depth) for _, rest in inside}
    return every | {"model.embed_tokens.weight", "model.norm.weight"} | (names & {"lm_head.weight"})


def head_names(found: Iterable[str]) -> dict[str, str]:
    """Released name -> ours for every tensor of a head, of as many blocks as there are in the names of ``found``."""
    depth = 1 + max((int(name.split(".")[1]) for name in found if name.startswith("blocks.")), default=-1)
    layers = {a.format(i): b.format(i) for a, b in LAYERS.items() for i in range(depth if "{}" in a else 1)}
    return {"pos_embed": "positions"} | {f"{a}.{kind}": f"{b}.{kind}" for a, b in layers.items() for kind in ("weight", "bias")}


def head_to_ours(head: Mapping[str, Tensor]) -> State:
    """The denoiser's tensors under our names; the 1 x 1 convolution becomes a matrix, nothing else changes.

    Raises:
        ValueError: tensors are missing or unknown (all are listed), or their shapes do not fit each other.
    """
    names = head_names(head)
    _compare("mm_inv_projector.net: ", head, names)
    ours = {own: head[released].flatten(1) if head[released].ndim == 4 else head[released] for released, own in names.items()}
    tokens, channels = head["pos_embed"].shape[1], head["x_embedder.proj.weight"].shape[1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"mm_inv_projector.net.pos_embed: {tokens} tokens are no square grid")
    if channels % 4:
        raise ValueError(f"mm_inv_projector.net.x_embedder.proj.weight: {channels} channels are no 2 x 2 windows of a latent")
    with torch.device("meta"):
        built = built_for(ours)
    for name, tensor in head_to_release(built.state_dict()).items():
        if head[name].shape != tensor.shape:
            raise ValueError(f"mm_inv_projector.net.{name}: found {list(head[name].shape)}, expected {list(tensor.shape)}")
    return ours


def head_to_release(ours: Mapping[str, Tensor]) -> State:
    """The inverse of ``head_to_ours``."""
    names = head_names(ours)
    return {name: ours[own][..., None, None] if name == "x_embedder.proj.weight" else ours[own] for name, own in names.items()}


def built_for(ours: Mapping[str, Tensor]) -> DenoiserHead:
    """A ``DenoiserHead`` of the sizes that these tensors have."""
    width, channels = ours["latent_in.weight"].shape
    return DenoiserHead(
        condition_dim=ours["condition_in.weight"].shape[1],
        grid=math.isqrt(ours["positions"].shape[1]),
        channels=channels,
        width=width,
        depth=sum(name.endswith(".modulation.weight") for name in ours),
        heads=HEADS,
    )


def head_from_release(head: Mapping[str, Tensor]) -> DenoiserHead:
    """A ``DenoiserHead`` with the released weights, named as in ``Release.head``."""
    ours = head_to_ours(head)
    built = built_for(ours).to(ours["out.weight"].dtype)
    built.load_state_dict(ours)
    return built


def import_state(release: Release) -> State:
    """Everything ROSS trains, under the names of the method's ``state_dict``."""
    state = {f"head.{name}": tensor for name, tensor in (head_to_ours(release.head) if release.head else {}).items()}
    state |= {f"vlm.projector.{PROJECTOR[name]}": tensor for name, tensor in release.projector.items()}
    return state | {f"vlm.language_model.{name}": tensor for name, tensor in release.language.items()}


def export_state(state: Mapping[str, Tensor]) -> State:
    """The inverse of ``import_state``, under the names of a full released checkpoint.

    Raises:
        ValueError: a tensor belongs to none of the parts that ROSS trains.
    """
    parts: dict[str, State] = {"head.": {}, "vlm.projector.": {}, "vlm.language_model.": {}}
    unknown = []
    for name, tensor in state.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is None:
            unknown.append(name)
        else:
            parts[prefix][name.removeprefix(prefix)] = tensor
    _refuse("tensors of no part that ROSS trains", unknown)
    head, projector, language = parts.values()
    released = {f"model.mm_projector.{name}": projector[own] for name, own in PROJECTOR.items() if own in projector}
    return {
        **language,
        **released,
        **{f"model.mm_inv_projector.net.{k}": v for k, v in (head_to_release(head) if head else {}).items()},
    }


def _compare(where: str, found: Iterable[str], expected: Iterable[str]) -> None:
    _refuse("tensors are missing", set(expected) - set(found), where)
    _refuse("unknown tensors", set(found) - set(expected), where)


def _refuse(what: str, names: Iterable[str], where: str = "") -> None:
    if listed := sorted(names):
        raise ValueError(f"{where}{len(listed)} {what}: {', '.join(listed)}")
