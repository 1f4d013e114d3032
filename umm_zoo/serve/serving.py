"""State of a server: whether it takes requests, what waits in it, and how much memory that holds. Nothing here imports torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from umm_zoo.generation.base import Command
from umm_zoo.generation.requests import Request, Result
from umm_zoo.serve.batching import Job, ModelThread
from umm_zoo.serve.chat import Speaker
from umm_zoo.serve.failures import ApiError
from umm_zoo.serve.limits import Limits

if TYPE_CHECKING:
    from umm_zoo.backbones.answers import Answer
    from umm_zoo.generation.model import Model

T = TypeVar("T")

_STOPPING = "the server is stopping"


class Serving:
    """A model, and the requests to it.

    Args:
        name: of the model; None until it is loaded.
        thread: that holds the model.
        limits: of requests.
        about: of the model, for those who list it.
    """

    def __init__(self, thread: ModelThread, limits: Limits, name: str | None = None, about: dict[str, Any] | None = None) -> None:
        self.thread, self.limits, self.name, self.about = thread, limits, name, dict(about or {})
        self.stopping = False
        self.held = 0  # bytes of bodies and images
        self.open: set[Exchange] = set()
        self._reader = ThreadPoolExecutor(1, "reader")  # one: PIL's warnings are silenced for the whole process

    @property
    def state(self) -> str:
        """``ready``, ``loading``, ``stopping`` or ``failed``."""
        if self.stopping:
            return "stopping"
        return "ready" if self.thread.model is not None else "loading" if self.thread.failure is None else "failed"

    @property
    def model(self) -> Model:
        """The model.

        Raises:
            ApiError: it is not there yet, or not for much longer.
        """
        model = self.thread.model
        if model is None or self.stopping:
            said = _STOPPING if self.stopping else "the model is loading"
            raise ApiError(503, said, code=self.state, headers={"Retry-After": "5"})
        return model

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self.open and self.thread.idle

    def assert_room(self, count: int = 1) -> None:
        """Refuse more jobs than may wait.

        Raises:
            ApiError: with the seconds after which to ask again.
        """
        if self.thread.num_waiting + count > self.limits.max_queue:
            self._refuse(f"{self.thread.num_waiting} answers and images wait already")

    @contextlib.contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Memory of a request, while it is there; the function takes so many bytes more.

        It raises an ``ApiError`` where all requests together would hold too much; one alone may hold what it is allowed.
        """
        own = 0

        def more(num_bytes: int) -> None:
            nonlocal own
            if self.held > own and self.held + num_bytes > self.limits.max_memory * 2**20:
                self._refuse("the requests that are here fill the memory that they may have")
            self.held, own = self.held + num_bytes, own + num_bytes

        try:
            yield more
        finally:
            self.held -= own

    def _refuse(self, reason: str) -> None:
        raise ApiError(429, f"too many requests: {reason}", code="queue_full", headers={"Retry-After": f"{self.thread.patience}"})

    async def read(self, function: Callable[..., T], *arguments: Any) -> T:
        """Result of a function that takes a while, away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, function, *arguments)

    def give_up(self) -> None:
        """Tell everybody who still waits that nothing will come."""
        for exchange in list(self.open):
            exchange.send(-1, ApiError(503, _STOPPING, code="stopping"))

    def close(self) -> None:
        """End the threads, once they have done what they do."""
        self.thread.end()
        self._reader.shutdown(wait=False, cancel_futures=True)


class End:
    """End of one answer or image.

    Args:
        result: of the run.
        text: of an answer, up to where it was told to stop.
        stopped: whether it was.
    """

    def __init__(self, result: Result, text: str = "", stopped: bool = False) -> None:
        self.result, self.text, self.stopped = result, text, stopped


def _unheard(result: Result | Exception) -> None:
    """Deliver to nobody."""


def _ended(answer: Answer) -> bool:
    """Let an answer that nobody waits for end."""
    return False


class Exchange:
    """The jobs of one request to the API, and what becomes of them, as events in the event loop.

    Args:
        serving: where they wait.
        command: what makes them.
        rows: the requests to the run.
        stops: texts at which answers end; None where images are made.
        stream: whether pieces of answers are events too.
    """

    def __init__(
        self,
        serving: Serving,
        command: Command,
        rows: Sequence[Request],
        stops: tuple[str, ...] | None = None,
        stream: bool = False,
    ) -> None:
        self.serving, self.stream = serving, stream
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, str | End | Exception]] = asyncio.Queue()
        speakers = [None if stops is None else Speaker(stops) for _ in rows]
        self.jobs = [self._job(command, row, place, own) for place, (row, own) in enumerate(zip(rows, speakers, strict=True))]
        serving.assert_room(len(rows))
        serving.thread.put(self.jobs)
        serving.open.add(self)

    def close(self) -> None:
        """Forget what is not done, and let the images go at once: jobs and this would hold each other, and them, for long."""
        self.serving.thread.drop([job for job in self.jobs if not job.done])
        self.serving.open.discard(self)
        for job in self.jobs:
            job.deliver, job.request.watch = _unheard, _ended

    def send(self, place: int, event: str | End | Exception) -> None:
        """Put an event into the loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.events.put_nowait, (place, event))

    def _job(self, command: Command, row: Request, place: int, speaker: Speaker | None) -> Job:
        def deliver(result: Result | Exception) -> None:
            if speaker is None or isinstance(result, Exception):
                self.send(place, result if isinstance(result, Exception) else End(result))
                return
            said = result.tokens.said if result.tokens is not None else result.answer or ""
            if new := speaker.more(said, ended=True) if self.stream or speaker.stops else "":
                self._tell(place, new)
            self.send(place, End(result, speaker.text if speaker.stops else said.strip(), speaker.stopped))

        job = Job(command, row, deliver)

        def watch(answer: Answer) -> bool:
            if job.gone:
                return False
            if speaker is not None and (self.stream or speaker.stops):
                self._tell(place, speaker.more(answer.said, answer.ended))
            stopped = speaker is not None and speaker.stopped
            if answer.ended or stopped:
                job.finish(Result(row, answer.text, tokens=answer))
            return not stopped

        if speaker is not None:
            row.watch = watch
        return job

    def _tell(self, place: int, new: str) -> None:
        if self.stream and new:
            self.send(place, new)
