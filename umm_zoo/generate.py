"""``python -m umm_zoo.generate RUN COMMAND …``: a finished run on images and texts of one's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from umm_zoo.errors import UserError, user_errors
from umm_zoo.generation import COMMANDS
from umm_zoo.generation.base import Command
from umm_zoo.generation.requests import Request, Result
from umm_zoo.training.finished_run import load_run
from umm_zoo.training.run_folder import writing

HELP = """examples:
  python -m umm_zoo.generate runs/shapes caption one.png two.png
  python -m umm_zoo.generate runs/shapes ask one.png "What colour is the circle?"
  python -m umm_zoo.generate runs/shapes ask one.png two.png "Do the two images show the same scene?"
  python -m umm_zoo.generate runs/ross reconstruct one.png two.png --out reconstructed
  python -m umm_zoo.generate runs/shapes ask --batch questions.jsonl --out answers
  python -m umm_zoo.generate runs/wemmu/toy/stage4 text-to-image "top left: a small red circle" --num 4 --guidance 4 --steps 20
  python -m umm_zoo.generate runs/wemmu/toy/stage4 edit one.png "Make the circle green." --seed 3
  python -m umm_zoo.generate runs/wemmu/toy/stage4 compose one.png two.png "Put the star of the second image into the first."

RUN is a run folder or a checkpoint. A line of a --batch file is {"images": ["one.png", ...], "question": "..."} (caption and
reconstruct need no question; where images are generated, the question is the prompt, and a .txt file holds a prompt per line); its
paths start from the file's own folder. --out DIR also writes results.jsonl and grid.png, and every image that was made."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    arguments = _parser().parse_args(argv)
    command = COMMANDS[arguments.command]
    with user_errors(arguments.traceback) as outcome:
        if arguments.batch_size < 1:
            raise UserError("--batch-size", f"{arguments.batch_size}", "a positive whole number")
        requests = (
            command.read(Path(arguments.batch), arguments) if arguments.batch else command.requests(arguments.words, arguments)
        )
        requests = [replace(request, seed=arguments.seed + number) for request in requests for number in range(arguments.num)]
        for path in (path for request in requests for path in request.images):
            if not path.is_file():
                raise UserError(path, "no such file", "an image")
        results = []
        for result in generate(arguments.run, command, requests, arguments):
            _print(result, command.prints_question)
            results.append(result)
        if arguments.out:
            from umm_zoo.generation.results import write_results

            with writing(arguments.out, "--out DIR with a folder that can be written"):
                write_results(results, Path(arguments.out))
            print(f"written to {arguments.out}")
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.generate",
        description="Use a finished run.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help)
        own.add_argument("words", nargs="*", metavar="WORD", help="images and text")
        own.add_argument("--batch", metavar="FILE", help="take the requests from the lines of a JSONL file")
        own.add_argument("--out", metavar="DIR", help="write results.jsonl and grid.png")
        own.add_argument("--batch-size", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
        own.add_argument("--device", default="cpu", help="default: %(default)s")
        own.add_argument("--traceback", action="store_true", help="show where an error line comes from")
        own.set_defaults(seed=0, num=1)  # where the command has no such option
        command.add_arguments(own)
    return parser


def generate(source: str | Path, command: Command, requests: Sequence[Request], arguments: argparse.Namespace) -> Iterator[Result]:
    """Load the run and do what is asked, batch by batch.

    Raises:
        UserError: no such run, its method cannot do it, or a request does not suit it.
    """
    import torch

    from umm_zoo.generation.model import load_model

    model = load_model(load_run(source), arguments.device)
    for start in range(0, len(requests), arguments.batch_size):
        rows = list(requests[start : start + arguments.batch_size])
        try:
            with torch.no_grad():
                done = command.run(model, rows, arguments)
        except UserError as error:
            error.locate(source, keys=[row.name for row in rows])
            raise
        except ValueError as error:
            raise UserError(source, f"{rows[0].question}: {error}") from error
        yield from done


def _print(result: Result, with_question: bool) -> None:
    if result.answer is None:
        return
    names = " ".join(str(path) for path in result.request.images)
    text = f"{result.request.question}\n  {result.answer}" if with_question else result.answer
    print(f"{names}: {text}" if names else text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
