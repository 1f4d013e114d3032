"""Routes of the OpenAI API, and who may ask for them."""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from umm_zoo.errors import UserError
from umm_zoo.generation import abilities_of
from umm_zoo.generation.base import Command
from umm_zoo.serve.bodies import body_of, form_of, typed
from umm_zoo.serve.chat import ASK, read_chat
from umm_zoo.serve.failures import ApiError, missing_model
from umm_zoo.serve.making import check_settings, read_making
from umm_zoo.serve.parameters import json_object
from umm_zoo.serve.replies import ChatReply, Stream, ends
from umm_zoo.serve.serving import Exchange, Serving


def make_app(serving: Serving, api_key: str | None = None, origins: Sequence[str] = ()) -> ASGIApp:
    """The app.

    Args:
        serving: what it serves.
        api_key: asked of everybody, but for the state of health; None asks for none.
        origins: of pages in a browser that may use it; ``*`` is all.
    """
    routes = Routes(serving)
    middleware = [Middleware(Guard, api_key=api_key, origins=origins)]
    if origins:
        cors = Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
        middleware.insert(0, cors)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.one_model),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/images/generations", routes.generations, methods=["POST"]),
            Route("/v1/images/edits", routes.edits, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={
            ApiError: _told,
            UserError: _told,
            ClientDisconnect: _left,
            HTTPException: _no_route,
            Exception: _told,
        },
    )
    app.router.redirect_slashes = False
    return app


def failed(error: BaseException) -> Response:
    """The reply that an error is."""
    told = ApiError.of(error)
    return JSONResponse(told.body, told.status, told.headers)


async def _told(request: Request, error: Exception) -> Response:
    return failed(error)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody gets it


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = "/v1/models, /v1/chat/completions, /v1/images/generations, /v1/images/edits, /health"
    message = f"{error.detail}: {request.method} {request.url.path[:100]}; this server has {paths}"
    return failed(ApiError(error.status_code, message, headers=error.headers))


class Guard:
    """Middleware that asks for the key, and refuses pages of a browser that nobody has allowed."""

    def __init__(self, app: ASGIApp, api_key: str | None, origins: Sequence[str]) -> None:
        self.app, self.origins = app, origins
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        headers = {name: value for name, value in scope.get("headers", ())} if scope["type"] == "http" else {}
        error = None
        if (origin := headers.get(b"origin", b"").decode("latin-1")) and not {"*", origin} & {*self.origins}:
            error = ApiError(403, f"pages of {origin[:100]} may not use this server (--allow-origin)", code="origin")
        elif self.key is not None and scope["type"] == "http" and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self.key):
                challenge = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=challenge)
        await (self.app if error is None else failed(error))(scope, receive, send)


class Routes:
    """What is done at each address."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.created = serving, int(time.time())

    async def health(self, request: Request) -> Response:
        """Whether requests are taken."""
        state = self.serving.state
        body = {"status": state, "waiting": self.serving.thread.num_waiting, "open": len(self.serving.open)}
        return JSONResponse(body, 200 if state == "ready" else 503)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        """The one model by its name."""
        card = self._card()
        if request.path_params["name"] != card["id"]:
            raise missing_model(request.path_params["name"])
        return JSONResponse(card)

    def _card(self) -> dict[str, Any]:
        method = self.serving.model.method
        card = {"id": self.serving.name, "object": "model", "created": self.created, "owned_by": "umm_zoo"}
        return {**card, "method": type(method).__name__, "abilities": list(abilities_of(method)), **self.serving.about}

    async def chat(self, request: Request) -> Response:
        """Answers to a conversation."""
        from umm_zoo.generation.abilities import check_earlier

        with contextlib.ExitStack() as stack:
            hold = stack.enter_context(self.serving.holding())
            body = await self._json(request, hold)
            self._assert_able(ASK)
            asked = await self.serving.read(read_chat, body, self.serving.limits)
            del body
            check_earlier(self.serving.model.method, asked.rows[0].earlier)
            hold(asked.num_bytes)
            exchange = Exchange(self.serving, ASK, asked.rows, asked.stops, asked.stream)
            stack.callback(exchange.close)
            reply = ChatReply(exchange, self.serving.name or "", asked)
            if not asked.stream:
                return JSONResponse(await reply.whole(request), headers=_ignoring(asked.ignored))
            first = await reply.first(request)
            return Stream(reply.pieces(first), stack.pop_all(), _ignoring(asked.ignored))

    async def generations(self, request: Request) -> Response:
        """Images of a text."""
        with contextlib.ExitStack() as stack:
            hold = stack.enter_context(self.serving.holding())
            return await self._made(request, await self._json(request, hold), None, stack, hold)

    async def edits(self, request: Request) -> Response:
        """Images of images and a text."""
        with contextlib.ExitStack() as stack:
            hold = stack.enter_context(self.serving.holding())
            fields, files = await form_of(request, await self._body(request, hold), self.serving.limits)
            self._assert_model(fields)
            return await self._made(request, typed(fields), files, stack, hold)

    async def _made(
        self,
        request: Request,
        body: Mapping[str, Any],
        files: Sequence[bytes] | None,
        stack: contextlib.ExitStack,
        hold: Callable[[int], None],
    ) -> Response:
        asked = await self.serving.read(read_making, body, files, self.serving.limits)
        self._assert_able(asked.command)
        check_settings(asked, self.serving.model.method)
        hold(asked.num_bytes)
        exchange = Exchange(self.serving, asked.command, asked.rows)
        stack.callback(exchange.close)
        results = [end.result for end in await ends(exchange, request)]
        answer = await self.serving.read(asked.answer, results, int(time.time()))
        return JSONResponse(answer, headers=_ignoring(asked.ignored))

    # -- what all have in common ---------------------------------------------------------------------------------------------

    async def _body(self, request: Request, hold: Callable[[int], None]) -> bytes:
        _ = self.serving.model  # before anything is read
        self.serving.assert_room()
        return await body_of(request, self.serving.limits, hold)

    async def _json(self, request: Request, hold: Callable[[int], None]) -> dict[str, Any]:
        found = await self.serving.read(json_object, await self._body(request, hold))
        self._assert_model(found)
        return found

    def _assert_model(self, body: Mapping[str, Any]) -> None:
        name = body.get("model")
        if name is not None and name != self.serving.name:
            raise missing_model(name)

    def _assert_able(self, command: Command) -> None:
        """Refuse what the run cannot do, in the words of ``umm_zoo.generate``."""
        from umm_zoo.outputs import Answers, Draws

        model = self.serving.model
        if command.possible(model.method):
            return
        if isinstance(model.method, Draws) and command.num_images[1]:
            error = UserError("image", "an image", f"none: a {type(model.method).__name__} makes images of words alone")
        else:
            error = model.cannot("answer", Answers) if command is ASK else model.cannot("generate images", Draws)
        raise ApiError.of(error, 404)


def _ignoring(names: Sequence[str]) -> dict[str, str]:
    """The header that names what was passed over."""
    shown = [name for name in names if name.isascii() and name.isprintable()][:20]
    return {"X-Ignored-Parameters": ", ".join(name[:50] for name in shown)} if shown else {}
