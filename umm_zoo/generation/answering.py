"""Commands that answer in words."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command, behind_options
from umm_zoo.generation.options import MAX_SEED, number, whole
from umm_zoo.generation.requests import Request, Result

if TYPE_CHECKING:
    from umm_zoo.backbones.answers import Answer
    from umm_zoo.batch import Batch
    from umm_zoo.generation.model import Model

#: Images of a request at most.
MANY = 1000
#: Of a caption, where none is said.
PROMPT = "Describe the image."


class Ask(Command):
    """Answer to a question about images."""

    help = "answer a question: ask [IMAGE ...] QUESTION"
    prints_question = True
    num_images = (0, MANY)
    options = {
        "max_new_tokens": whole("longest answer", 1, 100_000, 64),
        "temperature": number("0 takes the likeliest word", 0, 100, 0.0),
        "top_p": number("share of the probability that the words drawn from have together", 0, 1, 1.0),
        "seed": whole("of the words drawn at a temperature above 0", 0, MAX_SEED, 0),
    }

    def words(self, words: list[str], arguments: argparse.Namespace) -> list[tuple[list[Path], str]]:
        """One request."""
        if not words or not words[-1].strip() or os.path.isfile(words[-1]):
            raise UserError("ask", "no question", "ask [IMAGE ...] QUESTION, the question last and in quotes")
        return [([Path(word) for word in words[:-1]], words[-1])]

    def possible(self, method: Any) -> bool:
        """Whether it answers."""
        from umm_zoo.outputs import Answers

        return isinstance(method, Answers)

    def run(self, model: Model, requests: list[Request]) -> list[Result]:
        """Answer a batch of questions; drawn words depend on the request and its seed alone."""
        import torch

        from umm_zoo.backbones.answers import AnswersInTokens, Decoding
        from umm_zoo.outputs import Answers

        if not self.possible(model.method):
            raise model.cannot("answer", Answers)
        own = requests[0].settings
        longest, temperature, top_p = own["max_new_tokens"], own["temperature"], own.get("top_p", 1.0)
        if isinstance(model.method, AnswersInTokens):
            watched = any(request.watch is not None for request in requests)
            seeds = [request.settings["seed"] for request in requests]
            decoding = Decoding(longest, temperature, seeds, top_p, _watch(requests) if watched else None)
            answers = model.method.answer_in_tokens(_questions(model, requests), decoding)
            if answers is not None:
                return [Result(request, answer.text, tokens=answer) for request, answer in zip(requests, answers, strict=True)]
        if top_p < 1:
            raise UserError("top_p", f"{top_p:g}", f"1: a {type(model.method).__name__} gives its answers as a whole")
        results = []
        for rows in [requests] if temperature == 0 else [[request] for request in requests]:
            with torch.random.fork_rng():
                torch.manual_seed(rows[0].settings["seed"])
                texts = model.method.answer(_questions(model, rows), longest, temperature)
            results += [Result(request, text) for request, text in zip(rows, texts, strict=True)]
        return results


def _questions(model: Model, requests: list[Request]) -> Batch:
    """A batch of rows that ask for words."""
    from umm_zoo.batch import Task

    return replace(model.batch_of(requests), tasks=[Task.QUESTION] * len(requests))


def _watch(requests: list[Request]) -> Callable[[int, Answer], bool]:
    """What the requests' own watches say."""

    def goes_on(row: int, answer: Answer) -> bool:
        watch = requests[row].watch
        return watch is None or watch(answer)

    return goes_on


class Caption(Ask):
    """Description of every image by itself."""

    help = "describe images: caption IMAGE ..."
    prints_question = False
    num_images = (1, MANY)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The prompt."""
        super().add_arguments(parser)
        parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="default: %(default)s")

    def words(self, words: list[str], arguments: argparse.Namespace) -> list[tuple[list[Path], str]]:
        """One request per image."""
        if not words:
            raise UserError("caption", "no image", "caption IMAGE ...")
        return [([Path(word)], arguments.prompt) for word in words]

    def line(self, images: Sequence[str], text: str) -> list[str]:
        """The prompt as an option, where it is not the usual one."""
        return [*([] if text == PROMPT else [f"--prompt={text}"]), *behind_options(images)]

    def default_question(self, arguments: argparse.Namespace) -> str:
        """The prompt, where a line has no question of its own."""
        return str(arguments.prompt)
