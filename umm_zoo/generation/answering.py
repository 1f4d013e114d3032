"""Commands that answer in words."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command
from umm_zoo.generation.requests import Request, Result, read_requests

if TYPE_CHECKING:
    from umm_zoo.generation.model import Model


class Ask(Command):
    """Answer to a question about images."""

    help = "answer a question: ask [IMAGE ...] QUESTION"
    prints_question = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Length and temperature."""
        parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
        parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest word (default)")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request."""
        if not words or Path(words[-1]).is_file():
            raise UserError("ask", "no question", "ask [IMAGE ...] QUESTION, the question last and in quotes")
        return [Request([Path(word) for word in words[:-1]], words[-1])]

    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Answer a batch of questions."""
        from umm_zoo.batch import Task
        from umm_zoo.outputs import Answers

        if not isinstance(model.method, Answers):
            raise model.cannot("answer", Answers)
        batch = replace(model.batch_of(requests), tasks=[Task.QUESTION] * len(requests))
        answers = model.method.answer(batch, arguments.max_new_tokens, arguments.temperature)
        return [Result(request, text) for request, text in zip(requests, answers, strict=True)]


class Caption(Ask):
    """Description of every image by itself."""

    help = "describe images: caption IMAGE ..."
    prints_question = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The prompt."""
        super().add_arguments(parser)
        parser.add_argument("--prompt", default="Describe the image.", metavar="TEXT", help="default: %(default)s")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request per image."""
        if not words:
            raise UserError("caption", "no image", "caption IMAGE ...")
        return [Request([Path(word)], arguments.prompt) for word in words]

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The images of each line under the prompt, or under the line's own question."""
        return read_requests(file, arguments.prompt)
