"""Write a trained part as a folder in its library's own format, with a card: what later experiments load.

    python tools/export_part.py runs/tiny/codec
    python tools/export_part.py runs/tiny/tower --out experiments/tiny/weights/tower --dtype float16

The part is the run's ``encoder``, ``tower``, ``codec`` or ``vlm``. Weights are stored in ``--dtype`` (default float16, half the
size; they are read back as float32). The card repeats the recipe, data, commit, time and scores that the run recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from umm_zoo.backbones.codecs import LatentCodec
from umm_zoo.backbones.features import LibraryEncoder
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.loading import torch_dtype
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.method import Method

PARTS = ("encoder", "tower", "codec", "vlm")
Part = LatentCodec | LibraryEncoder | LlavaBackbone | Qwen25VL


def find_part(method: Any, source: str | Path) -> Part:
    """The part of a run that others use.

    Raises:
        ValueError: it has none.
    """
    for name in PARTS:
        if isinstance(part := getattr(method, name, None), Part):
            return part
    raise ValueError(f"{source}: {type(method).__name__} has parts {sorted(method.parts())}, accepted is one of {', '.join(PARTS)}")


def shrink(folder: Path, dtype: str) -> None:
    """Store the floating weights of a folder in another dtype; its config keeps saying what the network computes in."""
    for path in folder.glob("*.safetensors"):
        tensors = {
            key: (value.to(torch_dtype(dtype)) if value.is_floating_point() else value).contiguous()
            for key, value in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})


def card(name: str, part: Part, run: Path, folder: Path, dtype: str) -> str:
    """The README of an exported part, from what its run recorded."""
    experiment = yaml.safe_load((run / "experiment.yaml").read_text(encoding="utf-8"))
    record: dict[str, Any] = {}
    for file, title in (("metrics.json", "Run"), ("data.json", "Samples read")):
        if (run / file).is_file():
            record[title] = json.loads((run / file).read_text(encoding="utf-8"))
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    parameters, steps = sum(p.numel() for p in part.parameters()), experiment["trainer"].get("max_steps")
    data = {"train": experiment["data"].get("train"), "val": experiment["data"].get("val")}
    lines = [
        f"# {name}",
        "",
        f"{type(part).__name__}, {parameters:,} parameters, stored as {dtype} ({weights / 2**20:.2f} MiB).",
        f"Trained by this repository: `python -m umm_zoo.fit experiments/{experiment['name']}.yaml`, {steps} steps, "
        f"{experiment['data'].get('batch_size')} samples each, seed {experiment['seed']}.",
        "",
        f"Load it with `{type(part).__module__}.{type(part).__name__}.from_pretrained` and this folder as `source`.",
        "",
        "## Data",
        "",
        "```yaml",
        yaml.safe_dump(data, sort_keys=False).rstrip(),
        "```",
    ]
    for title, content in record.items():
        lines += ["", f"## {title}", "", "```json", json.dumps(content, indent=1), "```"]
    return "\n".join([*lines, ""])


def export(run: Path, folder: Path, dtype: str) -> None:
    """Write the part of a finished run into ``folder``.

    Raises:
        FileNotFoundError: no checkpoint in the run.
        ValueError: the run has no part to export.
    """
    part = find_part(Method.load(run), run)
    folder.mkdir(parents=True, exist_ok=True)
    part.save(folder)
    shrink(folder, dtype)
    type(part).from_pretrained(str(folder))  # what was written must load completely
    (folder / "README.md").write_text(card(folder.name, part, run, folder, dtype), encoding="utf-8")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="folder to write (default experiments/tiny/weights/NAME)")
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"], help="of the stored weights")
    arguments = parser.parse_args()
    folder = arguments.out or Path("experiments/tiny/weights") / arguments.run.resolve().name
    try:
        export(arguments.run, folder, arguments.dtype)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"export_part: {error}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
