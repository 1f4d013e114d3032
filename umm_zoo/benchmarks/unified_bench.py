"""Unified-Bench's first protocol on a finished run: caption, reconstruct from the caption, compare under several encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_zoo.checkpoints.plain_files import strict_json, writing
from umm_zoo.errors import UserError, note, printable, say
from umm_zoo.experiment.types import TARGET
from umm_zoo.generation.images import open_image
from umm_zoo.training.finished_run import FinishedRun

if TYPE_CHECKING:
    from torch import Tensor

    from umm_zoo.metrics.unified_score import UnifiedScore

#: Of every image's initial noise, as in the released demo.
SEED = 42
#: Images at a time. The likeliest caption and a seed per image make the result independent of it.
BATCH_SIZE = 16
TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jpe", ".jfif", ".jp2", ".ppm")
_LISTED = 20
USAGE = "unified-bench IMAGES [ENCODERS.yaml]: a folder of images, and a map from column names to encoder nodes"


def unified_bench(run: FinishedRun, words: Sequence[str]) -> dict[str, float]:
    """Score a run on a folder of images: one score per encoder and their mean, ``unified``.

    Captions are the likeliest ones under the method's own prompt, images are generated from seed 42. A file is described in its own
    shape, where the model takes any, and each pair is scored in its own shapes and in 8 bits: nothing is cut off before the
    encoders' own processors. Beside the scores it writes
    ``unified-bench-<n>/captions.jsonl`` (file, caption, the cosines of each pair), every image made, and ``grid.png``. An image
    that cannot be read, or an encoder that cannot be built, ends the command: a mean over what is left would be another benchmark.
    Every file is looked at before the first is described, and files of other suffixes are named.
    The words are the folder of images, and the file of encoders.
    """
    import torch

    from umm_zoo.callbacks.cards import Card, draw_cards
    from umm_zoo.callbacks.samples import from_pil, to_pil
    from umm_zoo.generation.model import Model
    from umm_zoo.outputs import ReconstructsFromCaptions

    files, metric = _arguments(run, words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method = run.load_method()
    model = Model.of(method, method.run_data, device)
    if not isinstance(model.method, ReconstructsFromCaptions):
        raise model.cannot("reconstruct images from captions", ReconstructsFromCaptions)
    metric.to(device)
    folder = _new_folder(run.path)
    cards: list[Card] = []
    done = 0
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for some, seen in _batches(files, model.load_shaped):
            captions, made = model.method.reconstruct_from_captions(torch.stack(seen).to(device), [SEED] * len(some))
            for file, caption, reconstruction in zip(some, captions, made, strict=True):
                original, generated = open_image(file), to_pil(reconstruction)
                pair = (from_pil(image)[None].to(device) for image in (generated, original))
                cosines = metric.cosines(*pair)  # [number of encoders, 1]
                metric.add_rows(cosines.double().T)
                scores = {name: round(float(value), 5) for name, value in zip(metric.encoders, cosines[:, 0], strict=True)}
                line = {"image": printable(file.name), "caption": caption, **scores}
                lines.write(strict_json(line, ensure_ascii=False) + "\n")
                generated.save(folder / f"{file.stem}.png")
                if len(cards) < 32:
                    cards.append(Card(file.name, "", caption, "", None, {"original": original, "reconstruction": generated}))
            done += len(some)
            say(f"{done} of {len(files)} images")
    draw_cards(cards, 192, 4).save(folder / "grid.png")
    say(f"captions and images in {folder}")
    return {name: float(value) for name, value in metric.values_of(metric.records()).items()}


def _batches(files: Sequence[Path], load: Callable[[Path], Tensor]) -> Iterator[tuple[list[Path], list[Tensor]]]:
    """The files in their order with what the model sees of them, as many at a time as have one shape."""
    some: list[Path] = []
    seen: list[Tensor] = []
    for file in files:
        image = load(file)
        if some and (len(some) == BATCH_SIZE or image.shape != seen[0].shape):
            yield some, seen
            some, seen = [], []
        some.append(file)
        seen.append(image)
    yield some, seen


def _arguments(run: FinishedRun, words: Sequence[str]) -> tuple[list[Path], UnifiedScore]:
    if not 1 <= len(words) <= 2:
        raise UserError(run.path, f"{len(words)} words behind the suite", USAGE)
    source = Path(words[0])
    found = sorted(source.iterdir()) if source.is_dir() else []
    files = [path for path in found if path.suffix.lower() in TYPES]
    if not files:
        raise UserError(source, "no images", f"a folder with {', '.join(TYPES)}")
    if twice := [path.stem for path, other in pairwise(sorted(files, key=lambda path: path.stem)) if path.stem == other.stem]:
        found_twice = f"two images of one name ('{twice[0]}')"
        raise UserError(source, found_twice, "different names: what is made of them is kept under their names")
    metric = _metric(run, words[1] if len(words) == 2 else None)
    _check_images(source, files)
    if others := [path.name for path in found if path not in files]:
        note(f"{source}: {len(others)} of {len(found)} are no images by their suffix and are left out: {_few(others)}")
    return files, metric


def _check_images(source: Path, files: Sequence[Path]) -> None:
    """Decode every image, so that hours of describing do not end at the last one; one error for all that cannot be read."""
    unreadable = []
    for file in files:
        try:
            open_image(file)
        except UserError as error:
            unreadable.append(f"{file.name} ({error.problems[0].found})")
    if unreadable:
        problem = f"{len(unreadable)} of {len(files)} images that cannot be read: {_few(unreadable)}"
        raise UserError(source, problem, "readable ones alone", "take the others away, or repair them")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _metric(run: FinishedRun, file: str | None) -> UnifiedScore:
    """Of the encoders of a file, or of the run's own Unified-Score."""
    import yaml

    from umm_zoo.experiment.build import build
    from umm_zoo.experiment.check import check_node
    from umm_zoo.experiment.trust import Trust
    from umm_zoo.metrics.unified_score import UnifiedScore

    if file is None:
        scores = [node for node in run.experiment.metrics.values() if str(node.get(TARGET, "")).endswith(".UnifiedScore")]
        if not scores:
            raise UserError(run.path, "no UnifiedScore among the metrics of the run", USAGE)
        nodes: Any = scores[0]["encoders"]
    else:
        try:
            nodes = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # no file, no UTF-8, too deep, no YAML
            raise UserError(file, f"no readable map ({type(error).__name__})", USAGE) from error
    node = {TARGET: "umm_zoo.metrics.unified_score.UnifiedScore", "encoders": nodes}
    check_node(node, UnifiedScore, "", Trust() if file else run.experiment.trust, file or run.path)
    score: UnifiedScore = build(node, str(file or run.path))
    return score


def _new_folder(path: Path) -> Path:
    taken = [old.name.removeprefix("unified-bench-") for old in path.glob("unified-bench-*")]
    folder = path / f"unified-bench-{1 + max((int(text) for text in taken if text.isdecimal()), default=0)}"
    with writing(path, "a run folder that can be written"):
        folder.mkdir()
    return folder
