"""Probe parts: what each carries of a scene and what it has lost; of all shipped ones as JSON and as the README's table.

    python tools/probe_parts.py --shards 'data/tiny/test/captions-*.tar'
    python tools/probe_parts.py llava vlm                     (these again; the other rows stay where the settings are the same)
    python tools/probe_parts.py runs/tiny/tower --attribute mark --layer -2              (printed alone, as for every other source:)
    python tools/probe_parts.py released/tower --attribute mark --layer -2 --card                       (into the card of an export)
    python tools/probe_parts.py experiments/tiny/tower.yaml 'umm_zoo.backbones.features.CLIPVisionFeatures:FOLDER' pixels

Other sources are run folders, checkpoints, experiment files (untrained weights: the floor), CLASS:FOLDER, and the pixels (the
ceiling). Encoders are read at the layer that LLaVA looks through (-2) and in their one vector; vision-language models at their
image tokens, before and behind the language model. Accuracy depends on how much a probe has seen, so only rows of one file may be
compared. How a probe is made: ``tools/probing.py``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools.probing import Layer, load_batches, load_part, part_features, probe
from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.batch import Batch, image_of_each_row, stacked
from umm_zoo.checkpoints.plain_files import strict_json
from umm_zoo.errors import REFUSALS, locating, user_errors
from umm_zoo.experiment.trust import trusting
from umm_zoo.release.card import markdown_table, write_card
from umm_zoo.training.finished_run import add_trust
from umm_zoo.training.report import circumstances

WEIGHTS = Path("experiments/tiny/weights")
PIXELS = "pixels"
ATTRIBUTES = ("colour", "shape", "size", "mark", "background")

#: An attribute counts as lost where the share of what can be read above chance is less than this share of the pixels'.
KEPT = 0.9


def places(part: Any) -> dict[str, Layer]:
    """Places where a part is read, by name."""
    if isinstance(part, VLMBackbone):
        return {"enters the language model": 0, "leaves it": -1}
    if isinstance(part, FeatureEncoder):
        return {"layer -2": -2, "one vector": "pooled"}
    return {PIXELS if part is None else "latents": -1}


def parse_layer(text: str) -> Layer:
    """``pooled`` or a number."""
    return "pooled" if text == "pooled" else int(text)


def probe_part(
    source: str, batches: list[Batch], cells: list[str], attributes: Sequence[str], layers: Sequence[Layer], steps: int
) -> list[dict[str, Any]]:
    """One row per place and attribute; no layers are the usual places."""
    part, rows = load_part(source), []
    for place, layer in {f"layer {layer}": layer for layer in layers}.items() or places(part).items():
        features = [part_features(part, stacked(image_of_each_row(batch)), layer, len(cells)) for batch in batches]
        for attribute in attributes:
            found = probe(part, batches, attribute, layer, cells, steps=steps, features=features)
            rows.append({"place": place, **vars(found)})
            print(f"{source}, {place}: {found}", flush=True)
    return rows


def add_to_card(folder: Path, rows: list[dict[str, Any]], shards: str) -> None:
    """Put probes into the card of an exported part."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    probes = [{**row, "layer": parse_layer(row["place"].removeprefix("layer ")), "shards": shards} for row in rows]
    card["probes"] = [{key: value for key, value in found.items() if key != "place"} for found in probes]
    write_card(folder, card)


def kept_rows(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Contents of an earlier report of the same settings; nothing where there is none."""
    if not file.is_file():
        return []
    report = json.loads(file.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = report["rows"] if report["settings"] == settings else []
    return rows


def is_probed(folder: Path) -> bool:
    """Whether a folder holds a part that has features; an image decoder has none."""
    card = folder / "card.json"
    if not card.is_file():
        return False
    kind = locate(json.loads(card.read_text(encoding="utf-8"))["load"]["_target_"].removesuffix(".from_pretrained"))
    return isinstance(kind, type) and not issubclass(kind, ImageDecoder)


def skill(row: dict[str, Any]) -> float:
    """Gain of the better probe over chance, 1 being always right."""
    return float((max(row["linear"], row["mlp"]) - row["chance"]) / max(1 - row["chance"], 1e-9))


def markdown(report: dict[str, Any]) -> str:
    """The table and how it was made."""
    rows = report["rows"]
    ceiling = {row["attribute"]: row for row in rows if row["part"] == PIXELS}
    head = [f"{name} ({100 * row['chance']:.0f})" for name, row in ceiling.items()]
    table = []
    for part, place in dict.fromkeys((row["part"], row["place"]) for row in rows):
        found = [row for row in rows if (row["part"], row["place"]) == (part, place)]
        cells = [f"{100 * row['linear']:.1f} / {100 * row['mlp']:.1f}" for row in found]
        lost = [row["attribute"] for row in found if skill(row) < KEPT * skill(ceiling[row["attribute"]])]
        table.append([f"`{part}`", place, *cells, ", ".join(lost) or "-"])
    objects, images = (next(row for row in rows if row["attribute"] == name) for name in ("colour", "background"))
    lines = [
        *markdown_table(["part", "read at", *head, "lost"], table),
        "",
        f"Per cent right of a linear / a two-layer probe on held-out scenes, n = {objects['num_test']} objects "
        f"({images['num_test']} images for the background), learnt from {objects['num_train']} others; in brackets chance, the "
        f"commonest value. Lost: less than {100 * KEPT:.0f} % of what the pixels give above chance. "
        f"`{report['command']}`, commit {report['commit']}.",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="folders of the weights, or other sources (default: all of the weights)"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=f"where they are (default {WEIGHTS})")
    parser.add_argument(
        "--shards", default="data/tiny/test/captions-*.tar", help="with 'scene' in their json (default: %(default)s)"
    )
    parser.add_argument("--attribute", nargs="+", default=ATTRIBUTES, help="of the objects or of the scene (default: %(default)s)")
    parser.add_argument(
        "--layer",
        nargs="+",
        type=parse_layer,
        default=[],
        help="of an encoder: counted from its end, or pooled, its one "
        "vector; of a vision-language model: 0 what enters its language model, -1 what leaves it (default: the usual places)",
    )
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side (default 32)")
    parser.add_argument("--limit", type=int, default=1000, help="at most about this many images (default 1000)")
    parser.add_argument("--steps", type=int, default=200, help="updates of each probe (default 200)")
    parser.add_argument("--out", type=Path, default=Path("experiments/tiny/results"), help="folder of probes.json and probes.md")
    parser.add_argument("--card", action="store_true", help="put what is found into the cards of exported parts (with --layer)")
    add_trust(parser)
    given = parser.parse_args(argv)
    names = given.parts or [PIXELS, *sorted(folder.name for folder in given.weights.iterdir() if is_probed(folder))]
    sources = {name: str(given.weights / name) if (given.weights / name).is_dir() else name for name in names}
    settings = {"shards": given.shards, "limit": given.limit, "steps": given.steps}
    with user_errors() as outcome, locating(refusals=REFUSALS), trusting(given.trust):
        batches, cells = load_batches(given.shards, given.image_size, given.limit)
        if given.layer or given.attribute != ATTRIBUTES or any(name != PIXELS and sources[name] == name for name in names):
            for source in sources.values():
                rows = probe_part(source, batches, cells, given.attribute, given.layer, given.steps)
                if given.card:
                    add_to_card(Path(source), rows, given.shards)
            return 0
        file = given.out / "probes.json"
        given.out.mkdir(parents=True, exist_ok=True)
        rows = kept_rows(file, settings)
        for name, source in (sources if any(row["part"] == PIXELS for row in rows) else {PIXELS: PIXELS} | sources).items():
            began = time.monotonic()
            found = probe_part(source, batches, cells, ATTRIBUTES, [], given.steps)
            seconds = round((time.monotonic() - began) / len(found), 2)
            rows = [row for row in rows if row["part"] != name] + [{"part": name, **row, "seconds": seconds} for row in found]
            rows.sort(key=lambda row: (row["part"] != PIXELS, row["part"]))  # stable: places and attributes keep their order
            options = shlex.join(word for key, value in settings.items() for word in (f"--{key}", str(value)))
            report = {"command": f"python tools/probe_parts.py {options}", "settings": settings, **circumstances(), "rows": rows}
            file.write_text(strict_json(report, indent=1) + "\n", encoding="utf-8")
            file.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
        print(file.with_suffix(".md"))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
