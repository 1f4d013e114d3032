"""POPE: yes/no questions about objects that are in an image and objects that are not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.benchmarks.base import Benchmark, Item, Verdict
from umm_zoo.benchmarks.files import SHIPPED, image_files, needed, plain_key, rows_in
from umm_zoo.benchmarks.results import digest
from umm_zoo.errors import UserError
from umm_zoo.generation.answering import Ask
from umm_zoo.metrics import yes_no
from umm_zoo.metrics.rows import name_to_words, required, words_to_name
from umm_zoo.outputs import Outputs

#: How the absent objects of a file were chosen, which is part of its name.
FILES = ("random", "popular", "adversarial")
#: What LLaVA's files of questions append.
SUFFIX = "Answer the question using a single word or phrase."
_WORDS = {1: "yes", 0: "no", -1: "neither"}
_KEYS = ("question_id", "image", "text", "label")


class POPE(Benchmark):
    """POPE (Li et al., 2023, arXiv 2305.10355): 3,000 questions about 500 images, thrice, with other absent objects.

    Answers are read twice: by the rule of the released script (``metrics.yes_no.POPE``), whose numbers have plain names, and by
    their first word (``metrics.YesNo``) under ``strict/``. Of each reading there are ``accuracy``, ``precision``, ``recall``,
    ``f1``, ``yes_ratio`` and ``unparsed`` (answers that say neither yes nor no) over all answers, and of each file as
    ``adversarial/f1``. ``mean_f1`` is the mean of the files' F1, the number that LLaVA-1.5 and its successors report. The interval
    is over images, with all of their questions.

    In an experiment it counts rows of the kind ``exists``, by ``meta["negative"]``, as ``data_pipelines.coco`` writes them.

    Args:
        questions: the release's files ``…random.json``, ``…popular.json``, ``…adversarial.json``, or some like them: a file, or
            a folder of them; None takes those of COCO, which ship.
        images: folder of the images, for those that ship COCO's ``val2014``; needed to put questions to a run.
        suffix: what stands below each question, for which the release says nothing; None asks the question alone.
        kinds: kinds of rows that count in an experiment.

    Reference: ``evaluate.py`` of the release, commit 3df3ba1.
    """

    name = "pope"
    headline = "mean_f1"
    sees_inputs = False
    reads = ("answers",)
    scores = ("mean_f1", "accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed", "*")

    def __init__(
        self,
        questions: str | None = None,
        images: str | None = None,
        suffix: str | None = SUFFIX,
        kinds: list[str] | None = None,
    ) -> None:
        super().__init__(["exists"] if kinds is None else kinds)
        self.questions, self.images, self.suffix = questions, images, suffix
        self.official, self.strict = yes_no.POPE(self.kinds), yes_no.YesNo(self.kinds)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Files of questions, by how their absent objects were chosen.

        Raises:
            UserError: there are none, or two of one name.
        """
        path = needed("questions", self.questions or str(SHIPPED), f"files with {', '.join(FILES)} in their names")
        shipped = "" if self.questions else "pope_coco_"
        some = sorted(path.iterdir()) if path.is_dir() else [path]
        found: dict[str, Path] = {}
        for file in (own for own in some if own.suffix in (".json", ".jsonl") and own.name.startswith(shipped)):
            for name in (name for name in FILES if name in file.stem):
                if name in found:
                    raise UserError("questions", f"{found[name].name} and {file.name} in {path}", f"one file of {name}")
                found[name] = file
        if not found:
            raise UserError("questions", f"no such file in '{path}'", f"NAME.json or .jsonl, with {', '.join(FILES)} in its name")
        return {name: found[name] for name in FILES if name in found}

    def items(self) -> list[Item]:
        """The questions, file after file."""
        folder = needed("images", self.images, "the folder of the images, such as COCO's val2014")
        rows = {name: rows_in("questions", file, _KEYS) for name, file in self.files.items()}
        flat = [(name, where, row) for name, own in rows.items() for where, row in own]
        for name, where, row in flat:
            place = f"questions: {self.files[name]}: row {where}"
            if not all(isinstance(row[key], str) for key in ("image", "text", "label")) or not row["text"].strip():
                raise UserError(place, "image, text or label that is no text", "three texts")
            if yes_no.parse_yes_no(row["label"]) < 0:
                raise UserError(place, f"the label '{row['label']}'", "yes or no")
        names = {row["image"]: [row["image"], f"val2014/{row['image']}"] for _, _, row in flat}
        files = image_files("images", folder, names)
        return [
            Item(
                plain_key(f"{name}-{row['question_id']}"),
                row["text"] if not self.suffix else f"{row['text']}\n{self.suffix}",
                (files[row["image"]],),
                row["label"].strip().lower(),
                {"task": "questions", "kind": "exists", "negative": name},
            )
            for name, _, row in flat
        ]

    def command(self, item: Item) -> Ask:
        """An answer."""
        return Ask()

    def unit(self, item: Item) -> str:
        """The image."""
        return item.images[0].name

    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        """Both readings of each answer; right by the released script's."""
        truths = self.official.truths(batch)
        answers = required(outputs, "answers", self) if truths else []
        for row, truth in truths.items():
            said, strictly = self.official.judge(answers[row]), self.strict.judge(answers[row])
            file = yes_no.negative_of(batch, row)
            reason = "" if said[0] == truth else f"read as {_WORDS[said[0]]}, the truth is {_WORDS[truth]}"
            columns = {"truth": _WORDS[truth], "read": _WORDS[said[0]], "strict": _WORDS[strictly[0]]}
            record = [truth, *map(int, (*said, *strictly)), *name_to_words(file)]
            yield row, Verdict(record, float(said[0] == truth), file, reason, columns)

    def protocol(self) -> dict[str, Any]:
        """What is appended, and the files."""
        files = {name: f"{file.name} {digest(file.read_text(encoding='utf-8'))}" for name, file in self.files.items()}
        return {"suffix": self.suffix, "questions": files}

    def warnings(self) -> list[str]:
        """Files that are missing."""
        missing = [name for name in FILES if name not in self.files]
        return [f"without the questions of {', '.join(missing)}: means are over the others"] if missing else []

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Both readings, over all and of each file."""
        names, group = torch.unique(records[:, 5:], dim=0, return_inverse=True)
        files = {words_to_name(words.tolist()): group == place for place, words in enumerate(names)}
        values: dict[str, Tensor] = {}
        for prefix, places in (("", (0, 1, 2)), ("strict/", (0, 3, 4))):
            own = records[:, places]
            by_file = {name: yes_no.yes_no_rates(*own[rows].T) for name, rows in files.items()}
            values[f"{prefix}mean_f1"] = torch.stack([rates["f1"] for rates in by_file.values()]).mean()
            values |= {f"{prefix}{score}": value for score, value in yes_no.yes_no_rates(*own.T).items()}
            for name in (name for name in (*FILES, *sorted(files.keys() - set(FILES))) if name in files and name):
                values |= {f"{prefix}{name}/{score}": value for score, value in by_file[name].items()}
        return values
