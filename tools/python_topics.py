"""Rows of English text that every machine has: Python's own language reference, as answers of conversations without images.

    python tools/python_topics.py topics.json && python -m data_pipelines.llava_json topics.json data/text

The topics are those of ``help()`` (PSF licence), each cut at the end of a paragraph. What a language model was good at before it
learned about images is seen in its perplexity on them: ``Perplexity`` with ``kinds: [text]``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

#: Characters of a topic: fewer say little, more are cut off.
SHORTEST, LONGEST = 300, 1_200


def rows() -> list[dict[str, object]]:
    """A row for each topic that is long enough, in LLaVA's form."""
    cut = {name: text[:LONGEST].rsplit("\n\n", 1)[0] for name, text in sorted(topics.items())}
    return [
        {
            "id": name,
            "kind": "text",
            "conversations": [
                {"from": "human", "value": f"What does Python's language reference say of '{name}'?"},
                {"from": "gpt", "value": text},
            ],
        }
        for name, text in cut.items()
        if len(text) >= SHORTEST
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.parse_args().out.write_text(json.dumps(rows(), indent=1) + "\n", encoding="utf-8")
