"""What somebody asks for on the page, put to one run after the other. Nothing here needs the browser's library."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from umm_zoo.errors import UserError
from umm_zoo.generation import COMMANDS
from umm_zoo.play.cards import result_card
from umm_zoo.play.commands import command_words, requests_of
from umm_zoo.play.loaded import LoadedRun, labels
from umm_zoo.report.html import Markup


@dataclass
class Cancelling:
    """Events by the session of a browser, so that a button there ends what was asked there."""

    events: dict[str, threading.Event] = field(default_factory=dict)

    def begin(self, session: str | None) -> threading.Event:
        """A fresh one for what begins."""
        return self.events.setdefault(session or "", threading.Event())

    def end(self, session: str | None) -> None:
        """End what runs."""
        if event := self.events.pop(session or "", None):
            event.set()


@dataclass
class Asked:
    """What somebody has asked for on a page.

    Args:
        name: of the command.
        files: input images, where the browser's uploads lie.
        text: question, prompt or instruction.
        given: settings as they were typed.
    """

    name: str
    files: Sequence[str]
    text: str
    given: dict[str, str]

    def results(
        self, runs: Sequence[LoadedRun], report: Callable[[float | None, str], None], cancelled: threading.Event
    ) -> Iterator[tuple[int, Markup]]:
        """The number of the run and the card of each result, run after run: the same input and seed for all.

        Raises:
            UserError: what was asked for cannot be used.
            Cancelled: it was ended.
        """
        least, most = COMMANDS[self.name].num_images
        if not least <= len(self.files) <= most:
            expected = f"{least}" if least == most else f"{least} or more" if len(self.files) < least else f"at most {most}"
            raise UserError("images", f"{len(self.files)}", f"{expected} for {self.name}")
        names = labels(runs)
        for place, run in enumerate(runs):
            kept = [str(run.history.keep(Path(file))) for file in self.files]
            words = command_words(run.words, self.name, kept, self.text, self.given)
            requests = requests_of(words)

            def told(share: float | None, line: str, place: int = place) -> None:
                whole = None if share is None and not place else (place + (share or 0.0)) / len(runs)
                report(whole, f"{names[place]}: {line}" if len(runs) > 1 else line)

            for entry in run.answer(self.name, requests, self.given, told, cancelled):
                yield place, result_card(entry, place, run.words)
