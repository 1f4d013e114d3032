"""``python -m umm_zoo.generate RUN VERB …``: use a finished run on images and texts of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from umm_zoo.errors import UserError, user_errors
from umm_zoo.generation import VERBS
from umm_zoo.generation.base import Model, Request, Result, Verb
from umm_zoo.training.run_folder import writing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from umm_zoo.evaluate import FinishedRun
    from umm_zoo.method import Method

HELP = """examples:
  python -m umm_zoo.generate runs/shapes caption one.png two.png
  python -m umm_zoo.generate runs/shapes ask one.png "What colour is the circle?"
  python -m umm_zoo.generate runs/shapes ask one.png two.png "Do the two images show the same scene?"
  python -m umm_zoo.generate runs/ross reconstruct one.png two.png --out drawn
  python -m umm_zoo.generate runs/shapes ask --batch questions.jsonl --out answers
  python -m umm_zoo.generate runs/wemmu/toy/stage4 text-to-image "top left: a small red circle" --num 4 --guidance 4 --steps 20
  python -m umm_zoo.generate runs/wemmu/toy/stage4 edit one.png "Make the circle green." --seed 3
  python -m umm_zoo.generate runs/wemmu/toy/stage4 compose one.png two.png "Put the star of the second image into the first."

RUN is a run folder or a checkpoint. A line of a --batch file is {"images": ["one.png", ...], "question": "..."} (caption and
reconstruct need no question; for what is drawn, the question is the prompt, and a .txt file holds a prompt per line); its paths
start from the file's own folder. --out DIR also writes results.jsonl and grid.png, and every drawn image."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a mistake."""
    arguments = _parser().parse_args(argv)
    verb = VERBS[arguments.verb]
    with user_errors(arguments.traceback) as outcome:
        if arguments.batch_size < 1:
            raise UserError("--batch-size", f"found {arguments.batch_size}, expected positive whole numbers")
        requests = verb.read(Path(arguments.batch), arguments) if arguments.batch else verb.requests(arguments.words, arguments)
        for path in (path for request in requests for path in request.images):
            if not path.is_file():
                raise UserError(path, "found no such file, expected an image")
        results = generate(arguments.run, verb, requests, arguments)
        if arguments.out:
            with writing(arguments.out, "--out DIR with a folder that can be written"):
                write(results, Path(arguments.out))
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.generate",
        description="Use a finished run.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        own = verbs.add_parser(name, help=verb.help, description=verb.help)
        own.add_argument("words", nargs="*", metavar="WORD", help="images and text")
        own.add_argument("--batch", metavar="FILE", help="take the requests from the lines of a JSONL file")
        own.add_argument("--out", metavar="DIR", help="write results.jsonl and grid.png")
        own.add_argument("--batch-size", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
        own.add_argument("--device", default="cpu", help="default: %(default)s")
        own.add_argument("--traceback", action="store_true", help="show where an error line comes from")
        verb.add_arguments(own)
    return parser


def generate(source: str | Path, verb: Verb, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
    """Load the run, do what is asked batch by batch, print the texts.

    Raises:
        UserError: no such run, or its method cannot do it.
    """
    from umm_zoo.errors import MistakeError
    from umm_zoo.evaluate import load_run

    model = load_model(load_run(source), verb.needs, arguments.device, verb.deed)
    results: list[Result] = []
    for start in range(0, len(requests), arguments.batch_size):
        rows = requests[start : start + arguments.batch_size]
        try:
            done = verb.run(model, rows, arguments)
        except MistakeError as error:
            raise UserError(source, error.line([row.name for row in rows])) from error
        except ValueError as error:
            raise UserError(source, f"{rows[0].question}: {error}") from error
        for result in done:
            if result.answer is not None:
                names = " ".join(str(path) for path in result.request.images)
                question = f"{result.request.question}\n  " if verb.prints_question else ""
                print(f"{names}: {question}{result.answer}" if names else f"{question}{result.answer}", flush=True)
        results += done
    return results


def load_model(run: FinishedRun, needs: str, device: str, deed: str = "") -> Model:
    """The method of a run, ready for use.

    Args:
        run: as ``umm_zoo.evaluate.load_run`` reads it.
        needs: a function that the method must have.
        device: where it goes.
        deed: what a method without that function cannot do, for the message; ``needs`` if empty.

    Raises:
        UserError: the method has no function ``needs``, or the weights do not fit.
    """
    from umm_zoo.experiment.build import build

    method: Method = build(run.experiment.method, "method")
    if not hasattr(method, needs):
        raise UserError(run.path, f"found a {type(method).__name__}, which cannot {deed or needs}, expected a method that can")
    try:
        method.load_weights(run.checkpoint["state_dict"])
    except ValueError as error:
        raise UserError(run.path, str(error)) from error
    data = run.experiment.data
    size = getattr(getattr(method, "vlm", None), "image_size", None) or data.get("image_size")
    resize = build(data["resize"], "data.resize") if data.get("resize") else None
    try:
        method = method.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # no such device; a torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UserError(
            "--device", f"found '{device}' ({reason}), expected a device of this machine: cpu, cuda, cuda:1 ..."
        ) from error
    return Model(method, lambda path: load_image(path, size, resize), device)


def load_image(path: Path, size: int | None, resize: Callable[[Image.Image, int], Image.Image] | None = None) -> Tensor:
    """An image as ``[3, H, W]`` in [-1, 1].

    Args:
        path: any file that PIL opens; transparency is laid on white.
        size: edge in pixels; None keeps the image as it is.
        resize: what the run's data did to its images; None cuts out the centre square.

    Raises:
        UserError: not an image.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(path, f"found no readable image ({type(error).__name__}), expected PNG, JPEG, WebP ...") from error
    paper = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(paper, image).convert("RGB")
    if size is not None:
        square = (lambda p, s: ImageOps.fit(p, (s, s), Image.Resampling.BICUBIC)) if resize is None else resize
        image = square(image, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def write(results: list[Result], folder: Path) -> None:
    """``results.jsonl``, one line per request, ``grid.png``, and every drawn image as a file of its own."""
    from PIL import Image

    from umm_zoo.callbacks.cards import Card, draw_cards

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        for result in results:
            row = {"images": [str(path) for path in result.request.images], "question": result.request.question}
            file.write(json.dumps({**row, "answer": result.answer}, ensure_ascii=False) + "\n")
    cards = []
    for number, result in enumerate(results):
        for name, image in result.images.items():
            image.save(folder / f"{number:03d}-{name.replace(' ', '-')}.png")
        shown = {}
        for path in result.request.images:
            with Image.open(path) as opened:
                shown[path.name] = opened.convert("RGB")
        title = ", ".join(path.name for path in result.request.images)
        cards.append(Card(title, result.request.question, result.answer, "", None, {**shown, **result.images}))
    if cards:
        draw_cards(cards, 192, 4).save(folder / "grid.png")
    print(f"written to {folder}")


if __name__ == "__main__":
    sys.exit(main())
