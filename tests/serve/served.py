"""Servers of tests: a tiny run in this process, without a socket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
from PIL import Image

from umm_zoo.experiment.build import build_method
from umm_zoo.generation.model import Model
from umm_zoo.generation.run_data import RunData
from umm_zoo.serve.batching import ModelThread
from umm_zoo.serve.limits import Limits
from umm_zoo.serve.serving import Serving


def model_of(node: dict[str, Any], image_size: int = 8) -> Model:
    """A tiny model of a method's node."""
    method: Any = build_method({"method": node})
    return Model.of(method.eval(), RunData({"image_size": image_size}), "cpu")


@contextlib.contextmanager
def serving(load: Callable[[], Model], batch_size: int = 16, window: float = 0.0, **limits: Any) -> Iterator[Serving]:
    """A server whose model is there."""
    thread = ModelThread(load, batch_size, window, lambda: None)
    found = Serving(thread, Limits(**limits), "toy")
    thread.thread.start()
    while thread.model is None and thread.failure is None:
        time.sleep(0.001)
    try:
        yield found
    finally:
        found.close()
        thread.thread.join()


def exchange(app: Any, *requests: dict[str, Any]) -> list[httpx.Response]:
    """Responses to requests that come at the same time."""

    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
            return list(await asyncio.gather(*(client.request(**{"method": "POST", **request}) for request in requests)))

    return asyncio.run(all_of_them())


def png(image: Image.Image) -> bytes:
    """Its file."""
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return stored.getvalue()


def data_url(image: Image.Image) -> str:
    """An image as clients send it."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def question(text: str, *images: Image.Image, **settings: Any) -> dict[str, Any]:
    """A body of a question."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"model": "toy", "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}], **settings}
