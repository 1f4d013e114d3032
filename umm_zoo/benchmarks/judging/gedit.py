"""GEdit-Bench: edits as users ask for them, scored by VIEScore."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from umm_zoo.benchmarks.base import Item, Verdict
from umm_zoo.benchmarks.files import image_files, needed, plain_key, rows_in
from umm_zoo.benchmarks.judging.base import MARK, PART, JudgedBenchmark
from umm_zoo.benchmarks.judging.judge import Judge, Question, Reply
from umm_zoo.benchmarks.judging.reading import viescore
from umm_zoo.checkpoints.plain_files import writing
from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import Edit
from umm_zoo.metrics.rows import NAME_WORDS

_COLUMNS = ("key", "task_type", "instruction", "instruction_language")
_INTERSECTION = "Intersection_exist"


class GEdit(JudgedBenchmark):
    """GEdit-Bench: 606 edits of 11 groups in one language, with VIEScore's two scores from 0 to 10.

    Semantics is the lowest sub-score of the judge for the original and the edited image, brought to the original's size; quality
    that for the edited image alone. A row's overall score is the square root of their product. ``overall``, ``semantics`` and
    ``quality`` are means over groups of means over rows, with ``_intersection`` over the rows that all models of the release's
    table answered; a group's name is its overall score. Rows over which the judge failed are left out; the release guesses a number
    there. The texts to the judge are the release's own.

    Args:
        judge: the judge.
        prompts: JSON or JSONL with rows of ``key``, ``task_type``, ``instruction``, ``instruction_language`` and
            ``Intersection_exist``, or the parquet files of the release's data set, or their folder.
        images: folder of the originals, ``KEY.png`` or as the release lays them out (``GROUP/LANGUAGE/KEY_SRCIMG.png``); those of
            parquet files are written there.
        language: of the instructions.
        judge_prompt: JSON with the texts ``semantics`` (place ``<instruction>``) and ``quality`` in place of the release's.

    Reference: ``GEdit-Bench`` of the release of Liu et al., 2025, arXiv 2504.17761; Ku et al., 2024, arXiv 2312.14867.
    """

    name = "gedit"
    judge_text = "gedit_judge.json"
    judge_names = {"semantics": ("instruction",), "quality": ()}
    scores = (
        *(f"{name}{suffix}" for suffix in ("", "_intersection") for name in ("overall", "semantics", "quality")),
        "failed",
        "*",
    )
    highest = 10.0
    official = "by GPT-4.1 or Qwen2.5-VL-72B at their own temperature"

    def __init__(
        self,
        judge: Judge | None = None,
        prompts: str | None = None,
        images: str | None = None,
        language: Literal["en", "cn"] = "en",
        judge_prompt: str | None = None,
    ) -> None:
        super().__init__(judge, judge_prompt)
        self.prompts, self.images, self.language = prompts, images, language

    @cached_property
    def _items(self) -> list[Item]:
        file = needed("prompts", self.prompts, "the rows of stepfun-ai/GEdit-Bench, as JSON, JSONL or parquet files")
        if parquet := sorted(file.glob("*.parquet")) or [file][: file.suffix == ".parquet"]:
            if not self.images:
                raise UserError("images", "nothing", "images=FOLDER, where the images of the parquet files are written")
            rows = _unpacked(parquet, Path(self.images).expanduser())
        else:
            rows = [row for _, row in rows_in("prompts", file, _COLUMNS)]
        folder = needed("images", self.images, "the folder of GEdit-Bench's original images")
        rows = [row for row in rows if row["instruction_language"] == self.language]
        if not rows:
            raise UserError(f"prompts: {file}", f"no row of the language '{self.language}'", "en or cn")
        places = image_files("images", folder, {str(row["key"]): list(_names(row)) for row in rows})
        return [
            Item(
                plain_key(str(row["key"])),
                row["instruction"],
                (places[str(row["key"])],),
                meta={
                    MARK: self.name,
                    "kind": row["task_type"],
                    "instruction": row["instruction"],
                    "intersection": bool(row.get(_INTERSECTION)),
                },
            )
            for row in rows
        ]

    def items(self) -> list[Item]:
        """The edits of the language, in the order of their file."""
        return self._items

    def command(self, item: Item) -> Command:
        """The edited image."""
        return Edit()

    def questions(self, meta: Mapping[str, Any], made: Image.Image, inputs: Sequence[Image.Image]) -> list[Question]:
        """How the instruction was followed, of both images; how good the edited one is, of that alone."""
        edited = made.resize(inputs[0].size)  # bicubic
        semantics = self.texts.fill("semantics", instruction=str(meta["instruction"]))
        return [
            Question((semantics, inputs[0], edited), image_type="JPEG"),
            Question((self.texts.texts["quality"], edited), image_type="JPEG"),
        ]

    def read(self, answer: str) -> float:
        """The lowest sub-score."""
        return min(viescore(answer))

    def judged(self, meta: Mapping[str, Any], replies: Sequence[Reply[Any]]) -> Verdict:
        """Semantics, quality and both together."""
        semantics, quality = (reply.value for reply in replies)
        overall, own = None, [0, 0]
        if semantics is not None and quality is not None:
            overall, own = math.sqrt(semantics * quality), [round(semantics * PART), round(quality * PART)]
        verdict = self.verdict(str(meta["kind"]), overall, replies, semantics=semantics, quality=quality)
        return verdict._replace(record=[*verdict.record, *own, int(bool(meta.get("intersection")))])

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Means over groups."""
        kept = records[records[:, NAME_WORDS + 1] > 0]
        values = dict[str, Tensor]()
        groups = dict[str, Tensor]()
        for suffix, rows in (("", kept), ("_intersection", kept[kept[:, -1] > 0])):
            words, columns = rows[:, :NAME_WORDS], (NAME_WORDS, NAME_WORDS + 3, NAME_WORDS + 4)
            for name, column in zip(("overall", "semantics", "quality"), columns, strict=True):
                found = self.means(words, rows[:, column].double() / PART)
                values[f"{name}{suffix}"] = found.pop("overall")
                if not suffix:
                    del found["mean"]
                    ending = "" if name == "overall" else f"/{name}"
                    groups |= {f"{group}{ending}": value for group, value in found.items()}
        return values | {"failed": records[:, NAME_WORDS + 2].sum().double()} | groups


def _names(row: Mapping[str, Any]) -> list[str]:
    key, below = str(row["key"]), f"{row['task_type']}/{row['instruction_language']}/{row['key']}_SRCIMG"
    said = [row[name] for name in ("image", "input_image") if isinstance(row.get(name), str)]
    return [*said, key, f"{key}_SRCIMG", below, f"fullset/{below}"]


def _unpacked(files: Sequence[Path], folder: Path) -> list[dict[str, Any]]:
    """Rows of parquet files, whose images are written into a folder where they are not there yet."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("prompts", "parquet files without pyarrow", "pip install 'umm_zoo[parquet]'") from error
    rows = []
    with writing(folder, "images=FOLDER, one that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            try:
                columns = pyarrow.parquet.read_table(file).to_pydict()
                found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                rows += [_with_image(row, folder) for row in found]
            except (pyarrow.ArrowInvalid, KeyError, TypeError) as error:
                raise UserError(f"prompts: {file}", f"no data set of GEdit-Bench ({error})", "the release's files") from error
    return rows


def _with_image(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / f"{row['key']}.png"
    if not path.is_file():
        path.write_bytes(row["input_image"]["bytes"])
    return {name: row[name] for name in (*_COLUMNS, _INTERSECTION)}
