"""Trial of a built experiment with blank images of its own sizes: what the first batch would refuse, without weights or data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from umm_zoo.errors import REFUSALS, Problem, UserError
from umm_zoo.experiment.limits import heads_that_do_not_divide
from umm_zoo.method import Method
from umm_zoo.outputs import TakesImages

#: What torch raises where an operation needs numbers, or no shape is known without them: nothing is wrong.
_NEEDS_NUMBERS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)


def try_experiment(method: Method, data: Any, file: str) -> None:
    """Refuse blocks that cannot take each other's sizes, or the images of the data.

    Args:
        method: built, all of it on the ``meta`` device.
        data: its data module; the one that says of which sizes its images are (``transform.shapes``) is tried with all of these.
        file: for the message.

    Raises:
        UserError: names the part.
    """
    if problems := [problem for name, part in method.named_children() for problem in _heads(part, f"method.{name}")]:
        raise UserError(file, problems)
    shapes = getattr(getattr(data, "transform", None), "shapes", list)
    blanks = [[torch.empty(1, 3, height, width, device="meta") for width, height in shape] for shape in shapes()]
    for name, part in [("method", method), *((f"method.{name}", part) for name, part in method.named_children())]:
        if isinstance(part, TakesImages):
            for blank in blanks:
                try_part(part, blank, name, file)


def try_part(part: TakesImages, blank: Sequence[Tensor], place: str, file: str) -> None:
    """Give a part a blank input image and a blank image to generate, and refuse what cannot take them.

    Raises:
        UserError: names the part.
    """
    try:
        with torch.no_grad(), torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True):
            part.try_images(*blank)
    except UserError as error:
        error.locate(file, place)
        raise
    except _NEEDS_NUMBERS:
        return
    except (*REFUSALS, RuntimeError, LookupError, ArithmeticError, AssertionError) as error:
        given = " and ".join(dict.fromkeys(f"{image.shape[-2]} x {image.shape[-1]}" for image in blank))
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(file, [Problem(place, f"blocks that cannot take images of {given} px ({reason})")]) from error


def _heads(part: nn.Module, place: str) -> list[Problem]:
    """Heads that do not divide a width, in the configurations of libraries' networks with all their defaults."""
    problems: list[Problem] = []
    for name, module in part.named_modules():
        config: Any = getattr(module, "config", None)
        own = config.to_dict() if hasattr(config, "to_dict") else config
        if isinstance(own, dict):
            problems += heads_that_do_not_divide(own, f"{place}.{name}.config" if name else f"{place}.config")
    return problems[:1]
