"""Load on a server of ``python -m umm_zoo.serve``: clients that ask all at a time, and what becomes of their requests.

    python -m umm_zoo.serve RUN --port 8123 &
    python tools/load_server.py http://127.0.0.1:8123/v1 --clients 50 --seconds 60 --pid $!

Every client asks about an image of its own and asks again as soon as it has the answer; half of them as a stream. A request is lost
if it gets no answer, or another one than the same question got alone before. With ``--images`` they ask for images instead.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
from PIL import Image, ImageChops


def body_of(client: int, model: str, images: bool) -> dict[str, Any]:
    """What a client asks, always the same."""
    if images:
        return {"model": model, "prompt": f"top left: a small {'red' if client % 2 else 'blue'} circle", "seed": client}
    stored = io.BytesIO()
    Image.effect_mandelbrot((32 + client % 3, 32), (-2 + client / 40, -1.5, 1, 1.5), 50).convert("RGB").save(stored, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"
    text = ["What colour is the circle?", "Describe the image.", "What is top left?"][client % 3]
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    settings = {"max_tokens": 24, "temperature": 0.7, "seed": client}
    return {"model": model, "messages": [{"role": "user", "content": content}], **settings}


async def ask(http: httpx.AsyncClient, body: dict[str, Any], stream: bool) -> str:
    """What is answered."""
    if "prompt" in body:
        reply = await http.post("/images/generations", json=body)
        return reply.raise_for_status().json()["data"][0]["b64_json"]
    if not stream:
        reply = await http.post("/chat/completions", json=body)
        return str(reply.raise_for_status().json()["choices"][0]["message"]["content"])
    told = []
    async with http.stream("POST", "/chat/completions", json={**body, "stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                told.append(json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", ""))
    return "".join(told)


def same(one: str, other: str, images: bool) -> bool:
    """Whether two answers are the same; images may differ by a grey level, for sums of a larger batch are rounded otherwise."""
    if not images or one == other:
        return one == other
    opened = [Image.open(io.BytesIO(base64.b64decode(file))) for file in (one, other)]
    extrema: Any = ImageChops.difference(*opened).getextrema()
    return max(high for _, high in extrema) <= 1


def memory_of(pid: int | None) -> float:
    """MiB that a process holds; 0 where nobody says which."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if pid and status.exists() else None
    return int(found[1]) / 1024 if found else 0.0


async def load(url: str, clients: int, seconds: float, images: bool, pid: int | None, key: str) -> dict[str, Any]:
    """Ask for so many seconds; the numbers."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers) as http:
        model = (await http.get("/models")).json()["data"][0]["id"]
        bodies = [body_of(client, model, images) for client in range(clients)]
        alone = [await ask(http, body, False) for body in bodies]
        start, end = memory_of(pid), time.monotonic() + seconds
        taken: list[float] = []
        failed: list[str] = []
        others = 0

        async def client(number: int) -> None:
            nonlocal others
            while (begun := time.monotonic()) < end:
                try:
                    answer = await ask(http, bodies[number], stream=number % 2 == 1)
                except (httpx.HTTPError, ValueError, LookupError) as error:
                    failed.append(f"{type(error).__name__}: {error}")
                    continue
                taken.append(time.monotonic() - begun)
                others += not same(answer, alone[number], images)

        begun = time.monotonic()
        await asyncio.gather(*map(client, range(clients)))
        whole = time.monotonic() - begun
    order = sorted(taken)
    return {
        "clients": clients,
        "seconds": round(whole, 1),
        "answered": len(taken),
        "failed": len(failed),
        "other answers than alone": others,
        "per second": round(len(taken) / whole, 2),
        "median s": round(statistics.median(order), 3) if order else None,
        "95 % s": round(order[int(0.95 * (len(order) - 1))], 3) if order else None,
        "MiB at the start": round(start, 1),
        "MiB at the end": round(memory_of(pid), 1),
        "first failures": failed[:3],
    }


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="http://127.0.0.1:8000/v1")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--images", action="store_true", help="ask for images")
    parser.add_argument("--pid", type=int, help="of the server, for its memory")
    parser.add_argument("--key", default="none", help="of the server")
    own = parser.parse_args()
    found = asyncio.run(load(own.url.rstrip("/"), own.clients, own.seconds, own.images, own.pid, own.key))
    print("\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
