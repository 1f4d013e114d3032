"""Reading from afar: what is transient is tried again and counted, what is permanent is said in one line, by address."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from data_pipelines.shards.addresses import filesystem, shown
from umm_zoo.errors import UserError

log = logging.getLogger(__name__)
Made = TypeVar("Made")

#: Seconds before each further try (our choice: a quarter of a minute in all), and the most that a server may ask for.
DELAYS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
MAX_WAIT = 60.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_NO_HEAD = (400, 403, 405, 501)
_TAGS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "updated", "mtime", "created")

_faults = Counter[str]()
_reached = set[str]()


class State(NamedTuple):
    """Size of a remote file, and what tells its version from others (``ETag``, ``Last-Modified`` …), if anything does."""

    size: int
    tag: str


class RemoteError(UserError):
    """The error of an address; ``missing`` where there is nothing, or nothing that one may read."""

    missing = False


class _Fault(NamedTuple):
    what: str
    transient: bool = False
    wait: float = 0.0
    missing: bool = False


def take_faults() -> Counter[str]:
    """How often what went wrong and was tried again, in this process since the last call."""
    taken = Counter(_faults)
    _faults.clear()
    return taken


def state(path: str) -> State:
    """Size and version of a remote file as they are now."""
    files = filesystem(path)

    def ask() -> State:
        if path.startswith("http"):
            size, headers = _run(files, _head, path)
            return State(size, _tag(headers))
        files.invalidate_cache()
        info = files.info(path)
        return State(int(info.get("size") or 0), _tag(info))

    return _tried(path, ask)


def read(path: str, start: int, end: int, tag: str = "") -> bytes:
    """Bytes ``start`` to ``end - 1`` of a remote file, fewer only where it ends; a ``UserError`` where its ``tag`` has changed."""
    files = filesystem(path)

    def ask() -> bytes:
        if not path.startswith("http"):
            content: bytes = files.cat_file(path, start=start, end=end)
            return content
        status, headers, content = _run(files, _get, path, start, end)
        if status == 200 and (start or len(content) > end):
            found = "the server sends the whole file where a part is asked for (it answers 200 in place of 206)"
            raise UserError(shown(path), found, hint="data.cache=FOLDER keeps whole shards on a local disk")
        if tag and (now := _tag(headers)) and now != tag:
            raise UserError(shown(path), "the file changed while it is in use", hint="start again")
        return content

    return _tried(path, ask)


def fetch(path: str, local: str | Path) -> None:
    """Copy a whole remote file to a local one."""
    files = filesystem(path)

    def ask() -> None:
        expected = files.size(path) if not path.startswith("http") else _run(files, _head, path)[0]
        files.get_file(path, str(local))
        if (found := Path(local).stat().st_size) != expected:
            raise ConnectionError(f"{found} of {expected} bytes arrived")

    _tried(path, ask)


def listed(pattern: str) -> list[str]:
    """The addresses that a glob means, sorted."""
    files = filesystem(pattern)

    def ask() -> list[str]:
        files.invalidate_cache()
        return sorted(files.unstrip_protocol(name) for name in files.glob(pattern))

    return _tried(pattern, ask)


class RemoteFile:
    """Remote file read from front to back, in pieces of which each is tried again by itself."""

    def __init__(self, path: str, piece: int = 1 << 23) -> None:
        self._path, self._piece, self._state = path, piece, state(path)
        self._place, self._held = 0, b""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._state.size

    def read(self, size: int = -1) -> bytes:
        """The next bytes; fewer than ``size`` at the end."""
        while size < 0 or len(self._held) < size:
            end = min(self._state.size, self._place + self._piece)
            if end <= self._place:
                break
            content = read(self._path, self._place, end, self._state.tag)
            self._place, self._held = self._place + len(content), self._held + content
        size = len(self._held) if size < 0 else size
        taken, self._held = self._held[:size], self._held[size:]
        return taken


def _run(files: Any, request: Callable[..., Any], path: str, *options: Any) -> Any:
    """Run a request on fsspec's session and loop."""
    from fsspec.asyn import sync  # optional, as in ``filesystem``

    return sync(files.loop, request, files, path, *options)


async def _head(files: Any, path: str) -> tuple[int, Mapping[str, str]]:
    session, address = await files.set_session(), files.encode_url(path)
    plain = {"Accept-Encoding": "identity"}
    async with session.head(address, headers=plain, allow_redirects=True) as response:
        if response.status not in _NO_HEAD:
            response.raise_for_status()
            if "Content-Length" in response.headers:
                return int(response.headers["Content-Length"]), response.headers
    async with session.get(address, headers=plain | {"Range": "bytes=0-0"}) as response:
        response.raise_for_status()
        total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
        if not total.isdecimal():
            raise UserError(shown(path), "the server does not say how long the file is")
        return int(total), response.headers


async def _get(files: Any, path: str, start: int, end: int) -> tuple[int, Mapping[str, str], bytes]:
    session = await files.set_session()
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(files.encode_url(path), headers=headers) as response:
        if response.status == 416:  # behind the end
            return 206, response.headers, b""
        response.raise_for_status()
        whole = response.status != 206
        if whole and (start or int(response.headers.get("Content-Length", end + 1)) > end):
            return 200, response.headers, b" " * (end + 1)  # refused above, and not fetched for that
        content = await response.read()
        first, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        expected = min(end, int(total)) - start if total.isdecimal() else len(content)
        if not whole and (len(content) != expected or not first.startswith(f"{start}-")):
            raise ConnectionError(f"{len(content)} of {expected} bytes arrived")
        return response.status, response.headers, content


def _tag(info: Mapping[str, Any]) -> str:
    return " ".join(str(info[name]).removeprefix("W/") for name in _TAGS if info.get(name))


def _tried(path: str, ask: Callable[[], Made]) -> Made:
    """What a request gives, tried again after transient faults."""
    host, began = urlsplit(path).netloc.rpartition("@")[2], time.monotonic()
    for delay in (*DELAYS, None):
        try:
            made = ask()
            _reached.add(host)
            return made
        except UserError:
            raise
        except Exception as error:
            fault = _fault(error, host)
            if not fault.transient or delay is None:
                tries = f", {len(DELAYS) + 1} times in {time.monotonic() - began:.0f} s" if fault.transient else ""
                failed = RemoteError(shown(path), fault.what + tries)
                failed.missing = fault.missing
                raise failed from None  # the error of the library holds the whole address
            wait = min(max(delay, fault.wait), MAX_WAIT)
            _faults[f"{path.partition('://')[0]}://{host}: {fault.what}"] += 1
            log.warning("%s: %s; tried again in %.3g s", shown(path), fault.what, wait)
            time.sleep(wait)
    raise AssertionError


def _fault(error: BaseException, host: str) -> _Fault:
    """What an error of fsspec, aiohttp, botocore or the system means."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        status = getattr(cause, "status", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int) and status >= 300:
            message = str(getattr(cause, "message", "") or "")[:80]
            what = f"the server answers {status}{f' ({message})' if message else ''}"
            return _Fault(what, status in _TRANSIENT, _retry_after(cause), status in (401, 403, 404, 410))
        if isinstance(cause, ssl.SSLCertVerificationError) and not hasattr(cause, "certificate_error"):  # aiohttp's wraps another
            return _Fault(f"its certificate is not accepted ({cause.verify_message})")
        if isinstance(cause, socket.gaierror):
            known = host in _reached and cause.errno == socket.EAI_AGAIN
            return _Fault(f"unknown host {host} ({cause.strerror})", known)
    if isinstance(error, FileNotFoundError):
        return _Fault("no such file there", missing=True)
    if isinstance(error, PermissionError):
        return _Fault("it may not be read (access denied)", missing=True)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return _Fault("time-out", transient=True)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "ClientConnectorError" in kinds or isinstance(error, ConnectionRefusedError):
        return _Fault(f"no connection to {host}", transient=True)
    text = str(error)[:80] if isinstance(error, ConnectionError) else type(error).__name__
    if isinstance(error, OSError) or kinds & {"ClientConnectionError", "ClientPayloadError", "HttpProcessingError"}:
        return _Fault(f"the connection was lost ({text})", transient=True)
    return _Fault(f"it cannot be read ({type(error).__name__})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        inner = getattr(error, "os_error", None) or getattr(error, "certificate_error", None)
        if isinstance(inner, BaseException):
            yield inner
        error = error.__cause__ or error.__context__


def _retry_after(error: Any) -> float:
    """Seconds for which a server asks, as a number or as a date."""
    value = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    with suppress(ValueError, TypeError):
        return float(value) if value.strip().isdecimal() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0
