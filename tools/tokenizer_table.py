"""Table of finished tokenizers: bits, reconstruction, what their codes tell a reader, and how fast they encode and decode.

    python tools/tokenizer_table.py BSQ='runs/compare/tokenizers/BSQ-seed*' QLIP=runs/tokenizers/toy/qlip
    python tools/tokenizer_table.py QLIP=runs/tokenizers/toy/qlip --again data.val.captions.shards=/data/other/captions-*.tar

Each row is NAME=RUNS, a run folder or a pattern of some; numbers are means over its runs, on their own validation data. Fréchet
distances are taken in the shipped `clip`, recall at 1 is the mean of both directions, where the run has texts. Speed is images per
second of processor time on one thread, of batches of 32, the median of some: of whole tokenizers, from images to codes (latents,
where there are none) and back. What a run gave stays in its folder (`tokenizer-table.json`) until the options change.
"""

from __future__ import annotations

import argparse
import glob
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

import torch
from torch import Tensor

from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.visual_tokenizer import VisualTokenizer
from umm_zoo.errors import UserError, user_errors
from umm_zoo.pretraining.judged import Judged
from umm_zoo.release.card import markdown_table
from umm_zoo.training.finished_run import FinishedRun, load_run
from umm_zoo.training.report import circumstances
from umm_zoo.training.validation import validate

CLIP = "{_target_: umm_zoo.backbones.features.CLIPFeatures.from_pretrained, source: 'umm_zoo:tiny/weights/clip'}"
FRECHET = f"metrics.frechet={{_target_: umm_zoo.metrics.FrechetDistance, encoder: {CLIP}}}"
PROBE = "metrics.probe={_target_: umm_zoo.shapes.token_probe.TokenProbe, attributes: [shape, mark, class]}"
FILE = "tokenizer-table.json"

#: Columns and the score of each.
COLUMNS = {
    "PSNR (dB)": ("val/pixels/psnr", "{:.1f}"),
    "Fréchet": ("val/frechet", "{:.1f}"),
    "energy": ("val/energy", "{:.2f}"),
    "shape": ("val/probe/shape", "{:.2f}"),
    "mark": ("val/probe/mark", "{:.2f}"),
    "class": ("val/probe/class", "{:.2f}"),
    "recall at 1": ("recall", "{:.2f}"),
    "encode/s": ("encode", "{:.0f}"),
    "decode/s": ("decode", "{:.0f}"),
}


def size_of(codec: LatentCodec) -> str:
    """Bits, or numbers where nothing is quantized, of a token or cell, and how many an image of 32 px has."""
    cells = (32 // codec.downsampling) ** 2
    if not isinstance(codec, VisualTokenizer):
        return f"{cells} x {codec.latent_channels} numbers"
    quantizers = [codec.branch(name).bottleneck.quantizer for name in codec.branches]
    if not all(quantizer.codes_per_token for quantizer in quantizers):
        return f"{cells} x {sum(quantizer.dim for quantizer in quantizers)} numbers"
    return f"{cells} x {sum(quantizer.bits for quantizer in quantizers):g} bits"


def per_second(work: Callable[[Tensor], Any], inputs: Tensor, repeats: int) -> float:
    """Inputs per second of processor time, the median of some calls after one that does not count."""
    work(inputs)
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work(inputs)
        taken.append(time.process_time() - began)
    return len(inputs) / max(statistics.median(taken), 1e-9)


@torch.no_grad()
def speeds(codec: LatentCodec, side: int = 32, batch: int = 32, repeats: int = 5) -> dict[str, float]:
    """Images per second from pixels to codes and back; to latents where there are no codes."""
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encode: Callable[[Tensor], Tensor] = codec.encode
    decode: Callable[[Tensor], Tensor] = codec.decode
    if isinstance(codec, VisualTokenizer) and codec.codes(images[:1]).shape[-1]:
        encode, decode = codec.codes, codec.images
    return {"encode": per_second(encode, images, repeats), "decode": per_second(decode, encode(images), repeats)}


def scores_of(run: FinishedRun, repeats: int) -> dict[str, Any]:
    """A run's row."""
    method = run.load_method()
    if not isinstance(method, Judged):
        raise UserError(str(run.path), f"a {type(method).__name__}", "a tokenizer's training")
    found: dict[str, Any] = {name: value for name, value in validate(run).items() if value is not None}
    both = [value for name, value in found.items() if name.startswith("val/retrieval/")]
    found |= {"recall": sum(both) / len(both)} if both else {}
    return found | speeds(method.codec, repeats=repeats) | {"size": size_of(method.codec)}


def measured(folder: Path, words: Sequence[str], repeats: int, again: bool) -> dict[str, Any]:
    """What a run gives, read from its folder where the same was asked before."""
    file = folder / FILE
    settings = {"words": list(words), "repeats": repeats}
    if file.is_file() and not again:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["scores"]
    plain = load_run(folder, words)
    makes = plain.load_method().makes or ()
    more = [FRECHET, *([PROBE] if "tokens" in makes else [])]
    scores = scores_of(load_run(folder, [*more, *words]), repeats)
    file.write_text(json.dumps({"settings": settings, "scores": scores}, indent=2), encoding="utf-8")
    return scores


def row_of(name: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of a row: means over runs, ``-`` where there is no such score."""
    cells = [name, str(found[0]["size"])]
    for score, form in COLUMNS.values():
        values = [own[score] for own in found if own.get(score) is not None]
        cells.append(form.format(sum(values) / len(values)) if values else "-")
    return [*cells, str(len(found))]


def without_empty(head: list[str], table: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns in which there is nothing."""
    kept = [place for place in range(len(head)) if any(row[place] != "-" for row in table)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in table]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="NAME=RUNS | key=value", help="rows, and overrides of their experiments")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls (default 5)")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--out", type=Path, help="file of the table, as Markdown")
    given = parser.parse_intermixed_args(argv)
    with user_errors() as outcome:
        torch.set_num_threads(1)
        rows, overrides = dict[str, list[Path]](), list[str]()
        for word in given.words:
            name, _, runs = word.partition("=")
            if "." in name or not runs:
                overrides.append(word)
            elif not (folders := [Path(path) for path in sorted(glob.glob(runs)) if Path(path).is_dir()]):
                raise UserError(name, f"no run folder {runs}", "a run folder, or a pattern of some")
            else:
                rows[name] = folders
        table = []
        for name, folders in rows.items():
            table.append(row_of(name, [measured(folder, overrides, given.repeats, given.again) for folder in folders]))
        where = circumstances()
        text = "\n".join(markdown_table(*without_empty(["tokenizer", "an image of 32 px", *COLUMNS, "runs"], table)))
        text += f"\n\n`{' '.join(['python tools/tokenizer_table.py', *sys.argv[1:]])}`, commit {where['commit']}.\n"
        print(text)
        if given.out is not None:
            given.out.write_text(text, encoding="utf-8")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
