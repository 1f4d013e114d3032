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
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipelines.command import SHARDS, Parser, run, whole
from data_pipelines.converters.rows import Rows
from data_pipelines.decoding import BadSampleError, decode_json, decode_text, one_sample
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.index import ShardIndex, load_index
from data_pipelines.shards.progress import progress_bar
from umm_zoo.checkpoints.plain_files import write_json
from umm_zoo.conversation import IMAGE_MARKER
from umm_zoo.errors import Problem, UserError, printable, several

KINDS = ("equal", "contained", "ngram")
TEXTS = ("json", "txt")
_WORD = re.compile(r"\w+")
_SHOWN = 200
Words = tuple[str, ...]


def words_of(text: str) -> Words:
    """The words by which texts are compared."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text.replace(IMAGE_MARKER, " ")).lower().replace("_", " ")))


class PromptIndex:
    """Index of prompts that finds those a text overlaps with, in a time that does not grow with their number.

    Args:
        min_words: shorter prompts count only as equal texts ("a dog" stands in half of all captions).
        threshold: share of a prompt's sequences of ``ngram`` words that makes an overlap.
    """

    def __init__(self, prompts: Sequence[str], min_words: int = 5, ngram: int = 8, threshold: float = 0.5) -> None:
        several("prompts", prompts)
        self.prompts, self.words = list(prompts), [words_of(prompt) for prompt in prompts]
        self.head, self.ngram, self.threshold = min_words, ngram, threshold
        self._equal, self._heads, self._grams = (defaultdict[Words, list[int]](list) for _ in range(3))
        for number, words in enumerate(self.words):
            self._equal[words].append(number)
            if len(words) >= min_words:
                self._heads[words[:min_words]].append(number)
            for gram in set(_sequences(words, ngram)):
                self._grams[gram].append(number)

    def find(self, text: str) -> dict[int, tuple[str, float]]:
        """Kind of overlap and share of the prompt that was found, by the prompt's number."""
        words = words_of(text)
        found = {number: ("equal", 1.0) for number in self._equal.get(words, [])} if words else {}
        for start, head in enumerate(_sequences(words, self.head)):
            for number in self._heads.get(head, []):
                prompt = self.words[number]
                if words[start : start + len(prompt)] == prompt:
                    found.setdefault(number, ("contained", 1.0))
        hits = Counter(number for gram in set(_sequences(words, self.ngram)) for number in self._grams.get(gram, []))
        for number, count in hits.items():
            share = count / len(set(_sequences(self.words[number], self.ngram)))
            if share >= self.threshold:
                found.setdefault(number, ("ngram", round(share, 4)))
        return found


def _sequences(words: Words, length: int) -> Iterator[Words]:
    return (words[start : start + length] for start in range(len(words) - length + 1))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file or folder, each once."""
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


def find_overlaps(shards: Sequence[str], index: PromptIndex, examples: int = 3) -> dict[str, Any]:
    """The report on the texts of all shards, prompts with most overlaps first; nothing is read of their images."""
    several("shards", shards)
    counts, samples = Counter[str](), Counter[str]()  # of what was read, and samples by their strongest overlap
    prompts: dict[int, Counter[str]] = {}
    shown: dict[int, list[dict[str, Any]]] = {}
    unreadable: dict[str, str] = {}
    for path, key, texts in _samples(shards, unreadable):
        counts["samples"] += 1
        counts["texts"] += len(texts or ())
        counts["unreadable_samples"] += texts is None
        kinds = set()
        for where, text in texts or ():
            for number, (kind, share) in index.find(text).items():
                kinds.add(kind)
                prompts.setdefault(number, Counter())[kind] += 1
                if len(rows := shown.setdefault(number, [])) < examples:
                    rows.append({"shard": path, "key": key, "where": where, "kind": kind, "share": share, "text": text[:_SHOWN]})
        samples.update([min(kinds, key=KINDS.index)] if kinds else [])
    order = sorted(prompts, key=lambda number: (-sum(prompts[number].values()), number))
    return {
        **{name: counts[name] for name in ("samples", "texts", "unreadable_samples")},
        "unreadable_shards": unreadable,
        "prompts": len(index.prompts),
        "samples_with_overlap": {kind: samples[kind] for kind in KINDS},
        "prompts_with_overlap": {"any": len(order)} | {k: sum(bool(found[k]) for found in prompts.values()) for k in KINDS},
        "overlaps": [{"prompt": index.prompts[number], **prompts[number], "examples": shown[number]} for number in order],
    }


def _samples(shards: Sequence[str], unreadable: dict[str, str]) -> Iterator[tuple[str, str, list[tuple[str, str]] | None]]:
    """Shard, key, and texts of each sample; None where they cannot be read (bad JSON, not UTF-8); why shards are ``unreadable``."""
    files = RangeReader()
    with progress_bar("reading", len(shards)) as advance:
        for path in shards:
            try:
                shard = load_index(path)
                for number in range(len(shard)):
                    texts: list[tuple[str, str]] | None = None
                    with suppress(BadSampleError), one_sample():
                        texts = list(_texts(files, shard, number))
                    yield path, shard.key(number), texts
            except UserError as error:
                unreadable[path] = str(error)
            advance(1)


def _texts(files: RangeReader, shard: ShardIndex, number: int) -> Iterator[tuple[str, str]]:
    """Places and texts: the turns of the json, or else a caption in it or beside it."""
    members = files.members(shard, number, TEXTS)
    row = decode_json(members["json"], sys.maxsize) if "json" in members else {}
    if isinstance(turns := row.get("conversations"), list):
        for place, turn in enumerate(turn for turn in turns if isinstance(turn, dict)):
            text = next((turn[key] for key in ("text", "value", "content") if isinstance(turn.get(key), str)), "")
            yield f"turn {place} ({turn.get('role', turn.get('from'))})", text
        return
    if "txt" in members:
        yield "txt", decode_text(members["txt"], sys.maxsize)
    yield from ((f"json {key}", row[key]) for key in ("caption", "prompt") if isinstance(row.get(key), str))


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
        example = f"{row['examples'][0]['shard']} {row['examples'][0]['key']}"
        console.print(printable(f"  {row['prompt'][:_SHOWN]!r}: {counts}; {example}"))
    console.print(printable(f"prompts found: {found['any']:,} (all of them in {saved})"))


def _threshold(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected above 0 to 1")
    return float(text)


def parser() -> Parser:
    """The command line."""
    made = Parser(__doc__)
    made.add_argument("shards", nargs="+", metavar="SHARDS", help=SHARDS)
    made.add_argument("prompts", type=Path, metavar="PROMPTS", help="file or folder of prompts")
    made.add_argument("--min-words", type=whole(1), default=5, metavar="N", help="shorter prompts count only as equal texts")
    made.add_argument("--ngram", type=whole(1), default=8, metavar="N", help="words of a sequence")
    made.add_argument("--threshold", type=_threshold, default=0.5, metavar="X", help="share of a prompt's sequences that counts")
    made.add_argument("--examples", type=whole(1), default=3, metavar="N", help="examples kept for each prompt")
    made.add_argument("--report", type=Path, default=Path("overlap.json"), metavar="FILE", help="where the report is saved")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Search, print, save the report."""
    index = PromptIndex(read_prompts(arguments.prompts), arguments.min_words, arguments.ngram, arguments.threshold)
    report = find_overlaps(expand(arguments.shards), index, arguments.examples)
    write_json(arguments.report, report, indent=1)
    print_overlaps(report, arguments.report)
    if unreadable := report["unreadable_shards"]:
        raise UserError("", [Problem("", line) for line in unreadable.values()])


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
