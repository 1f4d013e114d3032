"""Files in which ``python -m umm_zoo.generate`` leaves its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from umm_zoo.callbacks.cards import Card, draw_cards
from umm_zoo.generation.requests import Result


def write_results(results: Sequence[Result], folder: Path) -> None:
    """``results.jsonl``, one line per request, ``grid.png``, and every image that was made as a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        for result in results:
            row = {"images": [str(path) for path in result.request.images], "question": result.request.question}
            file.write(json.dumps({**row, "answer": result.answer}, ensure_ascii=False) + "\n")
    cards = []
    for number, result in enumerate(results):
        for name, image in result.images.items():
            image.save(folder / f"{number:03d}-{name.replace(' ', '-')}.png")
        shown = {}
        for path in result.request.images:
            with Image.open(path) as opened:
                shown[path.name] = opened.convert("RGB")
        title = ", ".join(path.name for path in result.request.images)
        cards.append(Card(title, result.request.question, result.answer, "", None, {**shown, **result.images}))
    if cards:
        draw_cards(cards, 192, 4).save(folder / "grid.png")
