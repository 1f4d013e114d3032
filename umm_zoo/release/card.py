"""Card of what is released: one record, ``card.json``, and a README made from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from umm_zoo.checkpoints.plain_files import strict_json
from umm_zoo.shapes.samples import usual_mark_share
from umm_zoo.shapes.scenes import World

#: The licence of what does not say it.
NOT_STATED = "not stated"
#: Fields of a world that the shapes command has options for.
_FIELDS = ("cells", "num_colours", "num_shapes", "max_objects", "image_size", "detail", "sizes", "max_jitter")
#: Options of that command for the tasks, in the order of a card.
_OPTIONS = ("train", "val", "test", "heldout", "mark-share", "caption-order", "tasks", "samples-per-shard")


def world_of(shards: str) -> dict[str, Any] | None:
    """Making of the shapes world that holds these shards, from its ``world.json``; None where there is none."""
    folder = Path(shards).parent.parent
    if not (folder / "world.json").is_file():
        return None
    found = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    return {"folder": folder.as_posix(), "commands": world_commands(folder, found), "seed": found["seed"], "world": found["world"]}


def world_commands(folder: Path, found: dict[str, Any]) -> list[str]:
    """The commands that write such a world: one for all tasks of equal numbers, with what is not the default."""
    tasks: dict[str, dict[str, Any]] = {}
    for part, entry in found["parts"].items():
        split, task = part.split("/")
        sizes = tasks.setdefault(task, {"samples-per-shard": entry["samples_per_shard"]})
        sizes["test" if split == "hybrid" else split] = entry["samples"]
        for name in ("mark_share", "caption_order"):
            if name in entry:
                sizes[name.replace("_", "-")] = entry[name]
    default = World().to_json()
    world = {**default, **found["world"]}
    start = ["python -m data_pipelines.shapes", folder.as_posix(), f"--seed {found['seed']}"]
    start += [f"--{f.removeprefix('num_').replace('_', '-')} {_plain(world[f])}" for f in _FIELDS if world[f] != default[f]]
    start += ["--plain"] * (not world["striped"])
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for task, sizes in tasks.items():
        # mark pairs have no train split unless asked for; they join the others all the same
        group = groups.setdefault(tuple(sizes.get(name) for name in ("val", "test", "heldout", "samples-per-shard")), {"tasks": []})
        group |= {**sizes, "tasks": [*group["tasks"], task]}
    commands = []
    for group in groups.values():
        numbers = {"train": 0, "val": 0, "test": 0, "heldout": 0, **group}
        usual = {"heldout": numbers["test"], "mark-share": usual_mark_share(World(**world)), "caption-order": "canonical"}
        given = [name for name in _OPTIONS if name in numbers and numbers[name] != usual.get(name)]
        commands.append(" ".join([*start, *(f"--{name} {_plain(numbers[name])}" for name in given)]))
    return commands


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown(card: dict[str, Any]) -> str:
    """The README of a part."""
    recipe, machine = card["recipe"], card["machine"]
    gpus = f", {', '.join(machine['gpus'])}" if machine.get("gpus") else ""
    weights = f" {card['weights'].capitalize()} weights of the run." if "weights" in card else ""
    adapter = f" {card['adapter']}" if card.get("adapter") else ""
    lines = [
        *_front_matter(card),
        f"# {card['part']}",
        "",
        f"{card['class'].rsplit('.', 1)[-1]}, {card['parameters']:,} parameters, stored as {card['stored_as']} "
        f"({card['weights_bytes'] / 2**20:.2f} MiB).{weights}{adapter} This file is made from `card.json`.",
        "",
        "```yaml",
        yaml.safe_dump(card["load"], sort_keys=False).rstrip(),
        "```",
        "",
        *_parts(card),
        *_script(card),
        "## Recipe",
        "",
        f"Trained by this repository: `{recipe['command']}`, {recipe['steps']} steps of {recipe['batch_size']} samples, "
        f"seed {recipe['seed']}. Again, with its data: `{recipe['again']}`.",
        "",
        *(f"- after `{stage['experiment']}`: {stage['steps']} steps in {stage['seconds']:.0f} s" for stage in recipe["after"]),
        *([""] if recipe["after"] else []),
        f"{_seconds(card['seconds'])} in all on {machine['system']} ({machine['cpus']} processors, {machine['threads']} threads "
        f"used{gpus}), commit {card['commit']}.",
        "",
        "## Held-out scores",
        "",
        *_score_table(card["scores"]),
    ]
    if card["probes"]:
        lines += ["", *_probe_table(card["probes"])]
    lines += ["", "## Data", ""]
    for world in card["worlds"]:
        lines += ["```bash", *world["commands"], "```", "", f"World: {json.dumps(world['world'])}.", ""]
    sources = [
        [f"{found['split']} `{found['name']}`", f"`{found['shards']}`", _number(found["samples"]), _number(found["read"])]
        for found in card["sources"]
    ]
    return "\n".join([*lines, *markdown_table(["source", "shards", "samples", "read"], sources), ""])


def _front_matter(card: dict[str, Any]) -> list[str]:
    """What the hub reads of a card; nothing of one from before there was a command for it."""
    if "library" not in card:
        return []
    fields = {"library_name": card["library"], "tags": ["umm_zoo", card["class"].rsplit(".", 1)[-1]]}
    if len(licences := {part["licence"] for part in card["parts"]} - {NOT_STATED}) == 1:
        fields["license"] = licences.pop()
    return ["---", yaml.safe_dump(fields, sort_keys=False).rstrip(), "---", ""]


def _parts(card: dict[str, Any]) -> list[str]:
    """Folders of the parts, what loads them, what they were made from, and under which licence that is."""
    rows = [
        [f"`{part['folder']}`", f"`{part['network']}`", f"{part['parameters']:,}", part["made_from"] or "-", part["licence"]]
        for part in card.get("parts", ())
    ]
    if not rows:
        return []
    table = markdown_table(["folder", "loads with", "parameters", "made from", "its licence"], rows)
    said = "The licence of what was trained here is for whoever publishes it to state; what it was made from binds it."
    return ["## Parts", "", *table, "", said, ""]


def _script(card: dict[str, Any]) -> list[str]:
    """How to use it without this package."""
    if "script" not in card:
        return []
    text = "Text to image with torch, transformers, diffusers and safetensors alone, in the run's own size and settings:"
    return [text, "", "```bash", f'python {card["script"]} "a red circle" out.png 0', "```", ""]


def _seconds(value: float | None) -> str:
    return "A time that is not stated" if value is None else f"{value:.0f} s"


def licence_of(source: str | None) -> str:
    """The licence of what a part was made from, as its own folder says it: in the head of its README, or in a LICENSE file."""
    folder = Path(source) if source else None
    if folder is None or not folder.is_dir():
        return NOT_STATED
    readme = folder / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace").split("---") if readme.is_file() else []
    if len(head) > 2 and not head[0].strip():
        try:
            said = yaml.safe_load(head[1])
        except yaml.YAMLError:
            said = None
        if isinstance(said, dict) and isinstance(said.get("license"), str):
            return str(said["license"])
    for file in sorted(folder.glob("LICEN[SC]E*")):
        lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[0].strip() if lines else NOT_STATED
    return NOT_STATED


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write the record and the README."""
    (folder / "card.json").write_text(strict_json(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(markdown(card), encoding="utf-8")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _score_table(scores: dict[str, dict[str, Any]]) -> list[str]:
    names = sorted({name for split in scores.values() for name in split["metrics"]})
    if not names:
        return ["None were recorded."]
    head = [f"{split} ({content['samples']} samples)" for split, content in scores.items()]
    rows = [[name, *(_number(content["metrics"].get(name)) for content in scores.values())] for name in names]
    return markdown_table(["score", *head], rows)


def _probe_table(probes: list[dict[str, Any]]) -> list[str]:
    rows = []
    for found in probes:
        rates = [f"{100 * found[name]:.1f}" for name in ("linear", "mlp", "chance")]
        rows.append([found["attribute"], str(found["layer"]), *rates, str(found["num_test"])])
    return [
        f"Probes of its features of a cell, trained on other images of `{probes[0]['shards']}` (per cent right):",
        "",
        *markdown_table(["attribute", "layer", "linear", "two layers", "chance", "n"], rows),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"
