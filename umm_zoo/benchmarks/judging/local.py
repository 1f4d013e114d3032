"""Judge that is a vision-language model of this package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.devices import own_device
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Task, Turn
from umm_zoo.benchmarks.judging.judge import CACHE, Judge, Question
from umm_zoo.errors import Count, UserError
from umm_zoo.generation.model import Model, load_images
from umm_zoo.outputs import Answers
from umm_zoo.training.finished_run import load_run

_SAMPLED = 4096  # numbers of each weight that stand for all of them


class LocalJudge(Judge):
    """Vision-language model of this package as a judge: a backbone, or a method that answers; greedy, one question at a time.

    Args:
        vlm: backbone.
        run: a run folder, or a checkpoint, in place of it; images become inputs as by the run's data.
        max_new_tokens: longest answer.
        device: where it runs; the process's own GPU where there is one.
        trust: modules beside this package whose classes the run may name.
        cache: folder of kept answers; null, or nothing behind ``cache=``, keeps none.

    Raises:
        UserError: not one of ``vlm`` and ``run`` is given, or the run's method does not answer.
    """

    def __init__(
        self,
        vlm: VLMBackbone | None = None,
        run: str | None = None,
        max_new_tokens: Count = 512,
        device: str | None = None,
        trust: list[str] | None = None,
        cache: str | None = CACHE,
    ) -> None:
        if (vlm is None) == (run is None):
            raise UserError("judge", "neither 'vlm' nor 'run'" if vlm is None else "both 'vlm' and 'run'", "one of them")
        self.max_new_tokens, self.cache = max_new_tokens, cache
        self.device = device or own_device()
        self._vlm = None if vlm is None else vlm.eval().to(self.device)
        self._model: Model | None = None
        if run is not None:
            method = load_run(run, trust=trust or []).load_method()
            self._model = Model.of(method, method.run_data, self.device)
            if not isinstance(method, Answers):
                raise self._model.cannot("answer", Answers)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The class of the model, and a digest of its weights."""
        module: Any = self._vlm if self._model is None else self._model.method
        weights = hashlib.sha256()
        for name, values in sorted(module.state_dict().items()):
            weights.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
            some = values.flatten()[:: max(1, values.numel() // _SAMPLED)].to("cpu", copy=True).contiguous()
            weights.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
        return {"model": type(module).__name__, "weights": weights.hexdigest()[:16], "max_new_tokens": self.max_new_tokens}

    @torch.no_grad()
    def answer(self, question: Question) -> str:
        """The likeliest answer; the markers of images stand where the question has its images, on lines of their own."""
        images, lines = list[Tensor](), list[str]()
        for part in question.content:
            if isinstance(part, str):
                lines.append(part.replace(IMAGE_MARKER, ""))
            else:
                made = self._inputs(part)
                images += made
                lines.append(IMAGE_MARKER * len(made))
        turns: Conversation = [Turn(role="user", text="\n".join(lines))]
        if question.system:
            turns.insert(0, Turn(role="system", text=question.system.replace(IMAGE_MARKER, "")))
        if self._model is None:
            assert self._vlm is not None
            shown = [image.to(self.device) for image in images]
            return self._vlm.generate([turns], shown or None, [len(images)], self.max_new_tokens)[0]
        batch = Batch(keys=["question"], conversations=[turns], images=images, image_counts=[len(images)], tasks=[Task.QUESTION])
        return str(self._model.method.answer(batch.to(self.device), self.max_new_tokens)[0])

    def _inputs(self, image: Image.Image) -> list[Tensor]:
        image = image.convert("RGB")
        if self._model is not None:
            return self._model.load_images(image)
        assert self._vlm is not None
        return load_images(image, self._vlm.image_size)
