"""``python -m data_pipelines.overlap SHARDS PROMPTS``: report of training texts that contain prompts of an evaluation.

::

    python -m data_pipelines.overlap shards/blip3o geneval_prompts.txt
    python -m data_pipelines.overlap 'shards/*/train' evaluation_metadata.jsonl --report overlap.json
    python -m data_pipelines.overlap shards/llava DPG-Bench/prompts --ngram 8 --threshold 0.4

``PROMPTS`` is a text file with one prompt per line, JSON Lines or a JSON list with the key ``prompt``, or a folder with one text
file per prompt. Every turn of every sample is read (and ``KEY.txt`` where there are no turns). Texts are compared as words: Unicode
NFKC, lower case, no punctuation, no ``<image>``. Of three kinds of overlap a text and a prompt have the strongest:

* ``equal``: the same words;
* ``contained``: the prompt, of at least ``--min-words`` words, stands within the text;
* ``ngram``: at least ``--threshold`` of the prompt's sequences of ``--ngram`` words stand in the text (for long prompts only).

Shards are read, never changed. The report lists every prompt that was found, with counts and examples.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.command import SHARDS, Parser, run, whole
from data_pipelines.converters.converting import progress_bar
from data_pipelines.converters.rows import Rows
from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.addresses import expand
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.index import ShardIndex, load_index
from data_pipelines.shards.indexing import write_json
from umm_zoo.batch import IMAGE_MARKER
from umm_zoo.errors import UserError

KINDS = ("equal", "contained", "ngram")
_WORD = re.compile(r"\w+")
_SHOWN = 200
Words = tuple[str, ...]


def words_of(text: str) -> Words:
    """The words by which texts are compared."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text.replace(IMAGE_MARKER, " ")).lower().replace("_", " ")))


class PromptIndex:
    """Finds the prompts that a text overlaps with, in a time that does not grow with their number.

    Args:
        prompts: the evaluation's prompts.
        min_words: shorter prompts count only as equal texts ("a dog" stands in half of all captions).
        ngram: words of a sequence.
        threshold: share of a prompt's sequences that makes an overlap.
    """

    def __init__(self, prompts: Sequence[str], min_words: int = 5, ngram: int = 8, threshold: float = 0.5) -> None:
        self.prompts = list(prompts)
        self.words = [words_of(prompt) for prompt in prompts]
        self.ngram, self.threshold = ngram, threshold
        self._equal: dict[Words, list[int]] = {}
        self._heads: dict[Words, list[int]] = {}
        self._grams: dict[Words, list[int]] = {}
        self._num_grams: list[int] = []
        self._head = min_words
        for number, words in enumerate(self.words):
            self._equal.setdefault(words, []).append(number)
            if len(words) >= min_words:
                self._heads.setdefault(words[:min_words], []).append(number)
            grams = set(_sequences(words, ngram))
            self._num_grams.append(len(grams))
            for gram in grams:
                self._grams.setdefault(gram, []).append(number)

    def find(self, text: str) -> dict[int, tuple[str, float]]:
        """Kind of overlap and share of the prompt that was found, by the prompt's number."""
        words = words_of(text)
        found = {number: ("equal", 1.0) for number in self._equal.get(words, [])} if words else {}
        for start, head in enumerate(_sequences(words, self._head)):
            for number in self._heads.get(head, []):
                prompt = self.words[number]
                if words[start : start + len(prompt)] == prompt:
                    found.setdefault(number, ("contained", 1.0))
        hits = Counter(number for gram in set(_sequences(words, self.ngram)) for number in self._grams.get(gram, []))
        for number, count in hits.items():
            share = count / self._num_grams[number]
            if share >= self.threshold:
                found.setdefault(number, ("ngram", round(share, 4)))
        return found


def _sequences(words: Words, length: int) -> Iterator[Words]:
    return (words[start : start + length] for start in range(len(words) - length + 1))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file or folder, each once.

    Raises:
        UserError: it does not exist, holds no prompt, or is in none of the layouts.
    """
    try:
        if path.is_dir():
            found = [file.read_text(encoding="utf-8-sig") for file in sorted(path.glob("*.txt"))]
        elif path.suffix in (".json", ".jsonl"):
            rows = Rows(path)
            found = [_prompt(path, rows[number], number) for number in range(len(rows))]
        elif path.is_file():
            found = path.read_text(encoding="utf-8-sig").splitlines()
        else:
            raise UserError(path, "no such file or folder of prompts")
    except UnicodeDecodeError as error:
        raise UserError(path, f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except BadSampleError as error:
        raise UserError(path, str(error)) from error
    prompts = list(dict.fromkeys(prompt.strip() for prompt in found if words_of(prompt)))
    if not prompts:
        raise UserError(path, "no prompt", "lines, json with the key 'prompt', or a folder of .txt files")
    return prompts


def _prompt(path: Path, row: dict[str, Any], number: int) -> str:
    if not isinstance(row.get("prompt"), str):
        raise UserError(path, f"row {number} has no text under 'prompt', found {', '.join(row) or 'no key'}")
    return str(row["prompt"])


@dataclass
class Overlaps:
    """What was found, by prompt."""

    samples: int = 0
    texts: int = 0
    unreadable: int = 0
    samples_found: Counter[str] = field(default_factory=Counter)
    prompts_found: dict[int, Counter[str]] = field(default_factory=dict)
    examples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def to_json(self, index: PromptIndex) -> dict[str, Any]:
        """The report, prompts with most overlaps first."""
        order = sorted(self.prompts_found, key=lambda number: (-sum(self.prompts_found[number].values()), number))
        rows = [
            {"prompt": index.prompts[number], **dict(self.prompts_found[number]), "examples": self.examples[number]}
            for number in order
        ]
        kinds = {kind: sum(1 for counts in self.prompts_found.values() if counts[kind]) for kind in KINDS}
        return {
            "samples": self.samples,
            "texts": self.texts,
            "unreadable_samples": self.unreadable,
            "prompts": len(index.prompts),
            "samples_with_overlap": {kind: self.samples_found[kind] for kind in KINDS},
            "prompts_with_overlap": {"any": len(order), **kinds},
            "overlaps": rows,
        }


def find_overlaps(shards: Sequence[str], index: PromptIndex, examples: int = 3) -> Overlaps:
    """Read the texts of all shards, and nothing of their images.

    Raises:
        UserError: a shard cannot be read at all.
    """
    overlaps, files = Overlaps(), RangeReader()
    with progress_bar("reading", len(shards)) as advance:
        for path in shards:
            shard = load_index(path)
            for number in range(len(shard)):
                _look(overlaps, files, shard, number, index, examples)
            advance(1)
    return overlaps


def _look(overlaps: Overlaps, files: RangeReader, shard: ShardIndex, number: int, index: PromptIndex, examples: int) -> None:
    """Find the overlaps of one sample."""
    overlaps.samples += 1
    try:
        texts = list(_texts(files, shard, number))
    except UserError:
        raise
    except (ValueError, RecursionError):  # bad JSON, not UTF-8
        overlaps.unreadable += 1
        return
    strongest = len(KINDS)
    for where, text in texts:
        overlaps.texts += 1
        for prompt, (kind, share) in index.find(text).items():
            strongest = min(strongest, KINDS.index(kind))
            overlaps.prompts_found.setdefault(prompt, Counter())[kind] += 1
            shown = overlaps.examples.setdefault(prompt, [])
            if len(shown) < examples:
                example = {"shard": shard.path, "key": shard.key(number), "where": where, "kind": kind, "share": share}
                shown.append({**example, "text": text[:_SHOWN]})
    if strongest < len(KINDS):
        overlaps.samples_found[KINDS[strongest]] += 1


def _texts(files: RangeReader, shard: ShardIndex, number: int) -> Iterator[tuple[str, str]]:
    """Where and what: the turns of the json, or else a caption in it or beside it."""
    members = {name: (offset, length) for name, offset, length in shard.members(number)}
    row = json.loads(files.read(shard.path, *members["json"]).decode()) if "json" in members else {}
    turns = row.get("conversations") if isinstance(row, dict) else None
    if isinstance(turns, list):
        for place, turn in enumerate(turn for turn in turns if isinstance(turn, dict)):
            text = next((turn[key] for key in ("text", "value", "content") if isinstance(turn.get(key), str)), "")
            yield f"turn {place} ({turn.get('role', turn.get('from'))})", text
        return
    if "txt" in members:
        yield "txt", files.read(shard.path, *members["txt"]).decode()
    for key in ("caption", "prompt"):
        if isinstance(row, dict) and isinstance(row.get(key), str):
            yield f"json {key}", row[key]


def print_overlaps(report: dict[str, Any], saved: Path, listed: int = 5) -> None:
    """Counts, and the prompts found most often."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    found, samples = report["prompts_with_overlap"], report["samples_with_overlap"]
    console.print(f"{report['samples']:,} samples with {report['texts']:,} texts against {report['prompts']:,} prompts")
    if report["unreadable_samples"]:
        console.print(f"{report['unreadable_samples']:,} samples have no readable text")
    for kind in KINDS:
        console.print(f"{kind:10} {samples[kind]:,} samples, {found[kind]:,} prompts")
    for row in report["overlaps"][:listed]:
        counts = ", ".join(f"{kind} {row[kind]:,}" for kind in KINDS if kind in row)
        console.print(f"  {row['prompt'][:_SHOWN]!r}: {counts}; {row['examples'][0]['shard']} {row['examples'][0]['key']}")
    console.print(f"prompts found: {found['any']:,} (all of them in {saved})")


def _threshold(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected above 0 to 1")
    return float(text)


def parser() -> Parser:
    """The command line."""
    made = Parser("overlap", "Report training texts that contain evaluation prompts.")
    made.add_argument("shards", nargs="+", metavar="SHARDS", help=SHARDS)
    made.add_argument("prompts", type=Path, metavar="PROMPTS", help="file or folder of prompts")
    made.add_argument("--min-words", type=whole(1), default=5, metavar="N", help="shorter prompts count only as equal texts")
    made.add_argument("--ngram", type=whole(1), default=8, metavar="N", help="words of a sequence")
    made.add_argument("--threshold", type=_threshold, default=0.5, metavar="X", help="share of a prompt's sequences that counts")
    made.add_argument("--examples", type=whole(1), default=3, metavar="N", help="examples kept for each prompt")
    made.add_argument("--report", type=Path, default=Path("overlap.json"), metavar="FILE", help="where the report is saved")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Search, print, save the report.

    Raises:
        UserError: there is no shard or prompt file, or one cannot be read.
    """
    index = PromptIndex(read_prompts(arguments.prompts), arguments.min_words, arguments.ngram, arguments.threshold)
    report = find_overlaps(expand(arguments.shards), index, arguments.examples).to_json(index)
    write_json(arguments.report, report, indent=1)
    print_overlaps(report, arguments.report)


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
