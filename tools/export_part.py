"""Write a trained part as a folder in its library's own format, with a card: what later experiments load.

    python tools/export_part.py runs/tiny/codec --test --probe mark colour
    python tools/export_part.py runs/tiny/tower --out experiments/tiny/weights/tower --dtype float16

The part is the run's ``encoder``, ``tower``, ``decoder``, ``codec`` or ``vlm``. Weights are stored in ``--dtype`` (default
float16, half the size; they are read back as float32). The card (``card.json``, and a README made from it) states recipe, data,
commit, time, machine and the scores of the run's last validation; with ``--test`` also those on the test split, by the weights as
they are stored; with ``--probe`` what can be read from the part's features on that split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools.part_card import markdown, world_of
from tools.probing import Layer, find_part, load_batches, probe
from umm_zoo.backbones.adapters import assert_no_adapter
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.loading import torch_dtype
from umm_zoo.checkpoints.plain_files import strict_json
from umm_zoo.errors import REFUSALS, locating, user_errors
from umm_zoo.experiment.build import build
from umm_zoo.experiment.file import load_experiment
from umm_zoo.experiment.trust import trusting
from umm_zoo.method import Method
from umm_zoo.training.finished_run import add_trust, load_run
from umm_zoo.training.validation import validate

PARTS = ("encoder", "tower", "decoder", "codec", "vlm")

#: What a run may have said of its part that its weights do not say.
KEPT_ARGUMENTS = ("system_prompt", "template", "max_length", "min_pixels", "max_pixels", "image_size")

#: Where a part is read: encoders where LLaVA looks, vision-language models where their language model ends.
DEFAULT_LAYER: dict[str, Layer] = {"encoder": -2, "tower": -2, "codec": -1, "vlm": -1}


def shrink(folder: Path, dtype: str) -> None:
    """Store the floating weights of a folder in another dtype; its config keeps saying what the network computes in."""
    for path in folder.glob("*.safetensors"):
        tensors = {
            key: (value.to(torch_dtype(dtype)) if value.is_floating_point() else value).contiguous()
            for key, value in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})


def load_node(part: Any, stated: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Lines of an experiment file that load the part again as it was."""
    kept = {name: stated[name] for name in KEPT_ARGUMENTS if name in stated}
    kind = type(part)
    return {"_target_": f"{kind.__module__}.{kind.__name__}.from_pretrained", "source": folder.as_posix(), **kept}


def earlier(experiment: dict[str, Any], runs: Path) -> list[dict[str, Any]]:
    """Costs of the stages before this one, the first one first, as far as they are files with runs beside this one."""
    after = experiment.get("after")
    if not after or Path(after).suffix not in (".yaml", ".yml") or not Path(after).is_file():
        return []
    stage = load_experiment(after)
    report = runs / stage.name / "metrics.json"
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    return [*earlier(stage.resolved(), runs), *([{key: found[key] for key in ("experiment", "steps", "seconds")}] if found else [])]


def sources_of(experiment: dict[str, Any], run: Path) -> list[dict[str, Any]]:
    """The shards of a run, and how many samples of them it has read."""
    file = run / "data.json"
    counts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = []
    for split in ("train", "val"):
        for name, source in (experiment["data"].get(split) or {}).items():
            if source is None:  # of a file that this one was made from, left out here
                continue
            numbers = counts.get(split, {}).get(name, {})
            read = {key: numbers.get(key) for key in ("samples", "read")}
            found.append({"split": split, "name": name, "shards": source["shards"], **read})
    return found


def test_shards(experiment: dict[str, Any]) -> dict[str, str]:
    """The test split's shards of each validation source.

    Raises:
        ValueError: a source has no folder ``val`` to be replaced.
    """
    found = {}
    for name, source in (experiment["data"].get("val") or {}).items():
        shards = str(source["shards"])
        if "/val/" not in shards:
            raise ValueError(f"data.val.{name}.shards: found '{shards}', expected for --test is a path with /val/ in it")
        found[name] = shards.replace("/val/", "/test/")
    return found


def test_scores(run: Path, experiment: dict[str, Any], part: Any, name: str) -> dict[str, Any]:
    """Scores on the test split of the part as it is stored, the rest of the method being the run's.

    Raises:
        ValueError, FileNotFoundError: there is no test split.
    """
    from data_pipelines.shards.data import ShardSource

    shards = test_shards(experiment)
    samples = sum(len(ShardSource(pattern).open(source)) for source, pattern in shards.items())
    loaded = load_run(run, [f"data.val.{source}.shards={pattern}" for source, pattern in shards.items()])
    stored = {f"{name}.{key}": value for key, value in part.state_dict().items()}
    loaded.state |= stored
    return {"samples": samples, "metrics": named(validate(loaded))}


def named(metrics: dict[str, float]) -> dict[str, float]:
    """The validation scores among a run's metrics, without their prefix."""
    return {name.removeprefix("val/"): value for name, value in sorted(metrics.items()) if name.startswith("val/")}


def probes_of(part: Any, layer: Layer, shards: str, image_size: int, attributes: Sequence[str]) -> list[dict[str, Any]]:
    """What can be read from a part's features, by attribute."""
    batches, cells = load_batches(shards, image_size, 4000)
    found = [probe(part, batches, attribute, layer, cells) for attribute in attributes]
    return [{**vars(result), "layer": layer, "shards": shards} for result in found]


def export(run: Path, folder: Path, dtype: str, test: bool = False, attributes: Sequence[str] = ()) -> dict[str, Any]:
    """Write the part of a finished run into ``folder``; returns its card.

    Args:
        run: the run folder.
        folder: made if need be.
        dtype: of the stored weights.
        test: score on the test split.
        attributes: to be probed on the test split of the first validation source.

    Raises:
        FileNotFoundError: no checkpoint in the run, or no test split.
        ValueError: the run has not finished or has no part to export, or one that cannot be probed.
    """
    method = Method.load(run)
    if not (run / "metrics.json").is_file():
        raise ValueError(f"{run}: found no metrics.json, expected a run that has finished (go on with ckpt=last)")
    name, part = find_part(method, run, PARTS)
    if attributes and isinstance(part, ImageDecoder):
        raise ValueError(f"{run}: its part is a decoder, expected for --probe are parts that look at images")
    report = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    experiment = yaml.safe_load((run / "experiment.yaml").read_text(encoding="utf-8"))
    assert_no_adapter(part, f"{run}: {name}")  # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    part.save(folder)
    shrink(folder, dtype)
    node = load_node(part, experiment["method"].get(name) or {}, folder)
    stored: Any = build(node).eval()  # what was written must load completely
    sources = sources_of(experiment, run)
    stages = earlier(experiment, run.resolve().parents[len(Path(report["name"]).parts) - 1])
    samples = sum(source["samples"] or 0 for source in sources if source["split"] == "val")
    scores = {"val": {"samples": samples, "metrics": named(report["metrics"])}}
    if test:
        scores["test"] = test_scores(run, experiment, stored, name)
    probes = []
    if attributes:
        shards = next(iter(test_shards(experiment).values()))
        probes = probes_of(stored, DEFAULT_LAYER[name], shards, experiment["data"]["image_size"], attributes)
    worlds = {str(Path(source["shards"]).parent.parent): world_of(source["shards"]) for source in sources}
    command = f"python -m umm_zoo.fit {report['experiment']}"
    own = [f"experiments/tiny/{file}.yaml" for file in (folder.name, f"{folder.name}-decoder")]  # codec-decoder.yaml ends as codec
    card = {
        "part": folder.name,
        "class": node["_target_"].removesuffix(".from_pretrained"),
        "load": node,
        "parameters": sum(p.numel() for p in part.parameters()),
        "stored_as": dtype,
        "weights_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "recipe": {
            "experiment": report["experiment"],
            "command": command,
            "again": f"bash tools/train_tiny.sh {folder.name}" if report["experiment"] in own else f"{command} --again",
            "steps": report["steps"],
            "batch_size": experiment["data"].get("batch_size"),
            "seed": report["seed"],
            "after": stages,
        },
        "seconds": round(report["seconds"] + sum(stage["seconds"] for stage in stages), 1),
        **{key: report[key] for key in ("commit", "versions", "machine")},
        "scores": scores,
        "probes": probes,
        "worlds": [world for world in worlds.values() if world],
        "sources": sources,
    }
    (folder / "card.json").write_text(strict_json(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(markdown(card), encoding="utf-8")
    return card


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="folder to write (default experiments/tiny/weights/NAME)")
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"], help="of the stored weights")
    parser.add_argument("--test", action="store_true", help="score on the test split: the validation shards with /test/ for /val/")
    parser.add_argument("--probe", nargs="+", default=[], metavar="ATTRIBUTE", help="colour, shape, size, mark, background …")
    add_trust(parser)
    given = parser.parse_args(argv)
    folder = given.out or Path("experiments/tiny/weights") / given.run.resolve().name
    with user_errors() as outcome, locating(refusals=REFUSALS), trusting(given.trust):
        export(given.run, folder, given.dtype, given.test, given.probe)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 2**20:.2f} MiB")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
