"""lmms-eval's tasks put to a finished run, several requests at a time.

lmms-eval (0.7.3) is no extra of this package: it pins wandb and av, wants fifty packages more, and does not start with filelock
4. In an environment of its own, with this package beside it (its entry point in ``lmms_eval.models`` names ``manifest``)::

    pip install -c tools/constraints.txt -e . && pip install lmms-eval==0.7.3 'filelock<4'
    python -m lmms_eval --model umm_zoo --model_args run=RUN,trust=my_method --tasks pope,mmvp --batch_size 16
    torchrun --nproc-per-node 4 -m lmms_eval …        (or accelerate launch)
    pytest tests/benchmarks/test_lmms_eval.py

The last line is the test with lmms-eval's own classes, which is skipped where they are not installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from umm_zoo.backbones.devices import own_device
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Task, Turn
from umm_zoo.conversation import repeat_markers
from umm_zoo.errors import UserError
from umm_zoo.generation.images import on_white, open_image
from umm_zoo.generation.model import Model, Source
from umm_zoo.method import Method
from umm_zoo.outputs import Answers

#: Longest answer where a task does not say (our choice).
MAX_NEW_TOKENS = 1024


def manifest() -> ModelManifest:
    """What lmms-eval asks the entry point for."""
    return ModelManifest("umm_zoo", chat_class_path=f"{__name__}.FinishedRun")


class FinishedRun(lmms):
    """Model of lmms-eval that answers as the method of a run does; texts and images, no videos and no sound.

    Of a task's settings of generation ``max_new_tokens``, ``temperature``, ``do_sample`` and ``until`` count.

    Args:
        run: run folder or checkpoint.
        batch_size: requests at a time.
        device: None is this process's CUDA device, or the CPU.
        trust: modules of one's own that the run's experiment names, separated by ``;``.
        max_batch_size: lmms-eval's, which is not looked at.

    Raises:
        UserError: no such run, or its method does not answer.
    """

    is_simple = False

    def __init__(
        self, run: str, batch_size: int | str = 16, device: str | None = None, trust: str = "", max_batch_size: Any = None
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 16
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        method = Method.load(run, trust=[name for name in trust.split(";") if name])
        self.answering = Model.of(method, method.run_data, device if device and device != "cuda" else own_device())
        self.device = torch.device(self.answering.device)
        if not isinstance(method, Answers):
            raise self.answering.cannot("answer", Answers)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each request, in their order; those of equal settings go together."""
        answers: list[str] = []
        for settings, group in groupby((request.args for request in requests), key=lambda arguments: arguments[2]):
            chats = [ask(self.task_dict[task][split][doc]) for _, ask, _, doc, task, split in group]
            for start in range(0, len(chats), self.batch_size):
                answers += self.answers(chats[start : start + self.batch_size], settings)
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each request, round after round; the task says what is asked next, and when that is nothing."""
        return [list(self._rounds(*request.args)) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Nothing: methods answer in words."""
        raise UserError("lmms-eval", "a task of likelihoods", "one with output_type: generate_until")

    def _rounds(self, _: str, ask: Any, settings: Mapping[str, Any], doc: int, task: str, split: str) -> Iterator[str]:
        row, said, known = self.task_dict[task][split][doc], list[str](), None
        messages = ask(row)
        while messages is not None:
            said += self.answers([messages], settings)
            yield said[-1]
            more = ask(row, round_idx=len(said), previous_output=list(said), previous_round_info=known)
            messages, ends, _, known = more if isinstance(more, tuple) else (None, True, None, None)
            messages = None if ends else messages

    def answers(self, chats: Sequence[list[dict[str, Any]]], settings: Mapping[str, Any]) -> list[str]:
        """An answer to each conversation of lmms-eval's messages, cut off at what the task takes for its end."""
        longest = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        temperature = float(settings.get("temperature") or 0) if settings.get("do_sample", True) else 0.0
        until = settings.get("until") or []
        with torch.no_grad():
            found = self.answering.method.answer(self._batch([_turns(chat) for chat in chats]), longest, temperature)
        for stop in [until] if isinstance(until, str) else until:
            found = [answer.split(stop)[0] if stop else answer for answer in found]
        return found

    def _batch(self, rows: Sequence[tuple[Conversation, list[Source]]]) -> Batch:
        made = [[self.answering.load_images(image) for image in images] for _, images in rows]
        return Batch(
            keys=[f"request {place}" for place in range(len(rows))],
            conversations=[repeat_markers(turns, [*map(len, own)]) for (turns, _), own in zip(rows, made, strict=True)],
            images=[tensor for own in made for tensors in own for tensor in tensors],
            image_counts=[sum(map(len, own)) for own in made],
            tasks=[Task.QUESTION] * len(rows),
        ).to(self.answering.device)


def _turns(messages: list[dict[str, Any]]) -> tuple[Conversation, list[Source]]:
    """Turns with markers, and their images; a marker in a task's text is no image."""
    chat = ChatMessages(messages=messages)
    images, *others = chat.extract_media()
    if any(others):
        raise UserError("lmms-eval", "a video or sound", "texts and images")
    turns = []
    for message in chat.messages:
        parts = [part.text.replace(IMAGE_MARKER, "") if part.type == "text" else IMAGE_MARKER for part in message.content]
        turns.append(Turn(role=message.role, text="\n".join(parts)))
    return turns, [open_image(Path(image)) if isinstance(image, str) else on_white(image) for image in images]
