"""Bodies of requests, read under a limit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from umm_zoo.errors import UserError
from umm_zoo.serve.failures import ApiError
from umm_zoo.serve.limits import Limits


async def body_of(request: Request, limits: Limits, hold: Callable[[int], None]) -> bytes:
    """The body; ``hold`` is told of its bytes as they come.

    Raises:
        ApiError: it is too large, which is said once about as much again is read, so that clients get to hear it; or too slow.
    """
    most, size, chunks = limits.max_body * 2**20, 0, list[bytes]()
    try:
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    hold(len(chunk))
                    chunks.append(chunk)
                elif size > 2 * most:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.timeout:g} s", code="timeout") from None
    if size > most:
        raise ApiError(413, f"a body of more than {limits.max_body} MiB (--max-body)", code="request_too_large")
    return b"".join(chunks)


async def form_of(request: Request, body: bytes, limits: Limits) -> tuple[dict[str, Any], list[bytes]]:
    """Fields of a form, and the bytes of its images in their order.

    Raises:
        UserError: it is no form, holds a file that is no image's, or a field twice.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UserError("Content-Type", f"'{request.headers.get('content-type', '')}'", "multipart/form-data")

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(
            request.headers, whole(), max_files=limits.max_images + 1, max_fields=100, max_part_size=8 * limits.max_prompt
        )
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        raise UserError("body", f"no form ({getattr(error, 'message', type(error).__name__)})", "multipart/form-data") from None
    fields, files = dict[str, Any](), list[bytes]()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name == "mask":
                    raise UserError("mask", "a file", "none: no method of this server takes a mask", "say in words what to change")
                if name not in ("image", "image[]"):
                    raise UserError(name[:100], "a file", "images alone, under 'image' or 'image[]'")
                files.append(await value.read())
            elif name in ("image", "image[]", "mask"):
                raise UserError(name, "a text", "a file")
            elif name in fields:
                raise UserError(name[:100], "a field twice", "each field once")
            else:
                fields[name] = value
    return fields, files


#: Fields of a form that JSON has as something else than texts.
_SWITCHES: Mapping[str, bool] = {"true": True, "false": False}


def typed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a form as JSON would have them, as far as they are no texts; numbers are read from texts."""
    return {name: _SWITCHES.get(value, value) if name == "stream" else value for name, value in fields.items()}
