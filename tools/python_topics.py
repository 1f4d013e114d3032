"""Rows of text that every machine has, to see what a language model forgets while it learns about images.

    python tools/python_topics.py topics.json && python -m data_pipelines.llava_json topics.json data/text
    python tools/python_topics.py own.json --answers MODEL && python -m data_pipelines.llava_json own.json data/own

The questions are about the topics of Python's language reference (those of ``help()``, PSF licence). An answer is the reference's
text, cut at the end of a paragraph, or what a language model itself says, of which it is surest: greedily, and only where it comes
to an end. Their perplexity is ``Perplexity`` with ``kinds: [text]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

#: Characters of a topic: fewer say little, more are cut off.
SHORTEST, LONGEST = 300, 1_200
#: Longest answer of a model, in tokens, and questions that it answers at once.
MOST_TOKENS, AT_ONCE = 192, 16


def texts() -> dict[str, str]:
    """The reference's text by topic, where it is long enough."""
    cut = {name: text[:LONGEST].rsplit("\n\n", 1)[0] for name, text in sorted(topics.items())}
    return {name: text for name, text in cut.items() if len(text) >= SHORTEST}


def question(topic: str) -> str:
    """What the user says."""
    return f"What does Python's language reference say of '{topic}'?"


def answers(source: str) -> dict[str, str]:
    """What the language model of a folder or name says of each topic, where it comes to an end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    words: Any = AutoTokenizer.from_pretrained(source)
    words.padding_side = "left"
    names, said = list(texts()), dict[str, str]()
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        turns = [[{"role": "user", "content": question(name)}] for name in some]
        asked = words.apply_chat_template(turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            whole = model.generate(**asked, max_new_tokens=MOST_TOKENS, do_sample=False)[:, asked["input_ids"].shape[1] :]
        ended = {name: row for name, row in zip(some, whole, strict=True) if words.eos_token_id in row}
        said |= {name: words.decode(row, skip_special_tokens=True).strip() for name, row in ended.items()}
    return {name: text for name, text in said.items() if text}


def rows(found: Mapping[str, str]) -> list[dict[str, object]]:
    """A row for each answer, in LLaVA's form."""
    turns = {name: [{"from": "human", "value": question(name)}, {"from": "gpt", "value": text}] for name, text in found.items()}
    return [{"id": name, "kind": "text", "conversations": own} for name, own in turns.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--answers", metavar="MODEL", help="a language model whose own answers they are: folder or name")
    given = parser.parse_args()
    made = rows(texts() if given.answers is None else answers(given.answers))
    given.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(made)} rows")
