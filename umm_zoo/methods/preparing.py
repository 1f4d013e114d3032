"""What a bridge has prepared for its batches ahead of their steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.backbones.preparation import Asked, Preparation, WholeRows
from umm_zoo.batch import Batch, Task
from umm_zoo.blocks.queries import QuerySampler
from umm_zoo.methods.conditioning import ConditionDropout, ConditioningMode, Guidance, Prompts, mode_of
from umm_zoo.outputs import Wanted


@dataclass
class Requests:
    """What a bridge asks for: requests in every mode that they may be given, rows that ask for no image as they are.

    Args:
        prompts: words of the modes.
        modes: of each task.
        opening: of the queries.
        answers: whether rows that ask for no image are answered.
    """

    prompts: Prompts
    modes: Mapping[Task, frozenset[ConditioningMode]]
    opening: str
    answers: bool

    def __call__(self, batch: Batch) -> Iterator[Asked]:
        """Of a batch with rows of any kind."""
        if rows := [row for row, asks in enumerate(batch.has_target) if not asks]:
            yield from WholeRows(self.answers)(batch.select(rows))
        for mode in sorted(frozenset().union(*self.modes.values())):
            rows = [row for row, task in enumerate(batch.tasks) if batch.has_target[row] and mode in self.modes[task]]
            if rows:
                yield Asked(self.prompts.apply(batch.select(rows), [mode] * len(rows)), True, self.opening)


class PreparesRequests:
    """Base class of bridges, of whose batches the requests can be prepared."""

    vlm: PrefixBackbone
    queries: QuerySampler
    dropout: ConditionDropout
    guidance: Guidance
    wanted: Wanted

    def preparation(self, scoring: bool) -> Preparation | None:
        """See ``Prepares``: in a training the modes that rows may be given, in a validation those that guidance needs."""
        modes = {}
        for task in Task:
            given = [mode for mode, share in self.dropout.shares.get(task, []) if share]
            modes[task] = frozenset({mode_of(task), *(self.guidance.weights(task) if scoring else given)})
        answers = scoring and self.wanted.max_new_tokens > 0
        return self.vlm.preparation(Requests(self.dropout.prompts, modes, self.queries.opening, answers))
