"""Unified-Bench's first protocol on a finished run: caption, draw again from the caption, compare under several encoders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_zoo.errors import Problem, UserError
from umm_zoo.experiment.types import TARGET

if TYPE_CHECKING:
    from umm_zoo.backbones.features import FeatureEncoder
    from umm_zoo.evaluate import FinishedRun

#: Of every image's initial noise, as in the released demo.
SEED = 42
#: Images at a time. The likeliest caption and a seed per image make the result independent of it.
BATCH_SIZE = 16
TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
USAGE = "unified-bench IMAGES [ENCODERS.yaml]: a folder of images, and a map from column names to encoder nodes"


def unified_bench(run: FinishedRun) -> dict[str, float]:
    """Score a run on a folder of images: one score per encoder and their mean, ``unified``.

    Captions are the likeliest ones under the method's own prompt, images are drawn from seed 42. Beside the scores it writes
    ``unified-bench-<n>/captions.jsonl`` (file, caption, the cosines of each pair), every image drawn, and ``grid.png``. An image
    that cannot be read, or an encoder that cannot be built, ends the command: a mean over what is left would be another benchmark.

    Raises:
        UserError: no images, no encoders, or a method that cannot caption and draw.
    """
    import torch

    from umm_zoo.batch import Batch
    from umm_zoo.callbacks.cards import Card, draw_cards
    from umm_zoo.callbacks.samples import to_pil
    from umm_zoo.generate import load_model
    from umm_zoo.metrics.unified_score import UnifiedScore

    files, encoders = _arguments(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(run, "redraw", device)
    method: Any = model.method
    metric = UnifiedScore(encoders).to(device)
    folder = _new_folder(run.path)
    cards: list[Card] = []
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for start in range(0, len(files), BATCH_SIZE):
            some = files[start : start + BATCH_SIZE]
            originals = torch.stack([model.load_image(file) for file in some]).to(device)
            captions, drawn = method.redraw(originals, [SEED] * len(some))
            batch = Batch([file.name for file in some], [[] for _ in some])
            metric.update({"generated": drawn, "originals": originals}, batch)
            cosines = metric.cosines(drawn, originals).T.tolist()
            for row, file in enumerate(some):
                scores = {name: round(value, 5) for name, value in zip(encoders, cosines[row], strict=True)}
                lines.write(json.dumps({"image": file.name, "caption": captions[row], **scores}, ensure_ascii=False) + "\n")
                images = {"original": to_pil(originals[row]), "redrawn": to_pil(drawn[row])}
                images["redrawn"].save(folder / f"{file.stem}.png")
                cards.append(Card(file.name, "", captions[row], "", None, images))
            print(f"{min(start + BATCH_SIZE, len(files))} of {len(files)} images", flush=True)
    draw_cards(cards[:32], 192, 4).save(folder / "grid.png")
    print(f"captions and images in {folder}")
    return {name: float(value) for name, value in metric.compute().items()}


def _arguments(run: FinishedRun) -> tuple[list[Path], dict[str, FeatureEncoder]]:
    words = run.arguments
    if not 1 <= len(words) <= 2:
        raise UserError(run.path, [Problem("", f"{len(words)} words behind the suite", USAGE)])
    source = Path(words[0])
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in TYPES) if source.is_dir() else []
    if not files:
        raise UserError(source, f"found no images, expected a folder with {', '.join(TYPES)}")
    if len({path.stem for path in files}) < len(files):
        raise UserError(source, "found two images of one name, expected different names: what is drawn is kept under them")
    return files, _encoders(run, words[1] if len(words) == 2 else None)


def _encoders(run: FinishedRun, file: str | None) -> dict[str, FeatureEncoder]:
    """Those of a file, or of the run's own Unified-Score."""
    import yaml

    from umm_zoo.backbones.features import FeatureEncoder
    from umm_zoo.experiment.build import build

    nodes: Any = None
    if file is None:
        scores = [node for node in run.experiment.metrics.values() if str(node.get(TARGET, "")).endswith(".UnifiedScore")]
        if not scores:
            raise UserError(run.path, f"found no UnifiedScore among the metrics of the run, expected {USAGE}")
        nodes = scores[0]["encoders"]
    else:
        try:
            nodes = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(file, f"found no readable map ({type(error).__name__}), expected {USAGE}") from error
    if not isinstance(nodes, Mapping) or not nodes or not all(isinstance(n, Mapping) and TARGET in n for n in nodes.values()):
        raise UserError(file or run.path, "encoders: found no map of nodes, expected NAME: {_target_: ..., ...}")
    built = {str(name): build(node, f"encoders.{name}") for name, node in nodes.items()}
    for name, encoder in built.items():
        if not isinstance(encoder, FeatureEncoder):
            raise UserError(file or run.path, f"encoders.{name}: found a {type(encoder).__name__}, expected a FeatureEncoder")
    return built


def _new_folder(path: Path) -> Path:
    number = 1 + max((int(old.name.split("-")[-1]) for old in path.glob("unified-bench-[0-9]*")), default=0)
    folder = path / f"unified-bench-{number}"
    folder.mkdir()
    return folder
