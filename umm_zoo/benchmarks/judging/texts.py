"""What judges are told, from files that ship or a user's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umm_zoo.benchmarks.files import SHIPPED, json_in, needed, text_of
from umm_zoo.errors import UserError

#: Spellings of the places in a text that are filled in, some of which stand in releases' own texts.
PLACES = {
    "prompt": ("{prompt}", "{prompt_data['Prompt']}", '{prompt_data["Prompt"]}'),
    "explanation": ("{explanation}", "{prompt_data['Explanation']}", '{prompt_data["Explanation"]}'),
    "checklist": ("{checklist}",),
    "instruction": ("<instruction>", "<edit_prompt>", "{instruction}"),
    "question": ("{question}",),
}


@dataclass(frozen=True)
class JudgeTexts:
    """Texts to a judge.

    Args:
        texts: by name.
        source: whose they are.
    """

    texts: Mapping[str, str]
    source: str

    @classmethod
    def read(cls, file: str | None, shipped: str, names: Mapping[str, Sequence[str]]) -> JudgeTexts:
        """Those of a user's file, a JSON map of texts by name (any other file holds ``user`` alone), or those that ship.

        Args:
            file: the user's; None takes the others.
            shipped: name of the file that ships.
            names: of the texts that are needed, and what each must have a place for.

        Raises:
            UserError: the file cannot be read, or a text or a place in it is missing.
        """
        path = SHIPPED / shipped if file is None else needed("judge_prompt", file, "a file of texts to the judge")
        found: Any = {"user": text_of("judge_prompt", path)} if path.suffix != ".json" else json_in("judge_prompt", path)
        texts = {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}
        source = texts.pop("source", f"the file {path.name}")
        for name, places in names.items():
            if name not in texts:
                raise UserError(f"judge_prompt: {path}", f"no text '{name}'", f"a map of texts: {', '.join(names)}")
            if lacks := [place for place in places if not any(spelling in texts[name] for spelling in PLACES[place])]:
                raise UserError(f"judge_prompt: {path}: {name}", f"no place for the {lacks[0]}", PLACES[lacks[0]][0])
        return cls(texts, source)

    def fill(self, name: str, **values: str) -> str:
        """A text with values in their places, empty where there is none; what stands in a value is no place."""
        spelled = {spelling: value for place, value in values.items() for spelling in PLACES[place]}
        return re.sub("|".join(map(re.escape, spelled)), lambda found: spelled[found[0]], self.texts.get(name, ""))

    def about(self) -> dict[str, str]:
        """Whose they are, and a digest of them."""
        joined = "\0".join(f"{name}\0{text}" for name, text in sorted(self.texts.items()))
        return {"text": self.source, "digest": hashlib.sha256(joined.encode()).hexdigest()[:8]}
