"""``python -m umm_zoo.play RUN [RUN]``: finished runs tried out in the browser, trainings started and watched."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from umm_zoo.errors import UserError, note, say, user_errors
from umm_zoo.experiment.importing import importing
from umm_zoo.generation.options import whole
from umm_zoo.training.finished_run import add_raw_weights, add_trust

#: Names of this machine that no other reaches it by.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

HELP = """examples:
  python -m umm_zoo.play runs/llava/shapes                         ask it about images of your own
  python -m umm_zoo.play runs/wemmu/toy/stage3 runs/wemmu/toy/stage4   two runs on the same input and seed
  python -m umm_zoo.play                                           start and watch trainings

RUN is a run folder or a checkpoint. The page offers what the run can do. What is made is kept, with its settings, in RUN/play.
It is there on this machine alone (127.0.0.1); with --host 0.0.0.0 whoever reaches the machine can use it."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 ended, 2 a user error."""
    arguments = _parser().parse_args(argv)
    with user_errors(arguments.traceback) as outcome:
        if len(arguments.runs_shown) > 2:
            raise UserError("RUN", f"{len(arguments.runs_shown)} runs", "one, or two side by side")
        alone = arguments.host in LOOPBACK
        training = alone or arguments.allow_training
        if not arguments.runs_shown and not training:
            raise UserError("RUN", "none", "a run, or two", "--allow-training lets others start trainings")
        if find_spec("gradio") is None:
            raise UserError("umm_zoo.play", "no gradio", "the extra 'ui'", "pip install 'umm_zoo[ui]'")
        bound = _bound(arguments.host, whole("", 0, 65_535).read(arguments.port, "--port"))
        with importing():
            from umm_zoo.play.commands import RunWords
            from umm_zoo.play.loaded import LoadedRun
            from umm_zoo.play.server import application, serve
        history = None if arguments.history is None else Path(arguments.history)
        loaded = [
            LoadedRun(RunWords(run, arguments.device, arguments.trust, arguments.raw_weights), history)
            for run in arguments.runs_shown
        ]
        app = application(loaded, training, arguments.runs, LOOPBACK if alone else None)
        _say_where(bound, arguments.host, alone, training)
        serve(app, bound)
    return outcome.code


def _bound(host: str, port: int) -> socket.socket:
    """The socket, taken before anything is loaded.

    Raises:
        UserError: the address cannot be taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # before that another process may bind to it too
    except OSError as error:
        raise UserError(
            "--host, --port", f"{host}:{port} ({error.strerror})", "a free address of this machine", "--port 0 takes one"
        ) from error
    return bound


def _say_where(bound: socket.socket, host: str, alone: bool, training: bool) -> None:
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{bound.getsockname()[1]}/ (Ctrl-C ends it; trainings go on)")
    if alone:
        say("on this machine alone; --host 0.0.0.0 lets others in")
    else:
        able = "use these runs and START TRAININGS, which run code" if training else "use these runs"
        hint = "" if training else "; trainings are off without --allow-training"
        note(f"whoever reaches {shown} can {able}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.play",
        description="Try finished runs in the browser.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs_shown", nargs="*", metavar="RUN", help="run folders or checkpoints, at most two")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    parser.add_argument("--port", default="7860", metavar="N", help="default: %(default)s; 0 takes a free one")
    parser.add_argument("--allow-training", action="store_true", help="let others start trainings too, where --host lets them in")
    parser.add_argument("--history", metavar="DIR", help="folder of what is made (default: RUN/play)")
    parser.add_argument("--runs", metavar="DIR", help="folder of the run folders of trainings (default: $UMM_ZOO_RUNS, else runs)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    add_trust(parser)
    add_raw_weights(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
