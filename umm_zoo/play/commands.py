"""What somebody fills in on the page, as the line of ``umm_zoo.generate`` that does the same. Nothing here imports torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umm_zoo.generate import parser
from umm_zoo.generation import COMMANDS
from umm_zoo.generation.requests import Request


@dataclass(frozen=True)
class RunWords:
    """How the command line names a run.

    Args:
        run: a run folder or a checkpoint, as the user has named it.
        device: as ``--device`` takes it.
        trust: modules as ``--trust`` takes them.
        raw_weights: see ``--raw-weights``.
    """

    run: str
    device: str = "cpu"
    trust: Sequence[str] = ()
    raw_weights: bool = False

    @property
    def options(self) -> list[str]:
        """Those that are not the defaults."""
        device = [] if self.device == "cpu" else option("device", self.device)
        return [*device, *(word for name in self.trust for word in option("trust", name))] + self.raw_weights * ["--raw-weights"]


def option(name: str, value: Any) -> list[str]:
    """An option with a value, whatever that begins with."""
    text = str(value)
    flag = f"--{name.replace('_', '-')}"
    return [f"{flag}={text}"] if text.startswith("-") or not text else [flag, text]


def command_words(run: RunWords, command: str, images: Sequence[str], text: str, given: Mapping[str, Any]) -> list[str]:
    """Words behind ``python -m umm_zoo.generate``.

    Args:
        run: the run.
        command: its name in ``COMMANDS``.
        images: files.
        text: question, prompt or instruction; not looked at where the command has none.
        given: settings by name, as they were typed; an empty one is none.
    """
    known = COMMANDS[command].options
    switches = [f"--{name}" for name, value in given.items() if value and name in known and known[name].switch]
    typed = {name: str(value).strip() for name, value in given.items() if not (name in known and known[name].switch)}
    settings = [*switches, *(word for name, value in typed.items() if value for word in option(name, value))]
    safe = [f"./{path}" if path.startswith("-") else path for path in (run.run, *images)]
    return [safe[0], command, *settings, *run.options, *COMMANDS[command].line(safe[1:], text)]


def requests_of(words: Sequence[str]) -> list[Request]:
    """Requests that the command makes of its words, one for each result.

    Raises:
        UserError: a word or a setting cannot be used.
    """
    arguments = parser().parse_args(words)
    found = COMMANDS[arguments.command].requests(arguments.words, arguments)
    return [one for request in found for one in request.seed_after_seed()]


def shell_line(words: Sequence[str]) -> str:
    """The whole line, which a shell takes apart again into these very words."""
    return shlex.join(["python", "-m", "umm_zoo.generate", *words])
