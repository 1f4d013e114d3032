"""Batches of requests, whether from the command line or from Python: an error names the request that it is about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command
from umm_zoo.generation.model import Model
from umm_zoo.generation.requests import Request, Result


def run_batch(model: Model, command: Command, rows: Sequence[Request], place: str | Path = "") -> list[Result]:
    """Results of a batch; where its error does not say which request it is about, the requests are tried one by one.

    Raises:
        UserError: at ``place``, names the request that does not suit the method.
    """
    try:
        with torch.no_grad():
            return command.run(model, list(rows))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # the CPU's has no class
            raise
        found = f"too little memory for {len(rows)} requests at a time"
        raise UserError(rows[0].name, found, "fewer (--batch-size) or smaller images", file=place) from error
    except UserError as error:
        error.locate(place, rows[0].name if error.row is None else "", [row.name for row in rows])
        raise
    except ValueError as error:
        if len(rows) > 1:
            for row in rows:
                run_batch(model, command, [row], place)
        raise UserError(rows[0].name, str(error), file=place) from error
