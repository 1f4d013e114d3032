"""``python -m umm_zoo.serve RUN``: a finished run behind the OpenAI API."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from umm_zoo.errors import UserError, note, say, user_errors
from umm_zoo.generation.options import number, whole
from umm_zoo.serve.batching import ModelThread
from umm_zoo.serve.limits import Limits
from umm_zoo.serve.serving import Serving
from umm_zoo.training.finished_run import add_raw_weights, add_trust, load_run

if TYPE_CHECKING:
    from umm_zoo.generation.model import Model

#: Packages of the extra.
_NEEDED = ("starlette", "uvicorn", "python_multipart")
#: Environment variable of a key that no list of processes shows.
KEY_VARIABLE = "UMM_ZOO_API_KEY"
HELP = f"""examples:
  python -m umm_zoo.serve runs/llava-shapes
  curl http://127.0.0.1:8000/v1/models
  python -m umm_zoo.serve runs/wemmu/toy/stage4 --port 8001 --batch-size 8 --device cuda
  {KEY_VARIABLE}=secret python -m umm_zoo.serve runs/llava-shapes --host 0.0.0.0 --allow-origin https://chat.example.org"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 stopped by a signal, 2 a user error."""
    arguments = _parser().parse_args(argv)
    serving: Serving | None = None
    with user_errors(arguments.traceback) as outcome:
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise UserError(
                "umm_zoo.serve", f"no {', '.join(missing)}", "the packages of the extra", "pip install 'umm_zoo[serve]'"
            )
        from umm_zoo.serve.app import make_app
        from umm_zoo.serve.running import bound_socket, run

        key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE)
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise UserError("--api-key", "a key that is empty or has letters that no header takes", "letters of ASCII")
        stop_timeout = number("", 0, 3600).read(arguments.stop_timeout, "--stop-timeout")
        serving = _serving(arguments, Limits.of(arguments))
        app = make_app(serving, key, arguments.allow_origin)
        port = whole("", 0, 65535).read(arguments.port, "--port")
        with bound_socket(arguments.host, port) as listener:
            _say_where(arguments.host, listener.getsockname()[1], key is not None)
            run(app, serving, listener, stop_timeout)
    if serving is not None and serving.thread.thread.ident is not None:
        from umm_zoo.serve.running import leave

        leave(serving, outcome.code)
    return outcome.code


def _serving(arguments: argparse.Namespace, limits: Limits) -> Serving:
    """What is served; its model is loaded in its thread."""

    def load() -> Model:
        run = load_run(arguments.run, (), arguments.trust, arguments.raw_weights)
        serving.name = arguments.name or run.experiment.name
        serving.about = {"step": run.checkpoint.get("global_step"), "weights": run.weights}
        return run.load_model(arguments.device)

    def changed() -> None:
        if (model := thread.model) is not None:
            from umm_zoo.generation import abilities_of

            say(f"ready: {serving.name} can {', '.join(abilities_of(model.method)) or 'nothing'}")

    batch_size = whole("", 1, 10_000).read(arguments.batch_size, "--batch-size")
    window = number("", 0, 10).read(arguments.batch_window, "--batch-window")
    thread = ModelThread(load, batch_size, window, changed)
    serving = Serving(thread, limits)
    return serving


def _say_where(host: str, port: int, has_key: bool) -> None:
    shown = f"[{host}]" if ":" in host else host
    alone = _is_loopback(host)
    reach = "this machine alone, unless --host says otherwise" if alone else "whoever reaches this machine"
    say(f"listening on http://{shown}:{port}/v1 for {reach}; the model is loading")
    if not alone and not has_key:
        note(f"no key is asked of anybody: --api-key or ${KEY_VARIABLE} sets one")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.serve",
        description="Put a finished run behind the OpenAI API.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    parser.add_argument("--port", default=8000, metavar="N", help="default: %(default)s; 0 takes a free one")
    parser.add_argument("--name", help="name of the model (default: the run's)")
    parser.add_argument("--api-key", metavar="KEY", help=f"ask for this key (default: ${KEY_VARIABLE}; without either for none)")
    parser.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="let pages of this origin ask; * is all")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--batch-size", default=16, metavar="N", help="answers or images at a time (default: %(default)s)")
    parser.add_argument(
        "--batch-window", default=0.01, metavar="S", help="seconds that a request waits for others (default: %(default)s)"
    )
    parser.add_argument(
        "--stop-timeout", default=30.0, metavar="S", help="seconds to finish what was asked for (default: %(default)s)"
    )
    Limits.add_arguments(parser)
    add_trust(parser)
    add_raw_weights(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
