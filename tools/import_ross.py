"""Weights of ROSS's release (github.com/Haochen-Wang409/ross) to a checkpoint of this package, and back.

    python tools/import_ross.py CHECKPOINT_FOLDER --out ross.ckpt --experiment experiments/ross/paper/d-stage2.yaml
    python tools/import_ross.py mm_projector.bin mm_inv_projector.bin --out ross-stage1.ckpt
    python tools/import_ross.py ross.ckpt --export released.safetensors

The checkpoint holds denoiser, projector and, where the files have it, the language model under the names of ``methods.ROSS``: train
on with ``python -m umm_zoo.fit FILE after=ross.ckpt``. With ``--experiment`` it also holds that experiment, and then every command
that takes a finished run takes it. Every tensor that is not known is refused by name, and so is one that is missing. Vision tower
and codec are read from their own files and only counted here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from umm_zoo.blocks.denoisers import DenoiserHead
from umm_zoo.blocks.transformer import position_table
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.errors import UserError
from umm_zoo.experiment.file import load_experiment

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
PROJECTOR = {"0": "linear_1", "2": "linear_2"}  # released layer -> the library's
LANGUAGE = ("embed_tokens.", "layers.", "norm.")


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


def read_files(sources: Iterable[Path]) -> State:
    """All tensors of files (``.bin``, ``.pt``, ``.pth``, ``.safetensors``) and of folders of such files.

    Raises:
        FileNotFoundError: a source does not exist, or a folder holds no weights.
        ValueError: a tensor stands in two files.
    """
    state: State = {}
    for source in sources:
        files = [source]
        if source.is_dir():
            files = (
                sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin")) or sorted(source.glob("mm_*.bin"))
            )
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{source}: no weights found (.safetensors or .bin)")
        for file in files:
            part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
            if twice := sorted(part.keys() & state.keys()):
                raise ValueError(f"{file}: {len(twice)} tensors stand in an earlier file too, such as '{twice[0]}'")
            state |= part
    return state


def sort_parts(state: Mapping[str, Tensor]) -> Release:
    """Sort the tensors of a checkpoint into its parts by the release's prefixes.

    Raises:
        ValueError: names that belong to no part or are missing from projector or language model, all of them listed; or the other
            denoiser of the release's repository.
    """
    release, unknown = Release(), []
    for name, tensor in state.items():
        bare = name.removeprefix("model.")
        if bare.startswith("mm_inv_projector."):
            release.head[bare.removeprefix("mm_inv_projector.")] = tensor
        elif bare.startswith("mm_projector."):
            release.projector[bare.removeprefix("mm_projector.")] = tensor
        elif bare.startswith("vision_tower.vision_tower."):
            release.tower[bare.removeprefix("vision_tower.vision_tower.")] = tensor
        elif bare.startswith("pixel_decoder.pixel_decoder."):
            release.codec[bare.removeprefix("pixel_decoder.pixel_decoder.")] = tensor
        elif bare.startswith(LANGUAGE) or name == "lm_head.weight":
            release.language[name if name == "lm_head.weight" else f"model.{bare}"] = tensor
        else:
            unknown.append(name)
    other = [name for name in release.head if not name.startswith("net.") and name in ("pos_embed", "ln_pre.weight", "ln_pre.bias")]
    if other:
        raise ValueError(
            f"mm_inv_projector.{other[0]}: this is the release's other denoiser (conditions added to the tokens, no modulation), "
            "which none of its recipes builds; expected the modulated one, whose names start with mm_inv_projector.net."
        )
    unknown += [f"mm_inv_projector.{name}" for name in release.head if not name.startswith("net.")]
    if unknown:
        raise ValueError(_listing("names that no part of the release has", unknown))
    release.head = {name.removeprefix("net."): tensor for name, tensor in release.head.items()}
    if release.projector:
        _compare("mm_projector", release.projector, [f"{n}.{kind}" for n in PROJECTOR for kind in ("weight", "bias")])
    if release.language:
        _compare("language model", release.language, language_names(release.language))
    return release


def language_names(found: Iterable[str]) -> set[str]:
    """What a language model with these tensors must have: every layer what any has, embeddings, the final norm.

    The output layer may be the embedding matrix, so ``lm_head.weight`` may be absent.
    """
    names = set(found)
    inside = [name.removeprefix("model.layers.").split(".", 1) for name in names if name.startswith("model.layers.")]
    depth = 1 + max((int(number) for number, _ in inside), default=-1)
    every = {f"model.layers.{i}.{rest}" for i in range(depth) for rest in {rest for _, rest in inside}}
    return every | {"model.embed_tokens.weight", "model.norm.weight"} | (names & {"lm_head.weight"})


def head_layers(depth: int) -> dict[str, str]:
    """Released layer -> ours for a head of ``depth`` blocks."""
    layers: dict[str, str] = {}
    for released, ours in LAYERS.items():
        if "{}" in released:
            layers |= {released.format(i): ours.format(i) for i in range(depth)}
        else:
            layers[released] = ours
    return layers


def head_to_ours(head: Mapping[str, Tensor]) -> State:
    """The denoiser's tensors under our names; the 1 x 1 convolution becomes a matrix, nothing else changes.

    Raises:
        ValueError: tensors are missing or unknown (all are listed), or their shapes do not fit each other.
    """
    depth = 1 + max((int(name.split(".")[1]) for name in head if name.startswith("blocks.")), default=-1)
    layers = head_layers(depth)
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    _compare("mm_inv_projector.net", head, ["pos_embed", *names])
    _check_shapes(head, depth)
    ours = {"positions": head["pos_embed"]}
    for released, own in layers.items():
        for kind in ("weight", "bias"):
            tensor = head[f"{released}.{kind}"]
            ours[f"{own}.{kind}"] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return ours


def head_to_release(ours: Mapping[str, Tensor]) -> State:
    """The inverse of ``head_to_ours``."""
    depth = 1 + max((int(name.split(".")[1]) for name in ours if name.startswith("blocks.")), default=-1)
    head = {"pos_embed": ours["positions"]}
    for released, own in head_layers(depth).items():
        for kind in ("weight", "bias"):
            tensor = ours[f"{own}.{kind}"]
            head[f"{released}.{kind}"] = tensor[..., None, None] if (released, kind) == ("x_embedder.proj", "weight") else tensor
    return head


def head_from_release(head: Mapping[str, Tensor], prefix: str = "net.") -> DenoiserHead:
    """A ``DenoiserHead`` with the released weights, all sizes read from their shapes.

    Args:
        head: released tensors, of which those that start with ``prefix`` are taken.
        prefix: what stands before ``pos_embed`` in the names.
    """
    ours = head_to_ours({name.removeprefix(prefix): tensor for name, tensor in head.items() if name.startswith(prefix)})
    width, channels = ours["latent_in.weight"].shape
    built = DenoiserHead(
        condition_dim=ours["condition_in.weight"].shape[1],
        grid=math.isqrt(ours["positions"].shape[1]),
        channels=channels,
        width=width,
        depth=sum(name.endswith(".modulation.weight") for name in ours),
        heads=HEADS,
    )
    built.to(ours["out.weight"].dtype).load_state_dict(ours)
    return built


def describe(release: Release) -> list[str]:
    """What a checkpoint holds, a line per part."""
    lines = []
    if release.head:
        ours = head_to_ours(release.head)
        table = position_table(math.isqrt(ours["positions"].shape[1]), ours["positions"].shape[2])
        difference = (ours["positions"][0].double() - table).abs().max()
        width, channels = ours["latent_in.weight"].shape
        depth = sum(name.endswith(".modulation.weight") for name in ours)
        condition, tokens = ours["condition_in.weight"].shape[1], ours["positions"].shape[1]
        lines.append(
            f"denoiser: {len(release.head)} tensors, {_count(release.head):,} parameters, condition {condition}, "
            f"width {width}, {channels} channels, {tokens} tokens, "
            f"depth {depth}, heads {HEADS}"
        )
        lines.append(f"denoiser positions: largest difference from the sine-cosine table {float(difference):.3g}")
    else:
        lines.append("denoiser: none in these files; the head would start untrained")
    if release.projector:
        width, tower = release.projector["0.weight"].shape
        lines.append(f"projector: tower {tower} -> language model {width}, {_count(release.projector):,} parameters")
    else:
        lines.append("projector: none in these files")
    for name, part in (("language model", release.language), ("vision tower", release.tower), ("codec", release.codec)):
        lines.append(f"{name}: {len(part)} tensors" if part else f"{name}: none in these files")
    return lines


def check_config(release: Release, config: Mapping[str, object]) -> None:
    """Compare the sizes that a checkpoint's ``config.json`` names with those of its tensors.

    Raises:
        ValueError: they disagree.
    """
    found: dict[str, int] = {}
    if release.head:
        tokens = release.head["pos_embed"].shape[1]
        found |= {
            "image_embed_len": tokens,
            "decode_image_size": 16 * math.isqrt(tokens),
            "mm_inv_hidden_size": release.head["x_embedder.proj.weight"].shape[1],
            "hidden_size": release.head["z_embedder.1.weight"].shape[1],
        }
    if release.projector:
        found["mm_hidden_size"] = release.projector["0.weight"].shape[1]
    for name, value in found.items():
        if name in config and config[name] != value:
            raise ValueError(f"config.json: {name} is {config[name]}, the tensors say {value}")


def import_state(release: Release) -> State:
    """Everything ROSS trains, under the names of the method's ``state_dict``."""
    state = {f"head.{name}": tensor for name, tensor in (head_to_ours(release.head) if release.head else {}).items()}
    for name, tensor in release.projector.items():
        layer, kind = name.split(".")
        state[f"vlm.projector.{PROJECTOR[layer]}.{kind}"] = tensor
    return state | {f"vlm.language_model.{name}": tensor for name, tensor in release.language.items()}


def export_state(state: Mapping[str, Tensor]) -> State:
    """The inverse of ``import_state``, under the names of a full released checkpoint.

    Raises:
        ValueError: a tensor belongs to none of the parts that ROSS trains.
    """
    head, released, unknown = {}, {}, []
    layers = {own: layer for layer, own in PROJECTOR.items()}
    for name, tensor in state.items():
        if name.startswith("head."):
            head[name.removeprefix("head.")] = tensor
        elif name.startswith("vlm.projector."):
            own, kind = name.removeprefix("vlm.projector.").split(".")
            released[f"model.mm_projector.{layers[own]}.{kind}"] = tensor
        elif name.startswith("vlm.language_model."):
            released[name.removeprefix("vlm.language_model.")] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(_listing("tensors of no part that ROSS trains", unknown))
    return released | {f"model.mm_inv_projector.net.{k}": v for k, v in (head_to_release(head) if head else {}).items()}


def _check_shapes(head: Mapping[str, Tensor], depth: int) -> None:
    width, channels = head["x_embedder.proj.weight"].shape[:2]
    tokens = head["pos_embed"].shape[1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"mm_inv_projector.net.pos_embed: {tokens} tokens are no square grid")
    if channels % 4:
        raise ValueError(f"mm_inv_projector.net.x_embedder.proj.weight: {channels} channels are no 2 x 2 windows of a latent")
    with torch.device("meta"):
        built = DenoiserHead(head["z_embedder.1.weight"].shape[1], math.isqrt(tokens), channels, width, depth, HEADS)
    for name, tensor in head_to_release(built.state_dict()).items():
        if head[name].shape != tensor.shape:
            raise ValueError(f"mm_inv_projector.net.{name}: found {list(head[name].shape)}, expected {list(tensor.shape)}")


def _compare(where: str, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, unknown = set(expected) - set(found), set(found) - set(expected)
    if missing:
        raise ValueError(f"{where}: " + _listing("tensors are missing", missing))
    if unknown:
        raise ValueError(f"{where}: " + _listing("unknown tensors", unknown))


def _listing(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} {what}: {', '.join(names)}"


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="a released folder, or files; with --export a checkpoint")
    parser.add_argument("--out", type=Path, help="write the checkpoint here; without it the files are only examined")
    parser.add_argument("--experiment", type=Path, help="the experiment that the checkpoint is to hold")
    parser.add_argument("--export", type=Path, help="go the other way: write the released names (.safetensors)")
    options = parser.parse_args(arguments)
    try:
        if options.export:
            _save(export_state(load_checkpoint(options.sources[0])["state_dict"]), options.export)
            return 0
        release = sort_parts(read_files(options.sources))
        config = options.sources[0] / "config.json"
        if config.is_file():
            check_config(release, json.loads(config.read_text()))
        state = import_state(release)
        print("\n".join(describe(release)))
        if options.out:
            checkpoint: dict[str, object] = {"state_dict": state}
            if options.experiment:
                checkpoint["experiment"] = load_experiment(options.experiment, []).resolved()
            options.out.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, options.out)
    except (ValueError, FileNotFoundError, UserError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _save(state: State, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


if __name__ == "__main__":
    sys.exit(main())
