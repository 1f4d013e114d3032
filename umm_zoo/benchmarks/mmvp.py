"""MMVP: questions about pairs of images that differ in a detail, each with two options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.benchmarks.base import Benchmark, Item, Verdict
from umm_zoo.benchmarks.files import csv_rows, image_files, needed
from umm_zoo.benchmarks.results import digest
from umm_zoo.errors import UserError
from umm_zoo.generation.answering import Ask
from umm_zoo.metrics.answers import normalise
from umm_zoo.metrics.paired import pair_rates
from umm_zoo.metrics.rows import required
from umm_zoo.outputs import Outputs

#: The prompt of lmms-eval 0.7.3.
PROMPT = "<question>\n<options>\nAnswer with the option's letter from the given choices directly."
#: Rows whose labels lmms-eval takes the other way round, with a word of their questions and the labels of the release.
CORRECTED = {99: ("tusks", "a"), 100: ("tusks", "b"), 279: ("standing", "a"), 280: ("standing", "b")}
_COLUMNS = ("Question", "Options", "Correct Answer")
_FOLDERS = ("MMVP Images", "MMVP Imgaes", "images")  # the second stands in the released script
_OPTIONS = re.compile(r"\s*\(a\)\s*(.+?)\s*\(b\)\s*(.+?)\s*", re.IGNORECASE | re.DOTALL)
#: Where an answer may name its letter, tried one after the other.
_PLACES = tuple(
    re.compile(place, re.IGNORECASE)
    for place in (
        r"\A\(?([ab])\)?\.?\Z",  # nothing else
        r"\A\(?([ab])\)?[.\s]",  # in front
        r"answer\s+is\s+\(?([ab])",
        r"option\s+\(?([ab])",
        r"([ab])\)?(?:\s|\Z)",  # at the end of a word, whichever word
        r"\A([ab])",
    )
)


def letter_of(answer: str) -> str:
    """The letter that an answer names, ``a``, ``b`` or nothing, as lmms-eval 0.7.3 finds it.

    To the letter: "a cat" is a, and so is "Obama", for its end.
    """
    found = (place.search(answer.strip()) for place in _PLACES)
    return next((match[1].lower() for match in found if match), "")


def strict_letter_of(answer: str, options: Mapping[str, str]) -> str:
    """The letter that an answer is, alone or with its option, or whose option it is word for word; nothing in all other cases."""
    said = normalise(answer)
    for letter, option in options.items():
        if said in (letter, normalise(option), normalise(f"{letter} {option}")):
            return letter
    return ""


class MMVP(Benchmark):
    """MMVP (Tong et al., 2024, arXiv 2401.06209): 150 pairs of images; a pair is right where both answers are.

    The release has answers compared by a person or by GPT-4; letters are read by lmms-eval's rule (``letter_of``) and, under
    ``strict/``, where an answer says nothing else (``strict_letter_of``). ``paired``, ``single`` and ``incomplete`` (see
    ``metrics.PairedAccuracy``) are by the release's labels, ``corrected/paired`` and ``corrected/single`` by those of lmms-eval, in
    which two pairs are swapped (rows 99 and 100, 279 and 280). ``unparsed`` counts answers without a letter.

    In an experiment it counts rows whose ``meta`` has ``mmvp_pair``.

    Args:
        folder: of the release, with ``Questions.csv`` and ``MMVP Images``; needed to put questions to a run.
        prompt: what is asked: ``<question>``, ``<options>`` (a line for each, "A. Open") and ``<choices>`` ("(a) Open (b) Closed")
            are filled in, and ``\\n`` is a new line. The released script asks ``<question> <choices>``.

    Raises:
        UserError: the prompt lacks the question or its options.
    """

    name = "mmvp"
    headline = "paired"
    sees_inputs = False
    reads = ("answers",)
    scores = (
        *("paired", "single", "corrected/paired", "corrected/single", "incomplete", "unparsed"),
        *("strict/paired", "strict/single", "strict/corrected/paired", "strict/corrected/single", "strict/unparsed"),
    )

    def __init__(self, folder: str | None = None, prompt: str = PROMPT) -> None:
        super().__init__()
        self.folder, self.prompt = folder, prompt.replace("\\n", "\n")
        if "<question>" not in prompt or not ("<options>" in prompt or "<choices>" in prompt):
            raise UserError("prompt", f"'{prompt}'", "a text with <question>, and <options> or <choices>")

    def questions(self) -> list[dict[str, str]]:
        """Rows of ``Questions.csv``."""
        path = needed("folder", self.folder, "the release's, with Questions.csv and 'MMVP Images'") / "Questions.csv"
        rows = csv_rows("folder", path, _COLUMNS)
        for number, row in enumerate(rows, 1):
            place, label = f"folder: {path}: row {number}", _label(row)
            if not _OPTIONS.fullmatch(row["Options"]) or label not in ("a", "b"):
                found = f"the options '{row['Options']}' and the answer '{row['Correct Answer']}'"
                raise UserError(place, found, "(a) ONE (b) OTHER, and (a) or (b)")
            if (index := row.get("Index", "").strip()) not in ("", str(number)):
                raise UserError(place, f"the index {index}", f"{number}", "images and pairs go by the order of the rows")
        return rows

    def items(self) -> list[Item]:
        """The questions in the order of their file; image 1 belongs to the first, and each two are a pair."""
        rows = self.questions()
        base = needed("folder", self.folder, "the release's")
        folder = next((base / name for name in _FOLDERS if (base / name).is_dir()), base)
        files = image_files("folder", folder, {str(number): [str(number)] for number in range(1, len(rows) + 1)})
        items = []
        for number, row in enumerate(rows, 1):
            match = _OPTIONS.fullmatch(row["Options"])
            assert match is not None  # rows are checked
            options = {"a": match[1], "b": match[2]}
            texts = {
                "<question>": row["Question"].strip(),
                "<options>": "\n".join(f"{letter.upper()}. {option}" for letter, option in options.items()),
                "<choices>": row["Options"].strip(),
            }
            asked = re.sub("|".join(map(re.escape, texts)), lambda found, texts=texts: texts[found[0]], self.prompt)  # type: ignore[misc]
            released, corrected = _labels(number, row)
            meta = {
                **{"task": "questions", "kind": "mmvp", "pair": f"mmvp-{(number + 1) // 2}", "mmvp_pair": (number + 1) // 2},
                **{"options": options, "released": released, "corrected": corrected},
            }
            items.append(Item(f"{number:03d}", asked, (files[str(number)],), released.upper(), meta))
        return items

    def command(self, item: Item) -> Ask:
        """An answer."""
        return Ask()

    def unit(self, item: Item) -> str:
        """The pair."""
        return str(item.meta["pair"])

    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        """Both readings of each answer; right by lmms-eval's and the release's labels."""
        rows = [row for row, meta in enumerate(batch.meta) if "mmvp_pair" in meta]
        answers = required(outputs, "answers", self) if rows else []
        for row in rows:
            meta = batch.meta[row]
            said, strictly = letter_of(answers[row]), strict_letter_of(answers[row], meta["options"])
            labels = meta["released"], meta["corrected"]
            record = [int(meta["mmvp_pair"])]
            for own in (said, strictly):
                record += [*(int(own == label) for label in labels), int(not own)]
            reason = "" if said == labels[0] else f"read as {said or 'neither'}, the label is {labels[0]}"
            columns = {"released": labels[0], "corrected": labels[1], "read": said, "strict": strictly, "pair": meta["mmvp_pair"]}
            yield row, Verdict(record, float(said == labels[0]), "", reason, columns)

    def protocol(self) -> dict[str, Any]:
        """What is asked, and the questions."""
        return {"prompt": self.prompt, "letters": "lmms-eval 0.7.3", "questions": digest(self.questions())}

    def warnings(self) -> list[str]:
        """What is unlike the release."""
        rows = self.questions()
        told = [f"{len(rows)} questions, of the release's 300"] if len(rows) != 300 else []
        known = {number: row for number, row in enumerate(rows, 1) if number in CORRECTED and _is_released(number, row)}
        if len(known) < len(CORRECTED):
            told.append("rows 99, 100, 279 or 280 ask something else than the release's: their labels are not corrected")
        if any(_label(row) != CORRECTED[number][1] for number, row in known.items()):
            told.append("Questions.csv has corrected labels; the release's are put back for the scores without corrected/")
        return told

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Both readings by both sets of labels."""
        values: dict[str, Tensor] = {}
        for prefix, first in (("", 1), ("strict/", 4)):
            released, corrected = (pair_rates(records[:, 0], records[:, first + place]) for place in (0, 1))
            values |= {f"{prefix}{name}": released[name] for name in ("paired", "single")}
            values |= {f"{prefix}corrected/{name}": corrected[name] for name in ("paired", "single")}
            values |= {} if prefix else {"incomplete": released["incomplete"]}
            values[f"{prefix}unparsed"] = records[:, first + 2].sum().double()
        return values


def _label(row: Mapping[str, str]) -> str:
    return row["Correct Answer"].strip().lower().strip("()")


def _is_released(number: int, row: Mapping[str, str]) -> bool:
    """Whether the question is the one that was corrected."""
    return number in CORRECTED and CORRECTED[number][0] in row["Question"].lower()


def _labels(number: int, row: Mapping[str, str]) -> tuple[str, str]:
    """The release's label of a row and lmms-eval's."""
    label = _label(row)
    if not _is_released(number, row):
        return label, label
    released = CORRECTED[number][1]
    return released, "b" if released == "a" else "a"
