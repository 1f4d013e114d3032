"""Verbs that answer in words."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from umm_zoo.errors import Problem, UserError
from umm_zoo.generation.base import Model, Request, Result, Verb, read_requests


class Ask(Verb):
    """Images, then a question about them."""

    help = "answer a question: ask [IMAGE ...] QUESTION"
    needs = "answer"
    prints_question = True

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
    """Every image described by itself."""

    help = "describe images: caption IMAGE ..."
    prints_question = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """What the model is told."""
        super().add_arguments(parser)
        parser.add_argument("--prompt", default="Describe the image.", metavar="TEXT", help="default: %(default)s")

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """One request per image."""
        if not words:
            raise UserError("caption", [Problem("", "no image", "caption IMAGE ...")])
        return [Request([Path(word)], arguments.prompt) for word in words]

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The images of each line under the prompt, or under the line's own question."""
        return read_requests(file, arguments.prompt)
