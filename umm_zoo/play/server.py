"""The playground's addresses: on this machine alone unless somebody says otherwise; of its files, what was made."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from umm_zoo.errors import UserError
from umm_zoo.play.cards import ROOT
from umm_zoo.play.following import trainings
from umm_zoo.play.loaded import LoadedRun
from umm_zoo.report.run_files import RunFiles
from umm_zoo.report.run_page import run_page
from umm_zoo.training.run_folder import RunFolder

#: What the page may load: what comes from here. The library makes functions of texts, and styles.
RULE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; frame-ancestors 'self'"
)
#: The same for the page of a run, which can neither see nor touch the playground.
RUN_PAGE = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "frame-ancestors 'self'"
)
#: Addresses of the library that fetch for others, or that nobody needs here.
SHUT = ("/gradio_api/file=http", "/gradio_api/proxy=", "/gradio_api/file=//", "/gradio_api/runs", "/monitoring")

Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


def quiet_environment() -> None:
    """No telemetry, no look for newer versions, and uploads in a folder of this process alone; before the library is imported."""
    uploads = tempfile.mkdtemp(prefix="umm_zoo-play-")
    atexit.register(shutil.rmtree, uploads, ignore_errors=True)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": uploads}


class Guard:
    """Refuses what comes from other sites: names of other machines (a page elsewhere may call this one by its own), other origins.

    Args:
        app: what stands behind it.
        hosts: names that this machine is called by; None takes any.
    """

    def __init__(self, app: App, hosts: Sequence[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self.refusal(scope.get("method", "GET"), scope["path"], headers):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": refusal.encode()})

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                more = [(b"content-security-policy", RULE.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in known)]
            await send(message)

        return await self.app(scope, receive, sending)

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> str:
        """Why a request is refused; empty where it is not."""
        host = headers.get("host", "")
        try:
            name, origin = urlsplit(f"//{host}").hostname or "", urlsplit(headers.get("origin", f"http://{host}")).netloc
        except ValueError:
            return "no address"
        if self.hosts is not None and name not in self.hosts:
            return "another name of this machine"
        if origin != host:
            return "another site"
        return "not here" if path.lower().startswith(SHUT) else ""


def written_page(folder: Path) -> str:
    """The page of a run as it lies in its folder; of an older run, without one, a fresh one.

    Raises:
        UserError: it is no run folder.
    """
    file = RunFolder(folder).page_file
    return file.read_text(encoding="utf-8") if file.is_file() else run_page(RunFiles.read(folder))


def application(runs: Sequence[LoadedRun], training: bool, runs_at: str | None, hosts: Sequence[str] | None) -> Any:
    """The whole application.

    Args:
        runs: none, one or two.
        training: whether trainings are offered.
        runs_at: folder of the run folders; None is the default.
        hosts: see ``Guard``.

    Raises:
        UserError: the runs have nothing in common; the extra ``ui`` is missing.
    """
    quiet_environment()
    try:
        import gradio
        from fastapi import FastAPI, HTTPException
        from fastapi.responses import FileResponse, HTMLResponse
    except ImportError as error:
        raise UserError("umm_zoo.play", f"no {error.name}", "the extra 'ui'", "pip install 'umm_zoo[ui]'") from error
    from umm_zoo.play.page import build

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def page_of(folder: Path) -> Any:
        try:
            page = written_page(folder)
        except (UserError, OSError):
            raise HTTPException(404) from None
        return HTMLResponse(page, headers={"content-security-policy": RUN_PAGE, "cache-control": "no-store"})

    @app.get(ROOT + "/file/{run}/{call}/{name}")
    def file_of(run: int, call: str, name: str) -> Any:
        file = runs[run].history.file(call, name) if 0 <= run < len(runs) else None
        if file is None:
            raise HTTPException(404)
        return FileResponse(file, headers={"content-security-policy": "sandbox; default-src 'none'"})

    @app.get(ROOT + "/page/{run}")
    def page_of_run(run: int) -> Any:
        if not 0 <= run < len(runs):
            raise HTTPException(404)
        return page_of(runs[run].folder)

    if training:

        @app.get(ROOT + "/training/{name:path}")
        def page_of_training(name: str) -> Any:
            folder = trainings(runs_at).get(name)
            if folder is None:
                raise HTTPException(404)
            return page_of(folder)

    blocks, dress = build(runs, training, runs_at)
    blocks.queue(max_size=64, default_concurrency_limit=8)
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        allowed_paths=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        max_file_size="64mb",
        **dress,
    )
    # of a page that is mounted the library thinks that it has not begun, and takes any file of the machine for an upload
    blocks.has_launched = blocks.is_running = True
    return Guard(app, hosts)


def serve(app: Any, bound: Any) -> None:
    """Answer at a socket until somebody ends it.

    Args:
        app: see ``application``.
        bound: a socket with an address.
    """
    import uvicorn

    signal.signal(signal.SIGTERM, lambda *_: None)  # the server ends by itself, and raises its signal again afterwards
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, ws="none")).run(sockets=[bound])
