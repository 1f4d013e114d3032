"""``python -m umm_zoo.generate RUN VERB …``: use a finished run on pictures and texts of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_zoo.experiment import Problem, UserError
from umm_zoo.fit import user_errors
from umm_zoo.run_folder import writing

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

RUN is a run folder or a checkpoint. A line of a --batch file is {"images": ["one.png", ...], "question": "..."} (caption and
reconstruct need no question); its paths start from the file's own folder. --out DIR also writes results.jsonl and grid.png."""


@dataclass
class Request:
    """What is asked, about which pictures."""

    images: list[Path]
    question: str

    @property
    def name(self) -> str:
        """The pictures and the question, for messages."""
        return " ".join([*map(str, self.images), *([f"'{self.question}'"] if self.question else [])])


@dataclass
class Result:
    """What came of it: a text, or drawn pictures by name."""

    request: Request
    answer: str | None = None
    pictures: dict[str, Image.Image] = field(default_factory=dict)


@dataclass
class Model:
    """A method in evaluation mode, and how pictures become its inputs."""

    method: Method
    load_image: Callable[[Path], Tensor]
    device: str


class Verb(ABC):
    """One thing that a run can be asked to do. ``needs`` names the method's function that does it."""

    help: str
    needs: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - a verb may have none
        """Options of this verb alone."""

    @abstractmethod
    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """The words behind the verb as requests.

        Raises:
            UserError: they make no sense.
        """

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The lines of a batch file as requests.

        Raises:
            UserError: no such file, or a line is not a request.
        """
        return read_requests(file)

    @abstractmethod
    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Do it for one batch."""


class Ask(Verb):
    """Pictures, then a question about them."""

    help = "answer a question: ask [IMAGE ...] QUESTION"
    needs = "answer"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How the answer is drawn from the model."""
        parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
        parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest word (default)")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request."""
        if not words or Path(words[-1]).is_file():
            raise UserError("ask", [Problem("", "no question", "ask [IMAGE ...] QUESTION, the question last and in quotes")])
        return [Request([Path(word) for word in words[:-1]], words[-1])]

    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Answer a batch of questions."""
        import torch

        from umm_zoo.batch import IMAGE_MARKER, Batch, Turn

        conversations, images = [], []
        for request in requests:
            images += [model.load_image(path) for path in request.images]
            marked = IMAGE_MARKER in request.question
            text = request.question if marked else f"{IMAGE_MARKER}\n" * len(request.images) + request.question
            conversations.append([Turn(role="user", text=text)])
        batch = Batch(
            keys=[str(row) for row in range(len(requests))],
            conversations=conversations,
            images=torch.stack(images) if images else None,
            image_counts=[len(request.images) for request in requests],
        ).to(model.device)
        answer: Any = getattr(model.method, self.needs)
        answers = answer(batch, arguments.max_new_tokens, arguments.temperature)
        return [Result(request, text) for request, text in zip(requests, answers, strict=True)]


class Caption(Ask):
    """Every picture described by itself."""

    help = "describe pictures: caption IMAGE ..."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """What the model is told."""
        super().add_arguments(parser)
        parser.add_argument("--prompt", default="Describe the image.", metavar="TEXT", help="default: %(default)s")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request per picture."""
        if not words:
            raise UserError("caption", [Problem("", "no picture", "caption IMAGE ...")])
        return [Request([Path(word)], arguments.prompt) for word in words]

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The pictures of each line under the prompt, or under the line's own question."""
        return read_requests(file, arguments.prompt)


class Reconstruct(Verb):
    """Every picture drawn again from what the language model makes of it."""

    help = "draw pictures again from the language model's states: reconstruct IMAGE ..."
    needs = "reconstruct"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The noise it starts from."""
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
        parser.set_defaults(out="reconstructed")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request per picture."""
        if not words:
            raise UserError("reconstruct", [Problem("", "no picture", "reconstruct IMAGE ...")])
        return [Request([Path(word)], "") for word in words]

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The first picture of each line."""
        return read_requests(file, "")

    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Draw a batch, and beside each what codec or patches alone would give."""
        import torch

        from umm_zoo.callbacks.samples import to_pil

        method: Any = model.method
        images = torch.stack([model.load_image(request.images[0]) for request in requests]).to(model.device)
        generator = torch.Generator(model.device).manual_seed(arguments.seed)
        drawn = {"round trip": method.round_trip(images), "reconstruction": method.reconstruct(images, generator)}
        return [
            Result(request, None, {name: to_pil(pictures[row]) for name, pictures in drawn.items()})
            for row, request in enumerate(requests)
        ]


VERBS: dict[str, Verb] = {"caption": Caption(), "ask": Ask(), "reconstruct": Reconstruct()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a mistake."""
    arguments = _parser().parse_args(argv)
    verb = VERBS[arguments.verb]
    with user_errors(arguments.traceback) as outcome:
        requests = verb.read(Path(arguments.batch), arguments) if arguments.batch else verb.requests(arguments.words, arguments)
        for path in (path for request in requests for path in request.images):
            if not path.is_file():
                raise UserError(path, "found no such file, accepted is a picture")
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
        own.add_argument("words", nargs="*", metavar="WORD", help="pictures and text")
        own.add_argument("--batch", metavar="FILE", help="take the requests from the lines of a JSONL file")
        own.add_argument("--out", metavar="DIR", help="write results.jsonl and grid.png")
        own.add_argument("--batch-size", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
        own.add_argument("--device", default="cpu", help="default: %(default)s")
        own.add_argument("--traceback", action="store_true", help="show where an error line comes from")
        verb.add_arguments(own)
    return parser


def read_requests(file: Path, question: str | None = None) -> list[Request]:
    """Requests from a JSONL file.

    Args:
        file: one request per line.
        question: of the lines that have none; every line must then have a picture. None where a question is needed.

    Raises:
        UserError: no such file, or a line is not a request.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(file, f"found no readable file ({error.strerror}), accepted is a JSONL file") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            images = row.get("images", [])
            asked = row["question"] if question is None else row.get("question", question)
            if not isinstance(asked, str) or not isinstance(images, list) or not (images or question is None):
                raise TypeError
            requests.append(Request([file.parent / image for image in images], asked))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            accepted = '{"images": ["one.png", ...]' + (', "question": "..."}' if question is None else "}")
            raise UserError(file, [Problem(f"line {number}", f"'{line[:60]}'", accepted)]) from None
    return requests


def generate(source: str | Path, verb: Verb, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
    """Load the run, do what is asked batch by batch, print the texts.

    Raises:
        UserError: no such run, or its method cannot do it.
    """
    from umm_zoo.evaluate import load_run
    from umm_zoo.mistakes import MistakeError

    model = load_model(load_run(source), verb.needs, arguments.device)
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
                question = f"{result.request.question}\n  " if verb.needs == "answer" and not isinstance(verb, Caption) else ""
                print(f"{names}: {question}{result.answer}" if names else f"{question}{result.answer}", flush=True)
        results += done
    return results


def load_model(run: FinishedRun, needs: str, device: str) -> Model:
    """The method of a run, ready for use.

    Raises:
        UserError: the method has no function ``needs``, or the weights do not fit.
    """
    from umm_zoo.build import build

    method: Method = build(run.experiment.method, "method")
    if not hasattr(method, needs):
        raise UserError(run.path, f"found a {type(method).__name__}, which cannot {needs}, accepted a method that can")
    try:
        method.carry(run.checkpoint["state_dict"])
    except ValueError as error:
        raise UserError(run.path, str(error)) from error
    data = run.experiment.data
    size = getattr(getattr(method, "vlm", None), "image_size", None) or data.get("image_size")
    resize = build(data["resize"], "data.resize") if data.get("resize") else None
    return Model(method.eval().to(device), lambda path: load_image(path, size, resize), device)


def load_image(path: Path, size: int | None, resize: Callable[[Image.Image, int], Image.Image] | None = None) -> Tensor:
    """A picture as ``[3, H, W]`` in [-1, 1].

    Args:
        path: any file that PIL opens; transparency is laid on white.
        size: edge in pixels; None keeps the picture as it is.
        resize: what the run's data did to its pictures; None cuts out the centre square.

    Raises:
        UserError: not a picture.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(path, f"found no readable picture ({type(error).__name__}), accepted are PNG, JPEG, WebP ...") from error
    paper = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(paper, picture).convert("RGB")
    if size is not None:
        square = (lambda p, s: ImageOps.fit(p, (s, s), Image.Resampling.BICUBIC)) if resize is None else resize
        picture = square(picture, size)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def write(results: list[Result], folder: Path) -> None:
    """``results.jsonl``, one line per request, ``grid.png``, and every drawn picture as a file of its own."""
    from PIL import Image

    from umm_zoo.callbacks.cards import Card, draw_cards

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        for result in results:
            row = {"images": [str(path) for path in result.request.images], "question": result.request.question}
            file.write(json.dumps({**row, "answer": result.answer}, ensure_ascii=False) + "\n")
    cards = []
    for number, result in enumerate(results):
        for name, picture in result.pictures.items():
            picture.save(folder / f"{number:03d}-{name.replace(' ', '-')}.png")
        pictures = {}
        for path in result.request.images:
            with Image.open(path) as opened:
                pictures[path.name] = opened.convert("RGB")
        title = ", ".join(path.name for path in result.request.images)
        cards.append(Card(title, result.request.question, result.answer, "", None, {**pictures, **result.pictures}))
    if cards:
        draw_cards(cards, 192, 4).save(folder / "grid.png")
    print(f"written to {folder}")


if __name__ == "__main__":
    sys.exit(main())
