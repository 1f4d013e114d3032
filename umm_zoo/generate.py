"""``python -m umm_zoo.generate RUN COMMAND …``: a finished run on images and texts of one's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from umm_zoo.errors import UserError, print_error, printable, say, user_errors
from umm_zoo.generation import COMMANDS
from umm_zoo.generation.base import Command
from umm_zoo.generation.options import whole
from umm_zoo.generation.progress import progress
from umm_zoo.generation.requests import Request, Result, check_images, name_of
from umm_zoo.training.finished_run import FinishedRun, add_raw_weights, add_trust, load_run
from umm_zoo.training.report import circumstances

HELP = """examples:
  python -m umm_zoo.generate runs/shapes caption one.png two.png
  python -m umm_zoo.generate runs/shapes ask one.png "What colour is the circle?"
  python -m umm_zoo.generate runs/shapes ask one.png two.png "Do the two images show the same scene?"
  python -m umm_zoo.generate runs/ross reconstruct one.png two.png --out reconstructed
  python -m umm_zoo.generate runs/uae/toy/stage3 caption-and-reconstruct one.png two.png
  python -m umm_zoo.generate runs/shapes ask --batch questions.jsonl --out answers
  python -m umm_zoo.generate runs/wemmu/toy/stage4 text-to-image "top left: a small red circle" --num 4 --guidance 4 --steps 20
  python -m umm_zoo.generate runs/t2g/toy/sft text-to-image --think "top left: a small fruit of tree B; background: grey"
  python -m umm_zoo.generate runs/irg/toy/stage2 refine one.png "top left: a small red circle; background: grey" --rounds 2
  python -m umm_zoo.generate runs/wemmu/toy/stage4 edit one.png "Make the circle green." --seed 3
  python -m umm_zoo.generate runs/wemmu/toy/stage4 compose one.png two.png "Put the star of the second image into the first."

RUN is a run folder or a checkpoint. A line of a --batch file is {"images": ["one.png", ...], "question": "..."}, where caption,
reconstruct and caption-and-reconstruct need no question; where images are generated, the question is the prompt, and a .txt file
holds a prompt per line. Its paths start from the file's own folder. A line may have its own settings, named as the options of the
command: "seed": 3, "steps": 20, "size": "512x768". An image depends on its request and seed alone, whatever else is asked for.

--out DIR also writes results.jsonl (of each result the request, its settings, its files, and what made it), grid.png, and every
image that was made. Where DIR holds anything, a new folder is made beside it: DIR-2, DIR-3 ..."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    arguments = parser().parse_args(argv)
    command = COMMANDS[arguments.command]
    with user_errors(arguments.traceback) as outcome:
        if arguments.out == "":
            raise UserError("--out", "''", "a folder")
        batch_size = whole("", 1, 100_000).read(arguments.batch_size, "--batch-size")
        requests = [one for request in command.requests(arguments.words, arguments) for one in request.seed_after_seed()]
        check_images(requests)
        run = load_run(arguments.run, (), arguments.trust, arguments.raw_weights)
        results = generate(run, command, requests, batch_size, arguments.device)
        if arguments.out:
            about = {
                "run": arguments.run,
                "step": run.checkpoint.get("global_step"),
                "weights": run.weights,
                "commit": circumstances()["commit"],
            }
            _write(results, len(requests), Path(arguments.out), about, command.prints_question)
        else:
            for result in results:
                _print(result, command.prints_question)
    return outcome.code


def _write(results: Iterator[Result], count: int, out: Path, about: dict[str, Any], with_question: bool) -> None:
    """Print the results and keep them in a folder, each as soon as it is there."""
    from umm_zoo.generation.results import ResultsFolder

    with ResultsFolder(out, count, about) as folder:
        try:
            for result in results:
                _print(result, with_question)
                folder.add(result)
        finally:  # an error, or Ctrl-C, leaves what was made before
            if folder.count:
                other = "" if folder.path == out else f"; {out} holds something else"
                say(f"written to {folder.path}{other}")


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print_error(UserError(self.prog, printable(message), hint="--help shows the words and options"))
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
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
        own.add_argument("--batch-size", default=16, metavar="N", help="requests at a time (default: 16)")
        own.add_argument("--device", default="cpu", help="default: %(default)s")
        add_trust(own)
        add_raw_weights(own)
        own.add_argument("--traceback", action="store_true", help="show where an error line comes from")
        command.add_arguments(own)
    return parser


def generate(
    run: FinishedRun, command: Command, requests: Sequence[Request], batch_size: int = 16, device: str = "cpu"
) -> Iterator[Result]:
    """Do what is asked of a run, batch by batch, in the order of the requests.

    Raises:
        UserError: its method cannot do it, or a request does not suit it.
    """
    from umm_zoo.generation.running import run_batch

    model = run.load_model(device)
    with progress(len(requests), not command.out) as advance:
        for rows in model.batches(requests, batch_size):
            for result in run_batch(model, command, rows, run.path):
                yield result
                advance()


def _print(result: Result, with_question: bool) -> None:
    """An answer, with what does not print as escapes: models say anything; below it similarities, where there are any."""
    if result.answer is None:
        return
    names = printable(" ".join(map(name_of, result.request.images)))
    answer = "\n".join(map(printable, result.answer.split("\n")))
    text = f"{printable(result.request.question)}\n  {answer}" if with_question else answer
    print(f"{names}: {text}" if names else text, flush=True)
    if result.remark:
        print(f"  ({printable(result.remark)})", flush=True)
    if result.similarities:
        print("  " + ", ".join(f"{name} {cosine:.3f}" for name, cosine in result.similarities.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
